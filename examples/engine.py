"""Which way a layer is computed here, and how to train on long inputs."""

import torch

import gatedffn as gf

layer = gf.FeedForward(256, 704)
x = torch.randn(64, 256)

# The decision that a call makes, with the milliseconds that it rests on.
print(gf.explain(layer, x))

# A way that is named computes the call or raises; "definition" is plain PyTorch.
plain = gf.FeedForward(256, 704, backend="definition")
plain.load_state_dict(layer.state_dict())
torch.testing.assert_close(layer(x), plain(x))
try:
    gf.FeedForward(256, 704, backend="few")(x)
except gf.GatedFFNError as error:
    print(error)  # backend 'few' cannot compute this call: it takes up to 32 tokens, these are 64

# Long inputs: the input alone is kept, and backward works on 4096 tokens at a time.
long = gf.FeedForward(256, 704, save="input", tile=4096)
long(torch.randn(10_000, 256)).sum().backward()
assert long.up_proj.weight.grad is not None
