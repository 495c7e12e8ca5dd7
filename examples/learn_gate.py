"""The gated linear unit: one half of a tensor says how much of the other comes through."""

import torch
import torch.nn.functional as F

import gatedffn as gf

x = torch.randn(10, 128)
up, gate = x.chunk(2, dim=-1)  # torch.nn.functional.glu: the second half is the gate
torch.testing.assert_close(F.glu(x), up * torch.sigmoid(gate))
torch.testing.assert_close(gf.functional.glu(x), F.glu(x))

# Most models pack the other way round. Nothing fails, the numbers are other ones: so name it.
gate, up = x.chunk(2, dim=-1)
torch.testing.assert_close(
    gf.functional.glu(x, variant="swiglu", order="gate_up"), F.silu(gate) * up
)
assert not torch.allclose(F.silu(gate) * up, F.silu(up) * gate)
