"""What training keeps in memory between the forward and the backward pass."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import gatedffn as gf

tokens, d_model, d_hidden = 10, 64, 176


def saved(layer: gf.FeedForward) -> int:
    """The saved activations, in numbers a token; weights are left out."""
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = layer(torch.randn(tokens, d_model))
    assert hidden.requires_grad
    return sum(kept.values()) // tokens


# Gated: x, the gate, the up branch and the hidden values; sigmoid(gate) is computed again.
assert saved(gf.FeedForward(d_model, d_hidden, variant="swiglu")) == d_model + 3 * d_hidden
# Not gated: x, the up branch and the hidden values.
assert saved(gf.FeedForward(d_model, d_hidden, variant="gelu")) == d_model + 2 * d_hidden
