"""Every scalar function as one writes it in PyTorch: the yardstick of a comparison.

These are spelled on their own, from the papers or as PyTorch's own functions, and use nothing of
the package. Differentiated by autograd, in the dtype that is judged.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.variants import Variant

Value = float | Tensor


def _swish(x: Tensor, beta: Value) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _capped_swish(x: Tensor, beta: Value, limit: float) -> Tensor:
    return _swish(x.clamp(max=limit), beta)


def _leaky_relu(x: Tensor, slope: Value) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def _xielu(x: Tensor, alpha_p: Value, alpha_n: Value) -> Tensor:
    below = x.clamp(max=0)
    positive = alpha_p * x * x + 0.5 * x
    return torch.where(x > 0, positive, alpha_n * (torch.expm1(below) - below) + 0.5 * x)


def _pow_gate(x: Tensor, m: float) -> Tensor:
    # The inner `where` keeps the branch that is not taken free of infinite slopes.
    g = torch.where(x > 0, x, 1.0)
    power: Tensor = g ** (m / (g.sqrt() + 1.0))
    return torch.where(x > 0, power * torch.sigmoid(g), F.silu(x))


def _expanded_swish(x: Tensor, alpha: Value) -> Tensor:
    return x * (torch.sigmoid(x) * (1.0 + 2.0 * alpha) - alpha)


def _expanded_gelu(x: Tensor, alpha: Value) -> Tensor:
    gate: Tensor = torch.special.ndtr(x)
    return x * (gate * (1.0 + 2.0 * alpha) - alpha)


def _soft_cap(x: Tensor, up_cap: float) -> Tensor:
    return up_cap * torch.tanh(x / up_cap)


def _identity(x: Tensor) -> Tensor:
    return x.clone()


EAGER: Mapping[str, Callable[..., Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": _leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": lambda x: F.softplus(x, threshold=1e9),
    "swish": _swish,
    "capped_swish": _capped_swish,
    "mish": F.mish,
    "hard_swish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x, alpha: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0))),
    "selu": F.selu,
    "xielu": _xielu,
    "situ": lambda x, gate_cap: gate_cap * torch.tanh(x / gate_cap) * torch.sigmoid(x),
    "pow_gate": _pow_gate,
    "expanded_swish": _expanded_swish,
    "expanded_gelu": _expanded_gelu,
    "clip": lambda x, limit: x.clamp(-limit, limit),
    "clip_plus_one": lambda x, limit: x.clamp(-limit, limit) + 1.0,
    "soft_cap": _soft_cap,
}


# The parameters of each scalar function, in the order of the formula.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "leaky_relu": ("slope",),
    "swish": ("beta",),
    "capped_swish": ("beta", "limit"),
    "elu": ("alpha",),
    "xielu": ("alpha_p", "alpha_n"),
    "situ": ("gate_cap",),
    "pow_gate": ("m",),
    "expanded_swish": ("alpha",),
    "expanded_gelu": ("alpha",),
    "clip": ("limit",),
    "clip_plus_one": ("limit",),
    "soft_cap": ("up_cap",),
}


def eager_gating(
    gate: Tensor, up: Tensor | None, row: Variant, parameters: Mapping[str, Value]
) -> Tensor:
    """`phi(gate) * psi(up)` with the functions above."""
    hidden = _apply(row.phi, gate, parameters)
    if row.psi is None:
        return hidden
    assert up is not None
    return hidden * _apply(row.psi, up, parameters)


def _apply(name: str, x: Tensor, parameters: Mapping[str, Value]) -> Tensor:
    return EAGER[name](x, *(parameters[argument] for argument in ARGUMENTS.get(name, ())))
