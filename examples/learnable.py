"""Parameters of the formulas: fixed numbers, or learned."""

import torch

import gatedffn as gf

# Swish, x sigmoid(beta x): 0 is x / 2, large beta is nearly ReLU, 1 is SiLU.
x = torch.randn(8, 16)
torch.testing.assert_close(gf.Swish(beta=0.0)(x), x / 2)
torch.testing.assert_close(gf.Swish(beta=1.0)(x), torch.nn.functional.silu(x))

# One beta for each channel, learned.
swish = gf.Swish(beta=1.0, learnable=True, num_parameters=16)
swish(x).square().mean().backward()
beta = dict(swish.named_parameters())["beta"]
assert beta.shape == (16,)
assert beta.grad is not None
assert beta.grad.abs().min() > 0

# xSwiGLU learns how far its gate goes beyond [0, 1]. It starts as SwiGLU: alpha = 0.
layer = gf.FeedForward(16, variant="xswiglu")
print(layer)  # alpha=learned per layer, as its source does
plain = gf.FeedForward(16, variant="swiglu")
plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "alpha"})
torch.testing.assert_close(layer(x), plain(x))

optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
layer(x).square().mean().backward()
optimizer.step()
alpha = layer.activation_parameters()["alpha"]
assert isinstance(alpha, torch.Tensor)
assert alpha.item() != 0.0

# The same formula with beta fixed, learned once, or learned for each hidden unit.
assert gf.FeedForward(16, variant="swiglu", beta=1.5).learned is None
assert gf.FeedForward(16, variant="swiglu", learnable=True).learned == "layer"
assert gf.FeedForward(16, variant="swiglu", learnable="unit").learned == "unit"
