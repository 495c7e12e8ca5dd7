"""A variant of your own: a function, and it goes wherever a variant is named."""

import torch
from torch import Tensor

import gatedffn as gf


def snake(x: Tensor, rate: float | Tensor) -> Tensor:
    return x + torch.sin(rate * x).square() / rate


snake_glu = gf.variant("snake_glu", phi=snake, parameters={"rate": 1.0})

layer = gf.FeedForward(64, variant=snake_glu)  # or variant="snake_glu", from now on
learned = gf.FeedForward(64, variant="snake_glu:rate=2", learnable=True)  # the rate is learned
x = torch.randn(10, 64)
gate, up = layer.gate_proj(x), layer.up_proj(x)
torch.testing.assert_close(layer(x), layer.down_proj(snake(gate, 1.0) * up))
print(gf.explain(layer, x))  # the products by the library, the gate by PyTorch

# Of functions that are there, kernels compute it.
softplus_glu = gf.variant("softplus_glu", phi="softplus", formula="log(1 + e^g) * u")
print(gf.functional.gating(gate, up, softplus_glu).shape)
