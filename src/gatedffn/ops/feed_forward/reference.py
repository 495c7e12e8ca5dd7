"""The definition of the layer, in plain PyTorch; its autograd defines the gradients."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.gating import reference as gating


class Weights(NamedTuple):
    """The projections, stored as `torch.nn.Linear` stores them.

    `activated` leads to the branch that goes through phi: the gate, or the up branch of a variant
    without a gate, for which `linear` is None. Without `down` the hidden values are the result.
    """

    activated: Tensor
    linear: Tensor | None
    down: Tensor | None
    activated_bias: Tensor | None
    linear_bias: Tensor | None
    down_bias: Tensor | None


def feed_forward(x: Tensor, weights: Weights, variant: str, parameters: dict[str, Value]) -> Tensor:
    """`(phi(x W_activated^T + b) * psi(x W_linear^T + b)) W_down^T + b`."""
    activated = F.linear(x, weights.activated, weights.activated_bias)
    linear = None
    if weights.linear is not None:
        linear = F.linear(x, weights.linear, weights.linear_bias)
    hidden = gating.gating(activated, linear, variant, parameters)
    if weights.down is None:
        return hidden
    return F.linear(hidden, weights.down, weights.down_bias)
