"""Gating as an operator: the right numbers, whatever the inputs look like."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import (
    Inputs,
    draw,
    dtypes,
    eager,
    gated_rows,
    gradients,
    ours,
    rows,
    shapes,
    with_gradients,
)
from support.compare import assert_matches, assert_same_special_values, same_bits
from torch import Tensor

from gatedffn.functional import gating
from gatedffn.ops.gating import reference
from gatedffn.variants import VARIANTS, Variant

learnable_rows = pytest.mark.parametrize(
    "row",
    [row for row in VARIANTS.values() if any(p.learnable for p in row.parameters)],
    ids=[row.name for row in VARIANTS.values() if any(p.learnable for p in row.parameters)],
)
Shape = tuple[int, ...]
# One row of each kind: no gate, gate, a learned parameter, two branches that saturate.
FEW = ("gelu", "geglu", "xielu", "swiglu_oai")
few_rows = pytest.mark.parametrize("row", [VARIANTS[name] for name in FEW], ids=FEW)


def judge(*draws: Inputs) -> None:
    """Holds the output and every gradient of all draws together to the truth."""
    ours = [dict(with_gradients(inputs)) for inputs in draws]
    truth = [dict(with_gradients(inputs.to(torch.float64), by_hand=True)) for inputs in draws]
    by_hand = [dict(with_gradients(inputs, by_hand=True)) for inputs in draws]
    for name in ours[0]:
        assert all(each[name].is_contiguous() for each in ours)
        actual, true, eager = (
            torch.stack([each[name] for each in results]) for results in (ours, truth, by_hand)
        )
        assert_matches(actual, true, eager, name)


def several(
    row: Variant, shape: Shape, dtype: torch.dtype, *, learned: bool = False
) -> list[Inputs]:
    """Draws that are judged together: on a few numbers eager PyTorch can be exact by luck."""
    count = min(128, max(6, 1024 // math.prod(shape)))
    return [draw(row, shape, dtype, learned=learned, seed=seed) for seed in range(count)]


# numbers


@rows
@dtypes
@shapes
def test_output_and_gradients(row: Variant, dtype: torch.dtype, shape: Shape) -> None:
    judge(*several(row, shape, dtype))


@learnable_rows
@dtypes
@shapes
def test_gradients_of_learned_parameters(row: Variant, dtype: torch.dtype, shape: Shape) -> None:
    draws = several(row, shape, dtype, learned=True)
    learnable = {parameter.name for parameter in row.parameters if parameter.learnable}
    assert learnable < set(draws[0].tensors())
    judge(*draws)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "half_of_packed": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
    "every_other": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded_row": lambda t: t[:1].expand_as(t),
    "expanded_number": lambda t: t[0, 0].expand_as(t),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


@layouts
@pytest.mark.parametrize(
    ("name", "strided"),
    [
        ("gelu", {"gate"}),
        ("xielu", {"gate"}),
        ("geglu", {"gate"}),
        ("geglu", {"up"}),
        ("swiglu_oai", {"gate", "up"}),
    ],
    ids=["gelu", "xielu", "geglu-gate", "geglu-up", "swiglu_oai-both"],
)
def test_any_strides_of_the_inputs(
    name: str, strided: set[str], layout: Callable[[Tensor], Tensor]
) -> None:
    inputs = draw(VARIANTS[name], (7, 127), torch.float32, learned=name == "xielu")
    changed: dict[str, Any] = {
        n: layout(inputs.tensors()[n].detach()).requires_grad_() for n in strided
    }
    assert not any(tensor.is_contiguous() for tensor in changed.values())
    judge(replace(inputs, **changed))


@few_rows
@layouts
def test_any_strides_of_the_incoming_gradient(
    row: Variant, layout: Callable[[Tensor], Tensor]
) -> None:
    inputs = draw(row, (5, 63), torch.float32, learned=bool(row.parameters))
    judge(replace(inputs, grad=layout(inputs.grad)))


@few_rows
def test_channels_last(row: Variant) -> None:
    inputs = draw(row, (2, 4, 3, 5), torch.float32)
    gate = inputs.gate.detach().to(memory_format=torch.channels_last).requires_grad_()
    judge(replace(inputs, gate=gate))


@gated_rows
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("narrow", ["gate", "up"])
def test_mixed_dtypes_promote_as_in_pytorch(row: Variant, half: torch.dtype, narrow: str) -> None:
    inputs = draw(row, (5, 63), torch.float32)
    assert inputs.up is not None
    name = "gate" if narrow == "gate" else "up"
    tensor = inputs.tensors()[name].detach().to(half).requires_grad_()
    changed: dict[str, Any] = {name: tensor}
    mixed = replace(inputs, **changed)
    assert ours(mixed).dtype == eager(mixed).dtype == torch.float32
    assert gradients(ours(mixed), mixed)[name].dtype == half
    judge(mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_float64_parameter_does_not_change_the_dtype(dtype: torch.dtype) -> None:
    gate, beta = torch.randn(3, 4, dtype=dtype), torch.ones(4, dtype=torch.float64)
    assert gating(gate, gate, "swiglu", beta=beta).dtype == dtype


@few_rows
@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (2, 0, 3)], ids=str)
def test_empty_inputs(row: Variant, shape: tuple[int, ...]) -> None:
    inputs = draw(row, shape, torch.float32)
    judge(inputs)
    assert all(g.shape == shape for g in gradients(ours(inputs), inputs).values())


def test_empty_batch_gives_a_learned_parameter_no_gradient() -> None:
    beta = torch.ones(4, requires_grad=True)
    hidden = gating(torch.empty(0, 4), torch.empty(0, 4), "swiglu", beta=beta)
    (gradient,) = torch.autograd.grad(hidden.sum(), beta)
    assert torch.equal(gradient, torch.zeros(4))


@rows
def test_a_scalar_tensor(row: Variant) -> None:
    inputs = draw(row, (1,), torch.float32)
    scalar = replace(
        inputs,
        gate=inputs.gate[0],
        up=None if inputs.up is None else inputs.up[0],
    )
    assert same_bits(ours(scalar), ours(inputs)[0])


@pytest.mark.parametrize(
    "shape", [(), (1,), (4,), (3, 1), (1, 4), (3, 4)], ids=["scalar", "1", "4", "3x1", "1x4", "3x4"]
)
def test_parameters_broadcast_and_their_gradients_are_summed(shape: tuple[int, ...]) -> None:
    inputs = draw(VARIANTS["swiglu"], (3, 4), torch.float32)
    beta = (1.0 + 0.3 * torch.randn(shape)).requires_grad_()
    judge(replace(inputs, parameters={"beta": beta}))


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_infinities_and_nans_are_where_the_formula_has_them(
    row: Variant, dtype: torch.dtype
) -> None:
    special = torch.tensor([-torch.inf, -2.0, 0.0, 2.0, torch.inf, torch.nan], dtype=dtype)
    gate = special[:, None].expand(6, 6)
    up = special[None, :].expand(6, 6) if row.gated else None
    inputs = Inputs(row, gate, up, row.defaults, torch.ones(6, 6))
    hidden = ours(inputs)
    truth = reference.gating(
        gate.double(), None if up is None else up.double(), row.name, row.defaults
    )
    assert_same_special_values(hidden, truth)
    assert hidden[5].isnan().all()  # a NaN in the gate
    assert not row.gated or hidden[:, 5].isnan().all()  # a NaN in the other branch
    assert hidden[1:4, 1:4].isfinite().all()


def test_twice_gives_the_same_bits() -> None:
    for row in VARIANTS.values():
        inputs = draw(row, (5, 127), torch.float32)
        first, second = dict(with_gradients(inputs)), dict(with_gradients(inputs))
        assert all(same_bits(first[name], second[name]) for name in first), row.name


def test_a_float64_call_with_a_float32_parameter_is_computed_in_float64() -> None:
    for row in VARIANTS.values():
        if not any(p.learnable for p in row.parameters):
            continue
        inputs = draw(row, (5, 7), torch.float64, learned=True)
        narrow = {
            n: v.float() if isinstance(v, Tensor) else v for n, v in inputs.parameters.items()
        }
        wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in narrow.items()}
        found, expected = (
            dict(with_gradients(replace(inputs, parameters=of))) for of in (narrow, wide)
        )
        for name in ("output", "gate", *(["up"] if row.gated else [])):
            assert same_bits(found[name], expected[name]), (row.name, name)
