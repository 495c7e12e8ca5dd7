"""SwiGLU as a tutorial writes it, and the same as a layer: two thirds as wide."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedffn as gf


class Tutorial(nn.Module):
    """What many write first. Which of `a` and `b` is the gate is left open."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.both = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(a) * b)
        return y


d_model = 96
d_hidden = gf.hidden_size(d_model)  # 4 * 96 * 2 / 3: three matrices of the size of two
theirs = Tutorial(d_model, d_hidden)
ours = gf.FeedForward(d_model, variant="swiglu")
plain = gf.FeedForward(d_model, variant="relu")
sizes = [sum(p.numel() for p in layer.parameters()) for layer in (ours, plain)]
print(f"SwiGLU {sizes[0]:,} weights, ReLU {sizes[1]:,}")

# The first half is the gate.
gate, up = theirs.both.weight.chunk(2)
ours.load_state_dict(
    {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": theirs.down.weight}
)
x = torch.randn(10, d_model)
torch.testing.assert_close(ours(x), theirs(x))

# `replace` finds that out by numbers, and says it.
print(gf.replace(nn.Sequential(theirs)))
