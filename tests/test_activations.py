"""The scalar functions and their derivatives, against formulas spelled on their own."""

import math
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support.compare import assert_matches, at_least_a_unit
from support.eager import ARGUMENTS, EAGER
from support.precise import PRECISE, precise_derivative, precise_value
from torch import Tensor

from gatedffn.activations import SCALARS, Scalar, translation
from gatedffn.errors import BuildError
from gatedffn.variants import VARIANTS

scalars = pytest.mark.parametrize("name", list(SCALARS))
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Two settings of every parameter that a scalar function takes: a usual one and another.
SETTINGS: dict[str, dict[str, tuple[float, float]]] = {
    "leaky_relu": {"slope": (0.25, 0.01)},
    "swish": {"beta": (1.0, 1.702)},
    "capped_swish": {"beta": (1.702, 1.0), "limit": (7.0, 2.5)},
    "elu": {"alpha": (1.0, 0.3)},
    "xielu": {"alpha_p": (0.8, 0.2), "alpha_n": (0.8, 1.5)},
    "situ": {"gate_cap": (4.0, 1.5)},
    "pow_gate": {"m": (3.0, 1.5)},
    "expanded_swish": {"alpha": (0.0, 0.3)},
    "expanded_gelu": {"alpha": (0.0, 0.3)},
    "clip": {"limit": (7.0, 2.5)},
    "clip_plus_one": {"limit": (7.0, 2.5)},
    "soft_cap": {"up_cap": (25.0, 1.5)},
}


def setting(name: str, index: int = 0) -> tuple[float, ...]:
    return tuple(values[index] for values in SETTINGS.get(name, {}).values())


def by_parameters() -> Iterator[object]:
    for name, scalar in SCALARS.items():
        for position, parameter in enumerate(scalar.parameters):
            if parameter in scalar.by_parameter:
                yield pytest.param(name, position, parameter, id=f"{name}-{parameter}")


parameters = pytest.mark.parametrize(("name", "position", "parameter"), list(by_parameters()))


def magnitudes() -> Tensor:
    """Points of both signs, a row for each size, none of them where a function has a kink."""
    bounds = [1e-12, 1e-4, 0.3, 1.0, 3.0, 6.0, 12.0, 40.0, 300.0]
    steps = torch.linspace(0.03, 0.97, 15, dtype=torch.float64)
    rows = [low + (high - low) * steps for low, high in pairwise(bounds)]
    positive = torch.stack(rows)
    return torch.cat([positive, -positive])


def mapped(function: Callable[[float], float], x: Tensor) -> Tensor:
    values = [function(float(value)) for value in x.flatten()]
    return torch.tensor(values, dtype=torch.float64).view(x.shape)


def autograd(name: str, x: Tensor, *values: float | Tensor, by: int = 0) -> Tensor:
    """The derivative by argument `by` that PyTorch's autograd finds for the eager spelling."""
    arguments = [x, *values]
    source = torch.as_tensor(arguments[by], dtype=x.dtype).expand_as(x)
    arguments[by] = source = source.detach().clone().requires_grad_()
    output = EAGER[name](*arguments)
    (found,) = torch.autograd.grad(output, source, torch.ones_like(output))
    return found


# what there is


def test_every_function_has_an_independent_spelling() -> None:
    assert SCALARS.keys() == EAGER.keys() == PRECISE.keys()
    assert {n: s.parameters for n, s in SCALARS.items() if s.parameters} == ARGUMENTS
    assert {name: tuple(values) for name, values in SETTINGS.items()} == ARGUMENTS


def test_every_function_is_used_by_a_row_and_every_row_has_its_functions() -> None:
    used = {row.phi for row in VARIANTS.values()} | {row.psi for row in VARIANTS.values()}
    assert used - {None} == set(SCALARS)


def test_every_learnable_parameter_has_a_derivative() -> None:
    for row in VARIANTS.values():
        learnable = {parameter.name for parameter in row.parameters if parameter.learnable}
        assert learnable <= set(SCALARS[row.phi].by_parameter), row.name


@scalars
def test_the_three_spellings_take_the_same_parameters(name: str) -> None:
    scalar: Scalar = SCALARS[name]
    for function in (scalar.value, scalar.derivative, *scalar.by_parameter.values()):
        if function.__module__ == "gatedffn.activations.reference":
            assert len(signature(function).parameters) == 1 + len(scalar.parameters)


# against fifty and more digits


@scalars
@pytest.mark.parametrize("index", [0, 1], ids=["usual", "other"])
def test_value_in_float64(name: str, index: int) -> None:
    x, values = magnitudes(), setting(name, index)
    truth = mapped(lambda point: precise_value(name, point, *values), x)
    actual = SCALARS[name].value(x, *values)
    yardstick = at_least_a_unit(EAGER[name](x, *values), truth)
    assert_matches(actual, truth, yardstick, name, per_row=True)


@scalars
@pytest.mark.parametrize("index", [0, 1], ids=["usual", "other"])
def test_derivative_in_float64(name: str, index: int) -> None:
    x, values = magnitudes(), setting(name, index)
    truth = mapped(lambda point: precise_derivative(name, point, *values), x)
    actual = SCALARS[name].derivative(x, *values)
    yardstick = at_least_a_unit(autograd(name, x, *values), truth)
    assert_matches(actual, truth, yardstick, name, per_row=True)


@parameters
@pytest.mark.parametrize("index", [0, 1], ids=["usual", "other"])
def test_derivative_by_parameter_in_float64(
    name: str, position: int, parameter: str, index: int
) -> None:
    x, values = magnitudes(), setting(name, index)
    truth = mapped(lambda point: precise_derivative(name, point, *values, by=position + 1), x)
    actual = SCALARS[name].by_parameter[parameter](x, *values)
    yardstick = at_least_a_unit(autograd(name, x, *values, by=position + 1), truth)
    assert_matches(actual, truth, yardstick, parameter, per_row=True)


# every number that a half-precision tensor can hold


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype, one row for each sign and exponent."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    per_exponent = round(1 / torch.finfo(dtype).eps)
    return bits[bits.isfinite()].view(-1, per_exponent)


@scalars
@pytest.mark.parametrize("dtype", HALF_DTYPES.values(), ids=list(HALF_DTYPES))
@pytest.mark.parametrize("what", ["value", "derivative"])
def test_every_half_precision_number(name: str, dtype: torch.dtype, what: str) -> None:
    x, values = every_number(dtype), setting(name)
    function = getattr(SCALARS[name], what)
    truth = function(x.double(), *values)
    actual = function(x.float(), *values).to(dtype)
    eager = EAGER[name](x, *values) if what == "value" else autograd(name, x, *values)
    assert not actual.isnan().any()
    assert_matches(actual, truth, eager, name, per_row=True)


@parameters
@pytest.mark.parametrize("dtype", HALF_DTYPES.values(), ids=list(HALF_DTYPES))
def test_every_half_precision_number_by_parameter(
    name: str, position: int, parameter: str, dtype: torch.dtype
) -> None:
    x, values = every_number(dtype), setting(name, 1)
    function = SCALARS[name].by_parameter[parameter]
    truth = function(x.double(), *values)
    eager = autograd(name, x, *values, by=position + 1)
    actual = function(x.float(), *values).to(dtype)
    assert not actual.isnan().any()
    assert_matches(actual, truth, eager, parameter, per_row=True)


# 0, infinity, NaN

INF = math.inf
# The limits of value and slope at minus and plus infinity, and at 0 the value and the slope.
LIMITS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "identity": ((-INF, 1.0), (0.0, 1.0), (INF, 1.0)),
    "relu": ((0.0, 0.0), (0.0, 0.0), (INF, 1.0)),
    "relu2": ((0.0, 0.0), (0.0, 0.0), (INF, INF)),
    "leaky_relu": ((-INF, 0.25), (0.0, 0.25), (INF, 1.0)),
    "sigmoid": ((0.0, 0.0), (0.5, 0.25), (1.0, 0.0)),
    "tanh": ((-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)),
    "softplus": ((0.0, 0.0), (math.log(2.0), 0.5), (INF, 1.0)),
    "swish": ((0.0, 0.0), (0.0, 0.5), (INF, 1.0)),
    "capped_swish": ((0.0, 0.0), (0.0, 0.5), (7.0 / (1.0 + math.exp(-7.0 * 1.702)), 0.0)),
    "mish": ((0.0, 0.0), (0.0, 0.6), (INF, 1.0)),
    "hard_swish": ((0.0, 0.0), (0.0, 0.5), (INF, 1.0)),
    "gelu": ((0.0, 0.0), (0.0, 0.5), (INF, 1.0)),
    "gelu_tanh": ((0.0, 0.0), (0.0, 0.5), (INF, 1.0)),
    "elu": ((-1.0, 0.0), (0.0, 1.0), (INF, 1.0)),
    "selu": ((-1.7580993408473766, 0.0), (0.0, 1.7580993408473766), (INF, 1.0507009873554805)),
    "xielu": ((INF, -0.3), (0.0, 0.5), (INF, INF)),
    "situ": ((0.0, 0.0), (0.0, 0.5), (4.0, 0.0)),
    "pow_gate": ((0.0, 0.0), (0.0, 0.5), (1.0, 0.0)),
    "expanded_swish": ((0.0, 0.0), (0.0, 0.5), (INF, 1.0)),
    "expanded_gelu": ((0.0, 0.0), (0.0, 0.5), (INF, 1.0)),
    "clip": ((-7.0, 0.0), (0.0, 1.0), (7.0, 0.0)),
    "clip_plus_one": ((-6.0, 0.0), (1.0, 1.0), (8.0, 0.0)),
    "soft_cap": ((-25.0, 0.0), (0.0, 1.0), (25.0, 0.0)),
}


@scalars
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("what", ["value", "derivative"])
def test_at_zero_and_infinity(name: str, dtype: torch.dtype, what: str) -> None:
    x = torch.tensor([-INF, 0.0, -0.0, INF], dtype=dtype)
    low, zero, high = (point[what == "derivative"] for point in LIMITS[name])
    truth = torch.tensor([low, zero, zero, high], dtype=torch.float64)
    actual = getattr(SCALARS[name], what)(x, *setting(name))
    assert_matches(actual, truth, truth.to(dtype), name, per_row=True)


@scalars
def test_a_nan_stays_a_nan(name: str) -> None:
    x = torch.tensor([torch.nan])
    scalar, values = SCALARS[name], setting(name)
    assert scalar.value(x, *values).isnan().all()
    if name != "identity":  # whose slope does not depend on x
        assert scalar.derivative(x, *values).isnan().all()


@scalars
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_large_magnitudes_reach_the_limits(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, largest], dtype=dtype)
    low, _, high = LIMITS[name]
    for what, limits in zip(("value", "derivative"), zip(low, high, strict=True), strict=True):
        truth = torch.tensor(limits, dtype=torch.float64)
        reached = getattr(SCALARS[name], what)(x, *setting(name))
        on_the_way = getattr(SCALARS[name], what)(x.sign(), *setting(name))
        finite = truth.isfinite()
        yardstick = at_least_a_unit(truth, truth).to(dtype)
        assert_matches(reached[finite], truth[finite], yardstick[finite], what)
        assert (reached[~finite].abs() > on_the_way[~finite].abs()).all()
        assert torch.equal(reached[~finite].sign(), truth[~finite].sign().to(dtype))


# against PyTorch's own functions

BUILTINS: dict[str, tuple[tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "relu": ((), F.relu),
    "leaky_relu": ((0.01,), F.leaky_relu),
    "sigmoid": ((), torch.sigmoid),
    "tanh": ((), torch.tanh),
    "softplus": ((), F.softplus),
    "swish": ((1.0,), F.silu),
    "mish": ((), F.mish),
    "hard_swish": ((), F.hardswish),
    "gelu": ((), F.gelu),
    "gelu_tanh": ((), lambda x: F.gelu(x, approximate="tanh")),
    "elu": ((1.0,), F.elu),
    "selu": ((), F.selu),
}


@pytest.mark.parametrize("name", list(BUILTINS))
def test_equals_the_function_of_pytorch(name: str) -> None:
    values, builtin = BUILTINS[name]
    x = 3.0 * torch.randn(200)
    truth = builtin(x.double())
    assert_matches(SCALARS[name].value(x, *values), truth, builtin(x), name)
    doubled, single = x.double().requires_grad_(), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(builtin(doubled).sum(), doubled)
    (yardstick,) = torch.autograd.grad(builtin(single).sum(), single)
    assert_matches(SCALARS[name].derivative(x, *values), slope, yardstick, name)


# what the Swish paper says

reals = st.floats(-30.0, 30.0, allow_subnormal=False)
betas = st.floats(0.0, 8.0, allow_subnormal=False)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(reals)
def test_swish_of_beta_0_is_half_the_input(x: float) -> None:
    assert torch.equal(SCALARS["swish"].value(doubles(x), 0.0), doubles(x) / 2.0)


@given(reals)
def test_swish_of_large_beta_is_relu(x: float) -> None:
    # Nearer to 0 than this, but not at it, beta x is too small to saturate the sigmoid.
    assume(x == 0.0 or abs(x) > 1e-20)
    for dtype in (torch.float32, torch.float64):
        point = doubles(x).to(dtype)
        assert torch.equal(SCALARS["swish"].value(point, 1e30), F.relu(point))


@given(reals, betas)
def test_derivative_of_swish_in_terms_of_swish(x: float, beta: float) -> None:
    f = SCALARS["swish"].value(doubles(x), beta)
    slope = beta * f + torch.sigmoid(doubles(beta * x)) * (1.0 - beta * f)
    terms = 1.0 + abs(beta * float(f))  # of this size are the terms that may cancel
    truth = torch.cat([slope, doubles(terms)])
    actual = torch.cat([SCALARS["swish"].derivative(doubles(x), beta), doubles(terms)])
    assert_matches(actual, truth, truth * (1.0 + torch.finfo(torch.float64).eps))


def test_minimum_of_swish() -> None:
    x = torch.linspace(-5.0, 5.0, 1_000_001, dtype=torch.float64)
    lowest, index = SCALARS["swish"].value(x, 1.0).min(0)
    assert f"{lowest:.5f} at {x[index]:.4f}" == "-0.27846 at -1.2785"


def test_swish_is_gated_by_the_sigmoid_of_its_input() -> None:
    x = torch.linspace(-8.0, 8.0, 101, dtype=torch.float64)
    assert torch.equal(SCALARS["swish"].value(x, 1.3), x * SCALARS["sigmoid"].value(1.3 * x))


@pytest.mark.parametrize(
    ("name", "parameters", "same_as"),
    [("expanded_swish", (0.0,), "swish"), ("expanded_gelu", (0.0,), "gelu")],
)
def test_expanded_gate_without_expansion(
    name: str, parameters: tuple[float, ...], same_as: str
) -> None:
    x = torch.linspace(-8.0, 8.0, 101)
    others = (1.0,) if same_as == "swish" else ()
    assert torch.equal(SCALARS[name].value(x, *parameters), SCALARS[same_as].value(x, *others))


# second derivatives are taken through these formulas


@scalars
def test_the_formulas_can_be_differentiated(name: str) -> None:
    x = torch.tensor([-2.3, -0.4, 0.7, 2.2], dtype=torch.float64, requires_grad=True)
    values = setting(name, 1)
    assert torch.autograd.gradcheck(lambda t: SCALARS[name].value(t, *values), x)
    if name not in ("identity", "relu", "leaky_relu", "clip", "clip_plus_one"):  # slopes are flat
        assert torch.autograd.gradcheck(lambda t: SCALARS[name].derivative(t, *values), x)


# the translation of the kernels' spelling

SOURCE = translation.SOURCE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "statement",
    [
        "return x ** 2.0, x",
        "return x is x, x",
        "return x if x > 0.0 else 0.0, x",
        "return 2 * x, x",
        "return x, 0.0 < x < 1.0",
        "return x * HALF, x",
        "return tl.where(x > 0.0 and x < 1.0, x, 0.0), x",
        "x += 1.0; return x, x",
        "if ROUGH: return x, x",
    ],
)
def test_what_means_something_else_in_another_language_is_refused(statement: str) -> None:
    start = "def relu2(x):\n    "
    assert start in SOURCE
    source = SOURCE.replace(start, f"{start}{statement}\n    ")
    for translated in (translation.header, translation.javascript):
        with pytest.raises(BuildError, match=r"^gpu\.py, line \d+: .* has no translation to C\+\+"):
            translated(source)


def test_a_function_that_the_kernels_lack_is_named() -> None:
    source = SOURCE.replace("def swish_by_beta(", "def swish_by_slope(")
    with pytest.raises(BuildError, match=r"^gpu\.py lacks the function swish_by_beta$"):
        translation.header(source)
