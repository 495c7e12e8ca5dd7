"""What a gate does to gradients: a path that no activation bends."""

import torch

from gatedffn.functional import gating

gate = torch.full((), -4.0, requires_grad=True)
up = torch.full((), 1.0, requires_grad=True)
slopes = {}
for variant in ("gtu", "glu", "reglu", "swiglu", "bilinear"):
    hidden = gating(gate, up, variant)
    by_gate, by_up = slopes[variant] = torch.autograd.grad(hidden, (gate, up))
    print(f"{variant:8} h {hidden:+.3f}   dh/dgate {by_gate:+.3f}   dh/dup {by_up:+.3f}")
# The gate is nearly closed. GTU shrinks what goes to `up` twice: by the gate, and by tanh'. GLU
# does it once. ReGLU is shut: neither learns. Swish lets a little through. Bilinear never closes.
assert slopes["gtu"][1] < slopes["glu"][1]
assert not any(slopes["reglu"])

# Both branches are linear in x, so their product grows with its square: twice the input, four
# times the hidden value.
x = torch.tensor(50.0)
assert gating(2 * x, 2 * x, "swiglu") == 4 * gating(x, x, "swiglu")
