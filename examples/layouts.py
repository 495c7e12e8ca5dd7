"""The weights of other layers, by the name of their layout: unpack, pack."""

import torch
from torch import nn

import gatedffn as gf


class Packed(nn.Module):
    """A layer as OLMo and many others write it: up first, then the gate, in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.ff_proj = nn.Linear(64, 2 * 176, bias=False)
        self.ff_out = nn.Linear(176, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.ff_proj(x).chunk(2, dim=-1)
        y: torch.Tensor = self.ff_out(nn.functional.silu(gate) * up)
        return y


theirs = Packed()
weights = gf.layouts.unpack(theirs.state_dict(), "olmo-original")
ours = gf.FeedForward(64, 176, variant="swiglu")
ours.load_state_dict(weights)  # gate_proj, up_proj and down_proj: strict, all are there
x = torch.randn(3, 64)
torch.testing.assert_close(ours(x), theirs(x))

# And back, or to any other layout. The names say nothing of the order; the layout's name does.
again = gf.layouts.pack(ours.state_dict(), "olmo-original")
assert torch.equal(again["ff_proj.weight"], theirs.ff_proj.weight)
print(list(gf.layouts.pack(ours.state_dict(), "gguf")))  # ffn_gate, ffn_up, ffn_down

# The right shapes in the wrong layout load too, and compute something else.
wrong = gf.FeedForward(64, 176, variant="swiglu")
swapped = {"gate_up_proj.weight": theirs.ff_proj.weight, "down_proj.weight": theirs.ff_out.weight}
wrong.load_state_dict(gf.layouts.unpack(swapped, "phi3"))
assert not torch.allclose(wrong(x), theirs(x))

# A layout that is not in the table is a row of your own.
mine = gf.layouts.Layout(
    name="mine",
    used_by="my own code: gate and up rows alternate, the rest is stored (in, out)",
    stored=(
        gf.layouts.Stored(name="w", roles=("gate", "up"), axes="p d", block=1),
        gf.layouts.Stored(name="v", roles=("down",), axes="h d"),
    ),
    places=("layers.{layer}.mine",),
)
stored = gf.layouts.pack(ours.state_dict(), mine)
assert torch.equal(stored["w"][0::2], weights["gate_proj.weight"])
assert torch.equal(stored["w"][1::2], weights["up_proj.weight"])

# Two ranks of Megatron: a plain split gives each its gate rows, then its up rows.
fc1 = gf.layouts.pack(ours.state_dict(), "megatron", tp=2)["linear_fc1.weight"]
first_gate, first_up = fc1.chunk(2)[0].chunk(2)
assert torch.equal(first_gate, weights["gate_proj.weight"][:88])
assert torch.equal(first_up, weights["up_proj.weight"][:88])
try:
    gf.layouts.pack(ours.state_dict(), "phi3", tp=2)
except gf.GatedFFNError as error:
    print(error)  # ... a plain split over 2 ranks would give the first ranks rows of gate only ...
