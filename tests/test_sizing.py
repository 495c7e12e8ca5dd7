"""Widths: the published ones from their rules, and equal parameters for the rest."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import rows
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatedffn import FeedForward, hidden_size
from gatedffn.errors import SettingError, UnknownVariant
from gatedffn.sizing import UNGATED_FACTOR, flops_per_token, weight_count
from gatedffn.variants import VARIANTS, Variant

sizes = st.integers(1, 20_000)
multiples = st.sampled_from([1, 2, 8, 64, 128, 256, 1024])
multipliers = st.sampled_from([1.0, 1.3, 0.5, 0.01, 1e-6, 2.0])


@pytest.mark.parametrize(
    ("d_model", "settings", "published"),
    [
        # LLaMA 7B, 13B, 33B, 65B: Touvron et al. 2023, the rule of their code.
        (4096, {"multiple_of": 256}, 11008),
        (5120, {"multiple_of": 256}, 13824),
        (6656, {"multiple_of": 256}, 17920),
        (8192, {"multiple_of": 256}, 22016),
        # LLaMA 3 8B, and LLaMA 2 and 3 70B: with their ffn_dim_multiplier.
        (4096, {"multiple_of": 1024, "multiplier": 1.3}, 14336),
        (8192, {"multiple_of": 4096, "multiplier": 1.3}, 28672),
        # Shazeer 2020, section 3.1: T5 base, gated and not.
        (768, {}, 2048),
        (768, {"variant": "geglu"}, 2048),
        (768, {"variant": "relu"}, 3072),
        # Vaswani et al. 2017, section 3.3.
        (512, {"variant": "relu"}, 2048),
        # T5 1.1 large.
        (1024, {"variant": "geglu_tanh", "multiple_of": 128}, 2816),
    ],
)
def test_published_widths(d_model: int, settings: dict[str, Any], published: int) -> None:
    assert hidden_size(d_model, **settings) == published


@rows
def test_only_whether_it_is_gated_matters(row: Variant) -> None:
    assert hidden_size(768, variant=row) == (2048 if row.gated else 3072)


@given(sizes, st.sampled_from(["relu", "swiglu"]), multiples, multipliers)
def test_the_rule(d_model: int, variant: str, multiple_of: int, multiplier: float) -> None:
    """LLaMA's code: `int(2 * hidden / 3)`, `int(multiplier * hidden)`, then up to a multiple."""
    hidden = 4 * d_model
    if variant == "swiglu":
        hidden = int(2 * hidden / 3)
    if multiplier != 1.0:
        hidden = int(multiplier * hidden)
    rounded = multiple_of * ((max(hidden, 1) + multiple_of - 1) // multiple_of)
    width = hidden_size(d_model, variant=variant, multiple_of=multiple_of, multiplier=multiplier)
    assert width == rounded
    assert width % multiple_of == 0
    assert width >= 1


@given(sizes, st.sampled_from(["relu", "swiglu"]), multiples, multipliers)
def test_the_steps_are_those_that_were_taken(
    d_model: int, variant: str, multiple_of: int, multiplier: float
) -> None:
    settings: dict[str, Any] = {
        "variant": variant,
        "multiple_of": multiple_of,
        "multiplier": multiplier,
    }
    width = hidden_size(d_model, **settings, explain=True)
    assert width.d_hidden == hidden_size(d_model, **settings)
    *steps, ratio = width.steps
    assert steps[0] == f"4 * {d_model} = {4 * d_model}"
    assert steps[-1].split()[-1] == str(width.d_hidden)
    taken = 1 + (variant == "swiglu") + (multiplier != 1.0) + (multiple_of > 1)
    assert len(steps) == taken
    assert ratio == f"weights x {width.parameter_ratio:.4f}"
    assert str(width) == " -> ".join(width.steps)


@given(sizes, st.sampled_from(["relu", "swiglu"]), multiples)
def test_the_parameter_ratio_is_exact(d_model: int, variant: str, multiple_of: int) -> None:
    width = hidden_size(d_model, variant=variant, multiple_of=multiple_of, explain=True)
    matrices = 3 if variant == "swiglu" else 2
    exact = Fraction(matrices * d_model * width.d_hidden, 2 * d_model * UNGATED_FACTOR * d_model)
    assert width.parameter_ratio == float(exact)


@given(st.integers(1, 5000))
def test_without_rounding_a_gated_layer_has_no_more_parameters(d_model: int) -> None:
    width = hidden_size(d_model, multiple_of=1, explain=True)
    ungated = weight_count(d_model, 4 * d_model, "relu")
    assert ungated - 3 * d_model < weight_count(d_model, width.d_hidden) <= ungated


@rows
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_weight_count_is_what_the_layer_has(row: Variant, bias: bool) -> None:
    layer = FeedForward(12, 20, variant=row, d_out=7, bias=bias, learnable=False)
    held = sum(parameter.numel() for parameter in layer.parameters())
    assert weight_count(12, 20, row, d_out=7, bias=bias) == held


@rows
def test_flops_are_what_pytorch_counts(row: Variant) -> None:
    layer, tokens = FeedForward(12, 20, variant=row, d_out=7), 5
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, 12))
    assert counter.get_total_flops() == tokens * flops_per_token(12, 20, row, d_out=7)


def test_the_layer_uses_the_rule() -> None:
    layer = FeedForward(100, variant="swiglu")
    assert layer.d_hidden == hidden_size(100) == 272
    assert isinstance(layer.up_proj, nn.Linear)
    assert layer.up_proj.out_features == 272


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0,), {}, "d_model is 0"),
        ((-4,), {}, "d_model is -4"),
        ((4.0,), {}, r"d_model is 4\.0"),
        ((True,), {}, "d_model is True"),
        ((4,), {"multiple_of": 0}, "multiple_of is 0"),
        ((4,), {"multiple_of": 1.5}, r"multiple_of is 1\.5"),
        ((4,), {"multiplier": 0.0}, r"multiplier is 0\.0"),
        ((4,), {"multiplier": -1.0}, r"multiplier is -1\.0"),
        ((4,), {"multiplier": float("nan")}, "multiplier is nan"),
        ((4,), {"multiplier": float("inf")}, "multiplier is inf"),
    ],
)
def test_errors(arguments: tuple[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        hidden_size(*arguments, **settings)


def test_an_unknown_variant() -> None:
    with pytest.raises(UnknownVariant, match="swiglu"):
        hidden_size(4, variant="swigul")


def test_every_row_has_a_width() -> None:
    assert all(hidden_size(1, variant=name) == 8 for name in VARIANTS)
