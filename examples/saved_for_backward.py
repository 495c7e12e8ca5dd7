"""What training keeps in memory between the forward and the backward pass."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import gatedffn as gf

tokens, d_model, d_hidden = 10, 64, 176


def saved(layer: torch.nn.Module) -> int:
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


# Gated: x, the gate and the up branch; the hidden values are computed again.
assert saved(gf.FeedForward(d_model, d_hidden, variant="swiglu")) == d_model + 2 * d_hidden
# Not gated: x and the up branch.
assert saved(gf.FeedForward(d_model, d_hidden, variant="gelu")) == d_model + d_hidden
# Or x alone: the products are computed again too.
assert saved(gf.FeedForward(d_model, d_hidden, save="input")) == d_model


class Plain(torch.nn.Module):
    """The same layer out of PyTorch's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(d_model, d_hidden, bias=False)
        self.up = torch.nn.Linear(d_model, d_hidden, bias=False)
        self.down = torch.nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)  # type: ignore[no-any-return]


# PyTorch also keeps silu(gate) and the hidden values.
assert saved(Plain()) == d_model + 4 * d_hidden
