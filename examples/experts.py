"""A mixture of experts: the formula, the layer, a router of a few lines, and what runs."""

import torch
from torch import nn

import gatedffn as gf

tokens, d_model, d_hidden, count, slots = 10, 64, 48, 8, 2
layer = gf.Experts(d_model, d_hidden, count, variant="swiglu")
print(layer)  # Experts(8 x (64 -> 48 -> 64), variant='swiglu', beta=1)

# Which token goes through which expert is a router's to say; this is Mixtral's.
router = nn.Linear(d_model, count, bias=False)
x = torch.randn(tokens, d_model)
weights, index = router(x).softmax(-1).topk(slots)
weights = weights / weights.sum(-1, keepdim=True)
y = layer(x, index, weights)

# The formula: y[s] is the sum of weights[s, k] times what expert index[s, k] makes of x[s].
gate, up = layer.get_parameter("gate_up_proj").chunk(2, dim=1)
down = layer.down_proj
for s in range(tokens):
    total = torch.zeros(d_model)
    for k in range(slots):
        e = int(index[s, k])
        total += weights[s, k] * gf.functional.feed_forward(x[s], gate[e], up[e], down[e])
    torch.testing.assert_close(y[s], total)

# As a function of weights that lie somewhere: apart, packed, or stored (in, out).
experts = gf.functional.experts
torch.testing.assert_close(experts(x, gate, up, down, index, weights), y)
packed = torch.stack([gate, up], dim=2).flatten(1, 2)  # gate, up, gate, up, ... as gpt-oss
interleaved = experts(x, packed, None, down, index, weights, order="interleaved")
torch.testing.assert_close(interleaved, y)
stored = packed.transpose(1, 2).contiguous()  # (experts, d_model, 2 * d_hidden)
by_columns = experts(x, stored.transpose(1, 2), None, down, index, weights, order="interleaved")
torch.testing.assert_close(by_columns, y)

# The number of experts, or more, is an expert of another rank: its slot gives nothing.
mine = torch.where(index < 4, index, count)
theirs = torch.where(index < 4, count, index)
torch.testing.assert_close(layer(x, mine, weights) + layer(x, theirs, weights), y)

# Gradients: of the input, of the routing weights, and of every expert that a token went through.
y.square().sum().backward()
assert router.weight.grad is not None
grad = layer.down_proj.grad
assert grad is not None
assert all(bool(grad[e].any()) == bool((index == e).any()) for e in range(count))

# What runs, and how many experts a batch of 16 tokens goes through on average.
print(gf.explain(layer, tokens=16, slots=slots))
