"""The scalar functions in Triton, each against the definition in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from support.compare import (
    assert_matches,
    assert_same_special_values,
    at_least_a_unit,
    same_bits,
    with_what_vanishes,
)
from support.eager import ARGUMENTS
from torch import Tensor

from gatedffn.activations import SCALARS
from gatedffn.activations import gpu as functions

BLOCK = tl.constexpr(8192)
# Two settings of every parameter: a usual one and another.
SETTINGS = {
    "slope": (0.25, 0.01),
    "beta": (1.0, 1.702),
    "limit": (7.0, 2.5),
    "alpha": (0.3, 1.0),
    "alpha_p": (0.8, 0.2),
    "alpha_n": (0.8, 1.5),
    "gate_cap": (4.0, 1.5),
    "m": (3.0, 1.5),
    "up_cap": (25.0, 1.5),
}
scalars = pytest.mark.parametrize("name", list(SCALARS))
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
roughly = pytest.mark.parametrize("rough", [False, True], ids=["exactly", "roughly"])
settings = pytest.mark.parametrize("index", [0, 1], ids=["usual", "other"])


def setting(name: str, index: int) -> list[float]:
    return [SETTINGS[parameter][index] for parameter in ARGUMENTS.get(name, ())]


def _by_parameters() -> Iterator[object]:
    for name, scalar in SCALARS.items():
        for which, parameter in enumerate(scalar.parameters):
            if parameter in scalar.by_parameter:
                yield pytest.param(name, which, parameter, id=f"{name}-{parameter}")


by_parameters = pytest.mark.parametrize(("name", "which", "parameter"), list(_by_parameters()))


@triton.jit
def _evaluate(
    x, out, value, slope, p0, p1, count,
    STEP0: tl.constexpr, STEP1: tl.constexpr, NAME: tl.constexpr, WHICH: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    points = tl.load(x + at, mask=inside, other=0.0)
    first = functions.parameter(p0, STEP0, at, inside)
    second = functions.parameter(p1, STEP1, at, inside)
    if WHICH is None:
        alone = functions.value(points, first, second, NAME, ROUGH)
        made, derivative = functions.both(points, first, second, NAME, ROUGH)
        tl.store(out + at, alone, mask=inside)
        tl.store(value + at, made, mask=inside)
        tl.store(slope + at, derivative, mask=inside)
    else:
        derivative = functions.by(points, first, second, NAME, WHICH, ROUGH)
        tl.store(out + at, derivative, mask=inside)


def evaluate(
    name: str,
    x: Tensor,
    parameters: list[float] | list[Tensor],
    device: torch.device,
    rough: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and slope at `x`, and that the value alone is the same."""
    flat = x.to(device, torch.float32).reshape(-1).contiguous()
    out, value, slope = (torch.full_like(flat, torch.nan) for _ in range(3))
    _run(flat, out, value, slope, parameters, name, None, rough)
    assert same_bits(out, value)
    return value.cpu().view(x.shape), slope.cpu().view(x.shape)


def evaluate_by(
    name: str,
    which: int,
    x: Tensor,
    parameters: list[float],
    device: torch.device,
    rough: bool = False,
) -> Tensor:
    flat = x.to(device, torch.float32).reshape(-1).contiguous()
    out = torch.full_like(flat, torch.nan)
    _run(flat, out, None, None, parameters, name, which, rough)
    return out.cpu().view(x.shape)


def _run(
    x: Tensor,
    out: Tensor,
    value: Tensor | None,
    slope: Tensor | None,
    parameters: list[float] | list[Tensor],
    name: str,
    which: int | None,
    rough: bool,
) -> None:
    places = [*parameters, 0.0, 0.0][:2]
    steps = [1 if isinstance(p, Tensor) and p.numel() > 1 else 0 for p in places]
    kinds = [step if isinstance(p, Tensor) else None for p, step in zip(places, steps, strict=True)]
    grid = (triton.cdiv(x.numel(), BLOCK.value),)
    _evaluate[grid](x, out, value, slope, *places, x.numel(), *kinds, name, which, rough)


# what there is


@scalars
def test_every_function_of_the_table_is_spelled(name: str, device: torch.device) -> None:
    evaluate(name, torch.ones(3), setting(name, 0), device)


@by_parameters
def test_every_derivative_by_a_parameter_is_spelled(
    name: str, which: int, parameter: str, device: torch.device
) -> None:
    assert list(SCALARS[name].parameters).index(parameter) == which
    evaluate_by(name, which, torch.ones(3), setting(name, 0), device)


def test_a_function_that_is_not_spelled_is_named(device: torch.device) -> None:
    with pytest.raises(Exception, match="lacks the function nothing"):
        evaluate("nothing", torch.ones(3), [], device)
    with pytest.raises(Exception, match="lacks a derivative by a parameter of elu"):
        evaluate_by("elu", 0, torch.ones(3), [1.0], device)


# numbers


def judge(
    actual: Tensor, of: Callable[..., Tensor], x: Tensor, values: list[float], name: str, what: str
) -> None:
    """Holds each row of float32 numbers to the truth, at its own scale."""
    truth = of(x.double(), *values)
    yardstick = at_least_a_unit(of(x.float(), *values).to(actual.dtype), truth)
    actual = with_what_vanishes(actual, truth)
    assert_matches(actual, truth, yardstick, f"{name} {what}", per_row=True)


def magnitudes() -> Tensor:
    """Rows of numbers of both signs, each of its own size: from subnormal ones to the largest whose
    square is a number."""
    generator = torch.Generator().manual_seed(0)
    around = torch.randn((41, 255), generator=generator, dtype=torch.float64)
    scales = torch.cat([torch.linspace(-140.0, 60.0, 21), torch.linspace(-4.0, 7.0, 20)])
    return (around * 2.0 ** scales.double()[:, None]).float()


@scalars
@settings
def test_value_and_slope_at_every_size(name: str, index: int, device: torch.device) -> None:
    x, values, scalar = magnitudes(), setting(name, index), SCALARS[name]
    value, slope = evaluate(name, x, values, device)
    judge(value, scalar.value, x, values, name, "value")
    judge(slope, scalar.derivative, x, values, name, "slope")


@by_parameters
@settings
def test_derivative_by_a_parameter_at_every_size(
    name: str, which: int, parameter: str, index: int, device: torch.device
) -> None:
    x, values = magnitudes(), setting(name, index)
    of = SCALARS[name].by_parameter[parameter]
    judge(evaluate_by(name, which, x, values, device), of, x, values, name, parameter)


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype, one row for each sign and exponent."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return bits[bits.isfinite()].view(-1, round(1 / torch.finfo(dtype).eps))


@scalars
@halves
@roughly
def test_every_number_of_half_precision(
    name: str, dtype: torch.dtype, rough: bool, device: torch.device
) -> None:
    x, values, scalar = every_number(dtype), setting(name, 1), SCALARS[name]
    value, slope = evaluate(name, x, values, device, rough)
    judge(value.to(dtype), scalar.value, x, values, name, "value")
    judge(slope.to(dtype), scalar.derivative, x, values, name, "slope")


@by_parameters
@halves
@roughly
def test_every_number_of_half_precision_by_a_parameter(
    name: str, which: int, parameter: str, dtype: torch.dtype, rough: bool, device: torch.device
) -> None:
    x, values, of = every_number(dtype), setting(name, 1), SCALARS[name].by_parameter[parameter]
    found = evaluate_by(name, which, x, values, device, rough)
    judge(found.to(dtype), of, x, values, name, parameter)


# special values


def special_values() -> Tensor:
    info = torch.finfo(torch.float32)
    sizes = [0.0, info.smallest_normal / 4, info.smallest_normal, 1.0, 7.0, info.max, torch.inf]
    edges = [10.03, 10.1, 13.26, 13.3, 14.5, 87.2, 87.34, 88.0, 88.8, 89.0, 103.0, 104.0, 104.5]
    positive = torch.tensor(sizes + edges)
    return torch.cat([positive, -positive, torch.tensor([torch.nan])])


@scalars
@settings
@roughly
def test_infinities_and_nans_are_where_the_definition_has_them(
    name: str, index: int, rough: bool, device: torch.device
) -> None:
    x, values, scalar = special_values(), setting(name, index), SCALARS[name]
    value, slope = evaluate(name, x, values, device, rough)
    assert_same_special_values(value, scalar.value(x, *values).double(), "value")
    assert_same_special_values(slope, scalar.derivative(x, *values).double(), "slope")
    assert value[-1].isnan()


@scalars
@roughly
def test_the_limits_at_infinity_are_exact(name: str, rough: bool, device: torch.device) -> None:
    x, values, scalar = torch.tensor([-torch.inf, torch.inf]), setting(name, 0), SCALARS[name]
    for actual, of in zip(
        evaluate(name, x, values, device, rough), (scalar.value, scalar.derivative), strict=True
    ):
        torch.testing.assert_close(actual, of(x.double(), *values).float(), rtol=1e-6, atol=0.0)


@by_parameters
@roughly
def test_special_values_of_derivatives_by_a_parameter(
    name: str, which: int, parameter: str, rough: bool, device: torch.device
) -> None:
    x, values = special_values(), setting(name, 0)
    actual = evaluate_by(name, which, x, values, device, rough)
    expected = SCALARS[name].by_parameter[parameter](x, *values).double()
    assert_same_special_values(actual, expected, parameter)


# parameters


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_a_number_and_equal_tensors_give_the_same_bits(name: str, device: torch.device) -> None:
    x, values = torch.linspace(-9.0, 9.0, 1031), setting(name, 1)
    expected = evaluate(name, x, values, device)
    for shape in [(1,), x.shape]:
        tensors = [torch.full(shape, value, device=device) for value in values]
        found = evaluate(name, x, tensors, device)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
