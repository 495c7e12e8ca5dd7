"""The definition of the layer, in plain PyTorch; its autograd defines the gradients."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.feed_forward.products import closed_up
from gatedffn.ops.gating import reference as gating


class Weights(NamedTuple):
    """The projections, stored as `torch.nn.Linear` stores them.

    `gate` leads to the branch that goes through phi: the gate, or the up branch of a variant
    without a gate, for which `up` is None. Without `down` the hidden values are the result.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def feed_forward(x: Tensor, weights: Weights, variant: str, parameters: dict[str, Value]) -> Tensor:
    """`(phi(x W_gate^T + b) * psi(x W_up^T + b)) W_down^T + b`."""
    x = closed_up(x)
    gate = F.linear(x, weights.gate, weights.gate_bias)
    up = None
    if weights.up is not None:
        up = F.linear(x, weights.up, weights.up_bias)
    hidden = gating.gating(gate, up, variant, parameters)
    if weights.down is None:
        return hidden
    return F.linear(hidden, weights.down, weights.down_bias)
