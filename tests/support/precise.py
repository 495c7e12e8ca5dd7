"""Every scalar function with sixty digits: the truth that float64 itself is held to.

Written from the papers for mpmath, which differentiates them numerically; no derivative of the
package is trusted here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mpmath  # type: ignore[import-untyped]  # comes with torch
from mpmath import mp

DIGITS = 60


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def _swish(x: Any, beta: Any) -> Any:
    return x * _sigmoid(beta * x)


def _gelu_tanh(x: Any) -> Any:
    z = mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)
    return x * _sigmoid(2 * z)  # (1 + tanh(z)) / 2, which would use up any number of digits


def _elu(x: Any, alpha: Any) -> Any:
    return x if x > 0 else alpha * mp.expm1(x)


def _selu(x: Any) -> Any:
    scale, alpha = mp.mpf("1.0507009873554804934193349852946"), mp.mpf("1.67326324235437728481704")
    return scale * _elu(x, alpha)


def _xielu(x: Any, alpha_p: Any, alpha_n: Any) -> Any:
    return alpha_p * x**2 + x / 2 if x > 0 else alpha_n * (mp.expm1(x) - x) + x / 2


def _pow_gate(x: Any, m: Any) -> Any:
    return x ** (m / (mp.sqrt(x) + 1)) * _sigmoid(x) if x > 0 else x * _sigmoid(x)


def _expanded(gate: Any, x: Any, alpha: Any) -> Any:
    return x * (gate * (1 + 2 * alpha) - alpha)


def _clip(x: Any, limit: Any) -> Any:
    return max(-limit, min(x, limit))


def _soft_cap(x: Any, cap: Any) -> Any:
    return cap * mp.tanh(x / cap)


PRECISE: Mapping[str, Callable[..., Any]] = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "leaky_relu": lambda x, slope: x if x > 0 else slope * x,
    "sigmoid": _sigmoid,
    "tanh": mp.tanh,
    "softplus": lambda x: mp.log1p(mp.exp(x)),
    "swish": _swish,
    "capped_swish": lambda x, beta, limit: _swish(min(x, limit), beta),
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
    "hard_swish": lambda x: x * max(min(x + 3, 6), 0) / 6,
    "gelu": lambda x: x * mp.ncdf(x),
    "gelu_tanh": _gelu_tanh,
    "elu": _elu,
    "selu": _selu,
    "xielu": _xielu,
    "situ": lambda x, gate_cap: _soft_cap(x, gate_cap) * _sigmoid(x),
    "pow_gate": _pow_gate,
    "expanded_swish": lambda x, alpha: _expanded(_sigmoid(x), x, alpha),
    "expanded_gelu": lambda x, alpha: _expanded(mp.ncdf(x), x, alpha),
    "clip": _clip,
    "clip_plus_one": lambda x, limit: _clip(x, limit) + 1,
    "soft_cap": _soft_cap,
}


def precise_value(name: str, x: float, *parameters: float) -> float:
    """The function at a point, rounded once to float64."""
    with mpmath.workdps(DIGITS):
        return float(PRECISE[name](mp.mpf(x), *map(mp.mpf, parameters)))


def precise_derivative(name: str, x: float, *parameters: float, by: int = 0) -> float:
    """The derivative by argument `by` (0 is x), rounded once to float64."""

    def along(moved: Any) -> Any:
        arguments = [mp.mpf(x), *map(mp.mpf, parameters)]
        arguments[by] = moved
        return PRECISE[name](*arguments)

    at = x if by == 0 else parameters[by - 1]
    with mpmath.workdps(DIGITS):
        return float(mp.diff(along, mp.mpf(at)))
