"""The feed-forward layer of a Transformer: wider, bent, and back."""

import torch
import torch.nn.functional as F

import gatedffn as gf

d_model, d_hidden = 64, 256  # four times as wide, as in the first Transformer
layer = gf.FeedForward(d_model, d_hidden, variant="relu")
x = torch.randn(10, d_model)  # ten tokens: each goes through by itself

up, down = layer.parameters()  # what the tutorial writes, with the weights of the layer
u = x @ up.T
y = F.relu(u) @ down.T
torch.testing.assert_close(layer(x), y)

# Where u is negative the hidden value is 0, and so is its derivative: the weights behind it learn
# nothing from this token. A unit that is negative for every token learns nothing at all.
print(f"{(u < 0).float().mean():.0%} of the hidden values are cut off")
