"""Variants of one's own: what they compute, where they run, and what is refused."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedffn as gf
from gatedffn.activations import SCALARS, own, variant_named
from gatedffn.bench.workloads import own_workload
from gatedffn.errors import ParameterError, SettingError, UnknownVariant
from gatedffn.ops.operator import forget_plans
from gatedffn.plots.catalogue import choose
from gatedffn.variants import _BY_SPELLING, FUNCTIONS, VARIANTS, Parameter, Variant

ROW = Variant(
    name="softplus_glu",
    label="Softplus-GLU",
    phi="softplus",
    psi="identity",
    formula="log(1 + e^g) * u",
    source="a test",
)


def bent(x: Tensor, slope: float | Tensor) -> Tensor:
    return x * torch.sigmoid(x) + slope * torch.sin(x)


def d_bent(x: Tensor, slope: float | Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * (1 - s) + slope * torch.cos(x)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing that a test defines is there for another."""
    tables: list[dict[Any, Any]] = [
        *(VARIANTS._entries, SCALARS._entries, FUNCTIONS, _BY_SPELLING, own._modules)
    ]
    held = [(table, dict(table)) for table in tables]
    yield
    for table, before in held:
        table.clear()
        table.update(before)
    forget_plans()


def formula(layer: gf.FeedForward, x: Tensor, slope: float | Tensor = 0.3) -> Tensor:
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    made: Tensor = layer.down_proj(bent(gate, slope) * up)
    return made


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("derivative", [None, d_bent])
def test_a_layer_and_its_gradients_are_the_formula_s(
    derivative: Callable[..., Tensor] | None,
) -> None:
    row = gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3}, d_phi=derivative)
    layer = gf.FeedForward(6, 10, variant=row, learnable=True, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    slope = layer.slope
    assert isinstance(slope, Tensor)
    asked = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), asked)
    theirs = torch.autograd.grad(formula(layer, x, slope).square().sum(), asked)
    for one, other in zip(ours, theirs, strict=True):
        assert close(one, other)
    assert torch.autograd.gradgradcheck(layer, x)


def test_the_gate_is_pytorch_s_and_the_products_are_the_library_s() -> None:
    row = gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    layer = gf.FeedForward(64, variant=row)
    x = torch.randn(40, 64, requires_grad=True)
    (found,) = gf.explain(layer, x)
    assert {plan.chosen for plan in found.plans.values()} <= {"linear", "torch", "onednn"}
    assert "one's own" in found.plans["inference"].against["blocks"]
    assert torch.allclose(layer(x), formula(layer, x), atol=1e-5)
    with pytest.raises(gf.GatedFFNError, match="one's own"):
        gf.FeedForward(64, variant=row, backend="blocks")(x)


def test_a_row_of_the_table_s_functions_is_taken_as_it_is_and_kernels_take_it() -> None:
    layer = gf.FeedForward(32, variant=ROW)
    (found,) = gf.explain(layer, tokens=1)
    assert "one's own" not in str(found)
    gate, up = torch.randn(2, 100, dtype=torch.float64).unbind()
    assert close(gf.functional.gating(gate, up, "softplus_glu"), nn.functional.softplus(gate) * up)
    assert gf.get_variant("Softplus-GLU") is ROW
    assert "softplus_glu" not in list(VARIANTS)  # which lists the library's own


@pytest.mark.parametrize("kind", ["Experts", "GLU", "GatedConv1d"])
def test_every_layer_takes_one(kind: str) -> None:
    row = gf.variant("bent_glu", phi=bent, psi="tanh", parameters={"slope": 0.3})
    if kind == "Experts":
        layer: nn.Module = gf.Experts(8, 6, 3, variant=row)
        index, weights = torch.tensor([[0, 2], [1, 0]]), torch.full((2, 2), 0.5)
        x = torch.randn(2, 8, requires_grad=True)
        y = layer(x, index, weights)
    elif kind == "GLU":
        x = torch.randn(4, 8, requires_grad=True)
        y = gf.GLU(row)(x)
        assert torch.allclose(y, bent(x[:, 4:], 0.3) * torch.tanh(x[:, :4]), atol=1e-6)
    else:
        x = torch.randn(2, 8, 5, requires_grad=True)
        y = gf.GatedConv1d(8, variant=row)(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_it_runs_under_autocast_and_in_half_precision() -> None:
    row = gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    layer = gf.FeedForward(16, variant=row)
    x = torch.randn(8, 16)
    exact = formula(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(x).float(), exact, atol=0.03)
    assert torch.allclose(layer.bfloat16()(x.bfloat16()).float(), exact, atol=0.03)


def test_it_compiles_whole() -> None:
    row = gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    layer = gf.FeedForward(16, variant=row)
    x = torch.randn(8, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), formula(layer, x), atol=1e-5)
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (theirs,) = torch.autograd.grad(formula(layer, x).sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_more_compiles_nothing_anew() -> None:
    layer, x = gf.FeedForward(16), torch.randn(4, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(x)
    gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    gf.get_variant("swiglu:beta=3")
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)


def test_torch_func_sees_through() -> None:
    row = gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    layer = gf.FeedForward(6, 10, variant=row, dtype=torch.float64)
    x = torch.randn(6, dtype=torch.float64)
    theirs = torch.autograd.functional.jacobian(lambda t: formula(layer, t), x)  # type: ignore[no-untyped-call]
    assert close(torch.func.jacrev(layer)(x), theirs)


def test_it_is_pickled_copied_and_loaded_where_nobody_knows_it() -> None:
    row = gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    layer = gf.FeedForward(6, variant="bent_glu:slope=0.5")
    x = torch.randn(3, 6)
    y = layer(x)
    pickled = pickle.dumps((layer, row))
    assert torch.equal(copy.deepcopy(layer)(x), y)
    for name in VARIANTS.made():
        del VARIANTS._entries[name]
    for name in SCALARS.made():
        del SCALARS._entries[name]
        del FUNCTIONS[name]
    _BY_SPELLING.pop("bentglu")
    again, same = pickle.loads(pickled)
    assert torch.equal(again(x), y)
    assert same == gf.get_variant("bent_glu")


class Block(nn.Module):
    """One of somebody's model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(bent(self.gate(x), 0.3) * self.up(x))
        return made


def test_replace_knows_it_in_another_s_model() -> None:
    model = nn.Sequential(Block(), Block())
    assert not gf.replace(model).replaced
    gf.variant("bent_glu", phi=bent, parameters={"slope": 0.3})
    x = torch.randn(3, 6)
    y = model(x)
    assert [block.variant for block in gf.replace(model).replaced] == ["bent_glu", "bent_glu"]
    assert torch.allclose(pickle.loads(pickle.dumps(model))(x), y, atol=1e-6)


def test_the_same_again_is_the_same_and_another_needs_another_name() -> None:
    def define(factor: float) -> Variant:
        return gf.variant("mine", phi=lambda x: factor * torch.sin(x))

    assert define(2.0) is define(2.0)
    with pytest.raises(UnknownVariant, match="give it another name"):
        define(3.0)

    def scaled(by: Tensor) -> Variant:
        return gf.variant("scaled", phi=lambda x: by.sum() * x)

    scale = torch.ones(2)
    assert scaled(scale) is scaled(scale)
    with pytest.raises(UnknownVariant, match="give it another name"):
        scaled(torch.ones(2))
    with pytest.raises(UnknownVariant, match="another variant in this process"):
        gf.get_variant(replace(VARIANTS["swiglu"], phi="relu"))


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"phi": lambda x: torch.softmax(x, 0)}, "each number by itself"),
        ({"phi": noisy}, "each number by itself"),
        ({"phi": lambda x: x[:1]}, "same shape"),
        ({"phi": lambda x: x.half()}, "same shape and dtype"),
        ({"phi": torch.relu_}, "changes what it is given"),
        ({"phi": torch.log}, "nan at -6.07"),
        ({"phi": bent}, "takes slope: give its default"),
        ({"phi": torch.sin, "parameters": {"slope": 0.3}}, "name the same"),
        ({"phi": lambda x, bias: x + bias, "parameters": {"bias": 0.3}}, "cannot name a param"),
        (
            {"phi": lambda x, up_proj: x + up_proj, "parameters": {"up_proj": 1}},
            "cannot name a param",
        ),
        (
            {"phi": lambda x, training: training * x, "parameters": {"training": 1}},
            "cannot name a param",
        ),
        ({"phi": bent, "parameters": {"slope": math.nan}}, "NaN"),
        ({"phi": torch.sin, "d_phi": lambda x: x.cos().sum()}, "derivative of.*same shape"),
        ({"phi": torch.sin, "d_phi": torch.sin}, "differences say.*autograd's"),
        ({"phi": "swish", "d_phi": torch.sin}, "leave it out"),
        ({"phi": "sine"}, "names a function 'sine': there are identity"),
        ({"phi": 3}, "give a function of the table by name"),
        ({"phi": torch.sin, "label": "SwiGLU"}, "a name of 'swiglu'"),
        ({"name": "My GLU", "phi": torch.sin}, "small letters"),
        ({"name": "silu", "phi": torch.sin}, "a name of 'swish'"),
        (
            {
                "phi": "sigmoid",
                "psi": lambda x, a: a * x,
                "parameters": {
                    "a": Parameter(name="a", default=1.0, meaning="of psi", learnable=True)
                },
            },
            "cannot be learned",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_made(facts: dict[str, object], says: str) -> None:
    given: dict[str, object] = {"name": "mine", **facts}
    with pytest.raises((UnknownVariant, ParameterError), match=says):
        gf.variant(**given)  # type: ignore[arg-type]
    assert "mine" not in VARIANTS.made()


def test_a_name_with_numbers_is_the_row_with_other_defaults() -> None:
    row = gf.get_variant("SwiGLU:beta=2")
    assert (row.name, row.label, row.defaults) == ("swiglu:beta=2", "SwiGLU beta=2", {"beta": 2})
    assert gf.get_variant("swiglu: beta = 2.0") is row
    assert gf.get_variant("swiglu:beta=1") is VARIANTS["swiglu"]
    assert pickle.loads(pickle.dumps(row)) is row
    gate, up = torch.randn(2, 9).unbind()
    assert torch.equal(
        gf.functional.gating(gate, up, "swiglu:beta=2"), gf.functional.gating(gate, up, beta=2)
    )
    capped = gf.get_variant("gpt-oss:limit=5,beta=1")
    assert capped.name == "swiglu_oai:beta=1,limit=5"
    assert capped.formula.endswith("beta = 1, L = limit = 5")


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("swiglu:alpha=2", ParameterError, "sets no parameter of 'swiglu', whose parameters are b"),
        ("swiglu:beta", ParameterError, "NAME:PARAMETER=NUMBER"),
        ("swiglu:beta=two", ParameterError, "must be a number"),
        ("swiglu:beta=2,beta=3", ParameterError, "twice"),
        ("powglu:m=11", ParameterError, "below 10"),
        ("relu:beta=2", ParameterError, "none"),
        ("swigul:beta=2", UnknownVariant, "did you mean swiglu"),
    ],
)
def test_a_name_with_wrong_numbers_is_refused(name: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        gf.get_variant(name)


FILE = """
import torch
import gatedffn as gf

def wave(x, height=0.5):
    return x * torch.sigmoid(x) + height * torch.sin(x)

row = gf.variant("wave_glu", phi=wave, parameters={"height": 0.5})
other = 3
"""


def test_a_file_names_one_on_a_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    row = variant_named(f"{path}:row")
    assert row.name == "wave_glu"
    assert gf.get_variant("wave_glu") is row
    work = own_workload(
        tokens=1, d_model=8, d_hidden=8, dtype="float32", training=False, variant="wave_glu"
    )
    assert work.file == f"{path}:row"  # which another process is told
    assert variant_named(f"{path}:row:height=0.7").defaults == {"height": 0.7}
    unknown = tmp_path / "unknown.py"
    unknown.write_text(FILE.replace("wave_glu", "ripple_glu"), encoding="utf-8")
    # As that process makes it, which knows neither the row nor its numbers.
    replace(work, variant="ripple_glu:height=2", file=f"{unknown}:row")
    assert VARIANTS["ripple_glu:height=2"].defaults == {"height": 2}
    assert pickle.loads(pickle.dumps(row)) is row
    (drawn,) = choose([f"surface:{row.name}"]).values()
    assert drawn().axes
    first = row.digest
    path.write_text(FILE.replace("sin", "cos"), encoding="utf-8")
    assert row.digest != first
    with pytest.raises(SettingError, match="no variant called 'other'"):
        variant_named(f"{path}:other")
    with pytest.raises(SettingError, match="there is no file"):
        variant_named(f"{tmp_path / 'missing.py'}:row")
    (tmp_path / "bad.py").write_text("1 / 0", encoding="utf-8")
    with pytest.raises(SettingError, match="cannot be run: ZeroDivisionError"):
        variant_named(f"{tmp_path / 'bad.py'}:row")


def test_a_file_is_run_for_a_command_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    with pytest.raises(UnknownVariant):
        gf.get_variant(f"{path}:row")
    assert not own._modules
