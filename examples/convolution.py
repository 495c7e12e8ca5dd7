"""Dauphin's gated convolution: causal, so the future does not change the past."""

import torch

import gatedffn as gf
from gatedffn.convolution import NETWORKS

# Channels before length, as in torch.nn.Conv1d. An output sees 4 positions: its own and 3 before.
layer = gf.GatedConv1d(in_channels=8, out_channels=16, kernel_size=4, variant="glu")
x = torch.randn(2, 8, 20)
y = layer(x)
assert y.shape == (2, 16, 20)

changed = x.clone()
changed[:, :, 12:] = torch.randn(2, 8, 8)
torch.testing.assert_close(layer(changed)[:, :, :12], y[:, :, :12])
assert not torch.allclose(layer(changed)[:, :, 12:], y[:, :, 12:])

# The stack is residual: each block adds to what it was given.
stack = gf.GatedConvStack(8, [[(8, 4)], [(4, 1), (4, 3), (16, 1)]])
assert stack(x).shape == (2, 16, 20)
assert stack.receptive_field == 1 + 3 + 2

# The published networks, here without memory for their weights.
with torch.device("meta"):
    for name, network in NETWORKS.items():
        published = gf.GatedConvStack(network.d_embedding, network.blocks)
        count = sum(parameter.numel() for parameter in published.parameters())
        print(f"{name}: an output sees {published.receptive_field} positions; {count:,} parameters")
