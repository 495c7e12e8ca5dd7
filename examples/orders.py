"""Where is the gate? The gate is the branch that goes through the activation, in every source."""

import torch
import torch.nn.functional as F

import gatedffn as gf

gate, up = torch.randn(4, 8), torch.randn(4, 8)
hidden = gf.functional.gating(gate, up, "glu")  # sigmoid(gate) * up

# torch.nn.GLU activates the SECOND half of its input. That is our default order.
packed = torch.cat([up, gate], dim=-1)
torch.testing.assert_close(F.glu(packed), hidden)
torch.testing.assert_close(gf.GLU("glu")(packed), hidden)
torch.testing.assert_close(gf.functional.glu(packed, order="up_gate"), hidden)

# LLaMA-style packed weights (gate_up_proj, w13) put the gate FIRST.
packed = torch.cat([gate, up], dim=-1)
torch.testing.assert_close(gf.functional.glu(packed, order="gate_up"), hidden)

# Some models interleave: gate, up, gate, up, ... (gpt-oss).
packed = torch.stack([gate, up], dim=-1).flatten(-2)
torch.testing.assert_close(gf.functional.glu(packed, order="interleaved"), hidden)

# No shape shows a wrong order; only the numbers do.
wrong = gf.functional.glu(packed, order="up_gate")
assert wrong.shape == hidden.shape
assert not torch.allclose(wrong, hidden)

# Shazeer 2020 writes sigmoid(x W) * x V:      W is the gate, V is up.
# Dauphin et al. 2016 write (x W) * sigmoid(x V): V is the gate, W is up.
x, W, V = torch.randn(4, 16), torch.randn(16, 8), torch.randn(16, 8)
shazeer = torch.sigmoid(x @ W) * (x @ V)
dauphin = (x @ W) * torch.sigmoid(x @ V)
gated_linear = gf.functional.gated_linear  # takes weights as torch.nn.Linear stores them
torch.testing.assert_close(gated_linear(x, gate_weight=W.T, up_weight=V.T, variant="glu"), shazeer)
torch.testing.assert_close(gated_linear(x, gate_weight=V.T, up_weight=W.T, variant="glu"), dauphin)
assert not torch.allclose(shazeer, dauphin)
