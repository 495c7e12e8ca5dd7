"""The table: complete, without contradictions, and found under every name that people use."""

import contextlib
import copy
import pickle
import re
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import rows
from support.formulas import Formula, with_one_fault

from gatedffn import VARIANTS, get_variant
from gatedffn.activations import SCALARS
from gatedffn.errors import UnknownVariant
from gatedffn.ops.gating import reference
from gatedffn.variants import PAPER, Variant

# Design section 1, in its order; a row that is missing or renamed breaks its users.
UNGATED = (
    "relu gelu gelu_tanh swish relu2 leaky_relu prelu softplus elu selu quick_gelu sigmoid tanh "
    "xielu mish hard_swish"
)
GATED = (
    "glu bilinear reglu geglu geglu_tanh swiglu gtu relu2_glu quick_geglu swiglu_oai swiglu_clamp "
    "drelu situ_glu powglu xswiglu xgeglu mish_glu hard_swish_glu"
)
# What models, papers and libraries call them.
FOREIGN = {
    "silu": "swish",
    "SiLU": "swish",
    "Swish": "swish",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu_squared": "relu2",
    "LiGLU": "bilinear",
    "SwiGLU": "swiglu",
    "GEGLU": "geglu",
    "ReGLU": "reglu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "QuickGELU": "quick_gelu",
    "ReLU²": "relu2",
    "PReLU": "prelu",
    "xIELU": "xielu",
    "GTU": "gtu",
    "dReLU": "drelu",
    "Mish": "mish",
    "hardswish": "hard_swish",
    "hard-swish": "hard_swish",
    "gpt-oss": "swiglu_oai",
}
DEFAULTS = {
    "swish": {"beta": 1.0},
    "leaky_relu": {"slope": 0.01},
    "prelu": {"slope": 0.25},
    "elu": {"alpha": 1.0},
    "quick_gelu": {"beta": 1.702},
    "xielu": {"alpha_p": 0.8, "alpha_n": 0.8},
    "swiglu": {"beta": 1.0},
    "quick_geglu": {"beta": 1.702},
    "swiglu_oai": {"beta": 1.702, "limit": 7.0},
    "swiglu_clamp": {"beta": 1.0, "limit": 10.0},
    "situ_glu": {"gate_cap": 4.0, "up_cap": 25.0},
    "powglu": {"m": 3.0},
    "xswiglu": {"alpha": 0.0},
    "xgeglu": {"alpha": 0.0},
}


def spellings(row: Variant) -> tuple[str, ...]:
    return (row.name, row.label, *row.aliases)


def normal(name: str) -> str:
    return re.sub(r"[\W_]", "", name.replace("²", "2")).lower()


def test_the_rows_and_their_order() -> None:
    assert list(VARIANTS) == UNGATED.split() + GATED.split()
    assert [name for name, row in VARIANTS.items() if row.gated] == GATED.split()


def test_the_defaults() -> None:
    assert {name: row.defaults for name, row in VARIANTS.items() if row.defaults} == DEFAULTS


def test_the_table_is_read_only() -> None:
    rows: Any = VARIANTS
    with pytest.raises(TypeError, match="does not support item assignment"):
        rows["relu"] = rows["gelu"]
    row: Any = VARIANTS["relu"]
    with pytest.raises(FrozenInstanceError):
        row.name = "other"


@rows
def test_key_and_name_agree(row: Variant) -> None:
    assert VARIANTS[row.name] is row


@rows
def test_a_row_is_complete(row: Variant) -> None:
    assert row.label
    assert row.formula
    assert re.search(r"arXiv \d{4}\.\d{5}|code|\d{4}", row.source)
    assert all(parameter.meaning for parameter in row.parameters)


# Other than the defaults; points on both sides of every bend, gate and up apart.
POINTS = [(a / 8, (7 * a) % 160 / 8 - 9.93) for a in range(-100, 101, 3)]


def agrees(formula: Formula, row: Variant) -> bool:
    """Whether a formula gives the row's hidden values, and says its defaults."""
    values = {p.name: 1.3 * p.default + 0.1 for p in row.parameters}
    gate, up = torch.tensor(POINTS, dtype=torch.float64).unbind(1)
    if row.gated:
        truth = reference.gating(gate, up, row.name, dict(values))
        found = [formula.value({"g": g, "u": u}, values) for g, u in POINTS]
    else:
        truth = reference.gating(up, None, row.name, dict(values))
        found = [formula.value({"u": u}, values) for _, u in POINTS]
    return formula.defaults.items() <= row.defaults.items() and torch.allclose(
        torch.tensor(found, dtype=torch.float64), truth, rtol=1e-8, atol=1e-12
    )


@rows
def test_the_formula_is_what_is_computed(row: Variant) -> None:
    assert agrees(Formula(row.formula), row)


@rows
def test_a_wrong_formula_is_rejected(row: Variant) -> None:
    wrong = list(with_one_fault(row.formula))
    assert wrong
    assert [text for text in wrong if agrees(Formula(text), row)] == []


@rows
def test_phi_and_psi_take_the_parameters_of_the_row_and_no_others(row: Variant) -> None:
    taken = {*SCALARS[row.phi].parameters, *(SCALARS[row.psi].parameters if row.psi else ())}
    assert taken == set(row.defaults)


@rows
def test_defaults_are_within_their_bounds(row: Variant) -> None:
    for parameter in row.parameters:
        assert parameter.above is None or parameter.default > parameter.above
        assert parameter.below is None or parameter.default < parameter.below


@rows
def test_only_learnable_parameters_are_learned_by_a_source(row: Variant) -> None:
    assert row.learned is None or any(parameter.learnable for parameter in row.parameters)


@rows
def test_projections(row: Variant) -> None:
    assert row.projections == (("gate_proj", "up_proj") if row.gated else ("up_proj",))


def test_no_two_rows_share_a_spelling() -> None:
    owners = Counter(
        spelling for row in VARIANTS.values() for spelling in {normal(s) for s in spellings(row)}
    )
    assert [spelling for spelling, count in owners.items() if count > 1] == []


def test_no_two_rows_compute_the_same() -> None:
    # prelu and leaky_relu differ in what is learned, quick_gelu and swish in the number.
    facts = [(r.phi, r.psi, tuple(r.defaults.items()), r.learned) for r in VARIANTS.values()]
    assert len(set(facts)) == len(facts)


def test_the_eight_rows_of_the_paper() -> None:
    assert PAPER == ("relu", "gelu", "swish", "glu", "bilinear", "geglu", "swiglu", "reglu")
    assert set(PAPER) <= set(VARIANTS)


# lookup


@rows
def test_found_under_every_spelling_in_any_case(row: Variant) -> None:
    for spelling in spellings(row):
        for written in (spelling, spelling.upper(), spelling.lower(), f" {spelling} "):
            assert get_variant(written) is row
        assert get_variant(spelling.replace("_", "-")) is row


@pytest.mark.parametrize(("name", "row"), FOREIGN.items(), ids=list(FOREIGN))
def test_foreign_names(name: str, row: str) -> None:
    assert get_variant(name).name == row


@rows
def test_a_row_finds_itself(row: Variant) -> None:
    assert get_variant(row) is row
    assert get_variant(pickle.loads(pickle.dumps(row))) == row
    assert get_variant(copy.deepcopy(row)) == row


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("swigul", "swiglu"), ("gellu", "gelu"), ("relu3", "relu"), ("geglutanhh", "geglu_tanh")],
)
def test_an_unknown_name_is_told_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownVariant, match=rf"no variant is called '{name}'.*\b{nearest}\b"):
        get_variant(name)


def test_a_name_near_to_none_is_sent_to_the_table() -> None:
    with pytest.raises(UnknownVariant, match=r"see gatedffn\.VARIANTS"):
        get_variant("0123456789")


@pytest.mark.parametrize("name", ["", " ", "_", "²", "μ"])
def test_a_name_without_letters_is_refused(name: str) -> None:
    with pytest.raises(UnknownVariant):
        get_variant(name)


@pytest.mark.parametrize("name", [None, 3, b"relu", ["relu"]])
def test_what_is_no_name_is_refused_with_the_names(name: Any) -> None:
    with pytest.raises(UnknownVariant, match="relu, gelu"):
        get_variant(name)


def test_a_row_of_ones_own_is_refused() -> None:
    # It would otherwise be computed as the row of the table that has its name.
    with pytest.raises(UnknownVariant, match="not a row"):
        get_variant(replace(VARIANTS["swiglu"], phi="relu"))


@given(st.text(max_size=12))
def test_a_lookup_finds_a_row_or_says_what_came(name: str) -> None:
    with contextlib.suppress(UnknownVariant):
        assert get_variant(name).name in VARIANTS
        return
    with pytest.raises(UnknownVariant, match=re.escape(repr(name))):
        get_variant(name)
