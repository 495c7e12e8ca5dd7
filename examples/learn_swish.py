"""Swish: u times how far it is switched on, and beta says how sharp the switch is."""

import torch
import torch.nn.functional as F

from gatedffn.functional import swish

u = torch.linspace(-6, 6, 13, requires_grad=True)
torch.testing.assert_close(swish(u), F.silu(u))  # beta = 1 is SiLU
torch.testing.assert_close(swish(u, beta=0.0), u / 2)  # a straight line
torch.testing.assert_close(swish(u, beta=100.0), F.relu(u))  # a sharp switch

# Left of 0 the derivative is small in place of 0: what is cut off can come back.
(slope,) = torch.autograd.grad(swish(u).sum(), u)
print(f"at -2 Swish has the slope {slope[4]:.3f}, ReLU 0")
