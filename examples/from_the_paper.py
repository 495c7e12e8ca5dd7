"""The formulas as published, and the same with weights as PyTorch stores them."""

import torch

import gatedffn as gf
from gatedffn import paper

d_model, d_ff = 16, 40
x = torch.randn(3, d_model, dtype=torch.float64)
W = torch.randn(d_model, d_ff, dtype=torch.float64)  # papers: (in, out), x @ W
V = torch.randn(d_model, d_ff, dtype=torch.float64)
W2 = torch.randn(d_ff, d_model, dtype=torch.float64)

as_published = paper.FFN_SwiGLU(x, W, V, W2)  # (Swish_1(x W) * x V) W2, equation 6

# torch.nn.Linear stores (out, in) and computes x @ weight.T, so each weight is transposed.
as_stored = gf.functional.feed_forward(
    x, gate_weight=W.T, up_weight=V.T, down_weight=W2.T, variant="swiglu"
)
torch.testing.assert_close(as_stored, as_published)

# The same for the layer: give its three Linear modules the transposed matrices.
layer = gf.FeedForward(d_model, d_ff, variant="swiglu", dtype=torch.float64)
layer.load_state_dict({"gate_proj.weight": W.T, "up_proj.weight": V.T, "down_proj.weight": W2.T})
torch.testing.assert_close(layer(x), as_published)

# Without a gate there are two matrices: the paper's W1 is our up_weight.
torch.testing.assert_close(
    gf.functional.feed_forward(x, None, W.T, W2.T, variant="relu"), paper.FFN_ReLU(x, W, W2)
)
