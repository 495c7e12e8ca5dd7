"""The scalar functions and their derivatives in PyTorch: the definition that all else is held to.

Each function takes a floating tensor and its parameters (numbers, or tensors that broadcast).
The derivatives are analytic. At plus and minus infinity a function has its limit, and a NaN
stays a NaN. Everything is made of differentiable operations, so a second derivative can be
taken through these formulas.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.variants import FUNCTIONS, Function, Table

Value = float | Tensor

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946
TANH_GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
TANH_GELU_CUBIC = 0.044715
# Beyond it the sigmoid is 0 or 1 in every dtype, and the cube would overflow.
TANH_GELU_END = 30.0
XIELU_SLOPE = 0.5
HARD_SWISH_END = 3.0


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scalar function `value(x, **parameters)`, its derivative, and those by its parameters."""

    value: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()
    by_parameter: Mapping[str, Callable[..., Tensor]] = field(default_factory=lambda: Table({}))


def _finite(x: Tensor) -> Tensor:
    """`x` with the infinities moved to the largest numbers, so that 0 * x is 0."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


def _damped(x: Tensor, factor: Tensor) -> Tensor:
    """`x * factor` where a factor that has vanished wins over an infinite `x`."""
    return torch.where(factor == 0, 0.0, x * factor)


def _step(x: Tensor) -> Tensor:
    """1 above 0; 0 below and at 0; a NaN where `x` is one."""
    return torch.where(x > 0, 1.0, torch.where(x <= 0, 0.0, x))


def _normal_cdf(x: Tensor) -> Tensor:
    # 1 + erf(x) would cancel for negative x: at -5 in float32 it is off by a tenth.
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _normal_pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))


# identity, relu and its relatives


def identity(x: Tensor) -> Tensor:
    return x


def d_identity(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)  # clamp would have slope 1 at 0 where autograd differentiates it


def relu2(x: Tensor) -> Tensor:
    return relu(x).square()


def d_relu2(x: Tensor) -> Tensor:
    return 2.0 * relu(x)


def leaky_relu(x: Tensor, slope: Value) -> Tensor:
    return torch.where(x > 0, x, x.clamp(max=0.0) * slope)


def d_leaky_relu(x: Tensor, slope: Value) -> Tensor:
    step = _step(x)
    return step + (1.0 - step) * slope


def d_leaky_relu_slope(x: Tensor, slope: Value) -> Tensor:
    return x.clamp(max=0.0)


# the sigmoid family


def d_sigmoid(x: Tensor) -> Tensor:
    # It is even, and 1 - s cancels for large x: at 40 in float64 it is 0.
    s = torch.sigmoid(-x.abs())
    return s * (1.0 - s)


def d_tanh(x: Tensor) -> Tensor:
    return 4.0 * d_sigmoid(2.0 * x)  # 1 - tanh(x) would cancel


def softplus(x: Tensor) -> Tensor:
    # torch.nn.functional.softplus becomes the identity above 20, which float64 can tell.
    return torch.logaddexp(x, torch.zeros_like(x))


def swish(x: Tensor, beta: Value) -> Tensor:
    if torch.compiler.is_compiling() and not isinstance(beta, Tensor) and beta == 1.0:
        # The same in one operator, which a compiler knows; it has no limit at minus infinity.
        return F.silu(x.clamp(min=-torch.finfo(x.dtype).max))
    return _damped(x, torch.sigmoid(_finite(x) * beta))


def d_swish(x: Tensor, beta: Value) -> Tensor:
    z = _finite(_finite(x) * beta)
    s = torch.sigmoid(z)
    return s + z * (s * (1.0 - s))


def d_swish_beta(x: Tensor, beta: Value) -> Tensor:
    x = _finite(x)
    return x * (x * d_sigmoid(x * beta))


def capped_swish(x: Tensor, beta: Value, limit: Value) -> Tensor:
    return swish(x.clamp(max=limit), beta)


def d_capped_swish(x: Tensor, beta: Value, limit: Value) -> Tensor:
    return torch.where(x > limit, 0.0, d_swish(x, beta))


def d_capped_swish_beta(x: Tensor, beta: Value, limit: Value) -> Tensor:
    return d_swish_beta(x.clamp(max=limit), beta)


# GELU


def gelu(x: Tensor) -> Tensor:
    return _damped(x, _normal_cdf(x))


def d_gelu(x: Tensor) -> Tensor:
    return _normal_cdf(x) + _finite(x) * _normal_pdf(x)


def _tanh_gelu_argument(x: Tensor) -> Tensor:
    x = x.clamp(-TANH_GELU_END, TANH_GELU_END)
    return TANH_GELU_SCALE * (x + TANH_GELU_CUBIC * x * x * x)


def gelu_tanh(x: Tensor) -> Tensor:
    # (1 + tanh(z)) / 2 is sigmoid(2 z), which does not cancel for negative z.
    return _damped(x, torch.sigmoid(_tanh_gelu_argument(x)))


def d_gelu_tanh(x: Tensor) -> Tensor:
    slope = _finite(TANH_GELU_SCALE * (1.0 + 3.0 * TANH_GELU_CUBIC * x * x))
    z = _tanh_gelu_argument(x)
    return torch.sigmoid(z) + _finite(x) * d_sigmoid(z) * slope


# relatives of swish


def mish(x: Tensor) -> Tensor:
    return _damped(x, torch.tanh(softplus(x)))


def d_mish(x: Tensor) -> Tensor:
    rise = softplus(x)
    return torch.tanh(rise) + _finite(x) * torch.sigmoid(x) * d_tanh(rise)


def hard_swish(x: Tensor) -> Tensor:
    return _damped(
        x, (x + HARD_SWISH_END).clamp(0.0, 2.0 * HARD_SWISH_END) / (2.0 * HARD_SWISH_END)
    )


def d_hard_swish(x: Tensor) -> Tensor:
    between = (2.0 * x + HARD_SWISH_END) / (2.0 * HARD_SWISH_END)
    return torch.where(x >= HARD_SWISH_END, 1.0, torch.where(x <= -HARD_SWISH_END, 0.0, between))


# exponential below 0


def elu(x: Tensor, alpha: Value) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))


def d_elu(x: Tensor, alpha: Value) -> Tensor:
    return torch.where(x > 0, 1.0, alpha * torch.exp(x.clamp(max=0.0)))


def selu(x: Tensor) -> Tensor:
    return SELU_SCALE * elu(x, SELU_ALPHA)


def d_selu(x: Tensor) -> Tensor:
    return SELU_SCALE * d_elu(x, SELU_ALPHA)


def xielu(x: Tensor, alpha_p: Value, alpha_n: Value) -> Tensor:
    below = x.clamp(max=0.0)
    # Written so that at minus infinity no infinity is subtracted from another.
    negative = alpha_n * torch.expm1(below) - (alpha_n - XIELU_SLOPE) * below
    return torch.where(x > 0, x * (alpha_p * x + XIELU_SLOPE), negative)


def d_xielu(x: Tensor, alpha_p: Value, alpha_n: Value) -> Tensor:
    negative = alpha_n * torch.expm1(x.clamp(max=0.0))
    return torch.where(x > 0, 2.0 * alpha_p * x, negative) + XIELU_SLOPE


def d_xielu_alpha_p(x: Tensor, alpha_p: Value, alpha_n: Value) -> Tensor:
    return relu2(x)


def d_xielu_alpha_n(x: Tensor, alpha_p: Value, alpha_n: Value) -> Tensor:
    below = x.clamp(max=0.0)
    # Near 0 the difference would cancel.
    near = below * below * (0.5 + below / 6.0 + below * below / 24.0)
    return torch.where(below > -1e-3, near, torch.expm1(below) - below)


# gates of recent models


def situ(x: Tensor, gate_cap: Value) -> Tensor:
    return soft_cap(x, gate_cap) * torch.sigmoid(x)


def d_situ(x: Tensor, gate_cap: Value) -> Tensor:
    return torch.sigmoid(x) * (d_soft_cap(x, gate_cap) + soft_cap(x, gate_cap) * torch.sigmoid(-x))


def _power(x: Tensor, m: Value) -> tuple[Tensor, Tensor, Tensor]:
    """For g > 0: g, the exponent p = m / (sqrt(g) + 1), and p's derivative."""
    g = _finite(x).clamp(min=torch.finfo(x.dtype).tiny)
    root = g.sqrt()
    exponent = m / (root + 1.0)
    return g, exponent, -exponent / (2.0 * root * (root + 1.0))


def pow_gate(x: Tensor, m: Value) -> Tensor:
    g, exponent, _ = _power(x, m)
    positive = g.pow(exponent) * torch.sigmoid(g)
    return torch.where(x > 0, positive, swish(x.clamp(max=0.0), 1.0))


def d_pow_gate(x: Tensor, m: Value) -> Tensor:
    g, exponent, d_exponent = _power(x, m)
    by_exponent = g.pow(exponent) * (d_exponent * g.log() + torch.sigmoid(-g))
    by_base = exponent * g.pow(exponent - 1.0)
    positive = torch.sigmoid(g) * (by_exponent + by_base)
    return torch.where(x > 0, positive, d_swish(x.clamp(max=0.0), 1.0))


def _expanded(x: Tensor, gate: Tensor, alpha: Value) -> Tensor:
    return _damped(x, gate * (1.0 + 2.0 * alpha) - alpha)


def expanded_swish(x: Tensor, alpha: Value) -> Tensor:
    return _expanded(x, torch.sigmoid(x), alpha)


def d_expanded_swish(x: Tensor, alpha: Value) -> Tensor:
    return d_swish(x, 1.0) * (1.0 + 2.0 * alpha) - alpha


def d_expanded_swish_alpha(x: Tensor, alpha: Value) -> Tensor:
    return x * torch.tanh(0.5 * x)  # 2 sigmoid(x) - 1 would cancel near 0


def expanded_gelu(x: Tensor, alpha: Value) -> Tensor:
    return _expanded(x, _normal_cdf(x), alpha)


def d_expanded_gelu(x: Tensor, alpha: Value) -> Tensor:
    return d_gelu(x) * (1.0 + 2.0 * alpha) - alpha


def d_expanded_gelu_alpha(x: Tensor, alpha: Value) -> Tensor:
    return x * torch.erf(x * math.sqrt(0.5))


# functions of the up branch


def clip(x: Tensor, limit: Value) -> Tensor:
    return x.clamp(max=limit).clamp(min=-limit)


def d_clip(x: Tensor, limit: Value) -> Tensor:
    return torch.where(x.abs() > limit, 0.0, torch.where(x.isnan(), x, 1.0))


def clip_plus_one(x: Tensor, limit: Value) -> Tensor:
    return clip(x, limit) + 1.0


def soft_cap(x: Tensor, cap: Value) -> Tensor:
    return cap * torch.tanh(x / cap)


def d_soft_cap(x: Tensor, cap: Value) -> Tensor:
    return d_tanh(x / cap)


SCALARS: Table[Scalar] = Table(
    {
        "identity": Scalar(identity, d_identity),
        "relu": Scalar(relu, _step),
        "relu2": Scalar(relu2, d_relu2),
        "leaky_relu": Scalar(leaky_relu, d_leaky_relu, ("slope",), {"slope": d_leaky_relu_slope}),
        "sigmoid": Scalar(torch.sigmoid, d_sigmoid),
        "tanh": Scalar(torch.tanh, d_tanh),
        "softplus": Scalar(softplus, torch.sigmoid),
        "swish": Scalar(swish, d_swish, ("beta",), {"beta": d_swish_beta}),
        "capped_swish": Scalar(
            capped_swish, d_capped_swish, ("beta", "limit"), {"beta": d_capped_swish_beta}
        ),
        "mish": Scalar(mish, d_mish),
        "hard_swish": Scalar(hard_swish, d_hard_swish),
        "gelu": Scalar(gelu, d_gelu),
        "gelu_tanh": Scalar(gelu_tanh, d_gelu_tanh),
        "elu": Scalar(elu, d_elu, ("alpha",)),
        "selu": Scalar(selu, d_selu),
        "xielu": Scalar(
            xielu,
            d_xielu,
            ("alpha_p", "alpha_n"),
            {"alpha_p": d_xielu_alpha_p, "alpha_n": d_xielu_alpha_n},
        ),
        "situ": Scalar(situ, d_situ, ("gate_cap",)),
        "pow_gate": Scalar(pow_gate, d_pow_gate, ("m",)),
        "expanded_swish": Scalar(
            expanded_swish, d_expanded_swish, ("alpha",), {"alpha": d_expanded_swish_alpha}
        ),
        "expanded_gelu": Scalar(
            expanded_gelu, d_expanded_gelu, ("alpha",), {"alpha": d_expanded_gelu_alpha}
        ),
        "clip": Scalar(clip, d_clip, ("limit",)),
        "clip_plus_one": Scalar(clip_plus_one, d_clip, ("limit",)),
        "soft_cap": Scalar(soft_cap, d_soft_cap, ("up_cap",)),
    }
)
"""Every scalar function by the name that rows of the table use."""


def hold(name: str, function: Scalar) -> None:
    """Has rows name a function of a user's, which only PyTorch computes."""
    SCALARS._hold(name, function)
    FUNCTIONS[name] = Function(function.parameters, tuple(function.by_parameter))


FUNCTIONS.update(
    {name: Function(s.parameters, tuple(s.by_parameter)) for name, s in SCALARS.items()}
)
