"""Every variant is a row of one table, and the same layer computes them all."""

import torch

import gatedffn as gf

assert gf.get_variant("SwiGLU").name == "swiglu"  # names are forgiving
assert gf.get_variant("gelu_pytorch_tanh").name == "gelu_tanh"  # and know other libraries' words
try:
    gf.get_variant("swigul")
except gf.GatedFFNError as error:
    print(error)  # no variant is called 'swigul'; did you mean swiglu ...?

x = torch.randn(2, 10, 64)
for name, row in gf.VARIANTS.items():
    layer = gf.FeedForward(64, variant=name)
    assert layer(x).shape == x.shape
    print(f"{row.label:18} {layer.d_hidden:4} wide  h = {row.formula}")
