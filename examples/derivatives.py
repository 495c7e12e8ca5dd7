"""The derivatives of docs/maths.md, held against those that backward computes."""

import math

import torch
from torch import Tensor

import gatedffn as gf

x = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)


def slope(variant: str) -> Tensor:
    """phi'(x) of the variant: for a gated one, of its gate where psi(up) is 1."""
    if gf.get_variant(variant).gated:
        one = torch.ones_like(x)
        y = gf.functional.gating(x, one, variant)
        y = y / gf.functional.gating(one, one, variant) * phi_of_one[variant]
    else:
        y = gf.functional.activation(x, variant)
    return torch.autograd.grad(y.sum(), x)[0]


z = x.detach()
s, t = torch.sigmoid(z), torch.tanh(z)
cdf = 0.5 * torch.erfc(-z / math.sqrt(2))  # Phi, of the standard normal distribution
pdf = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
sigmoid_of_one, k = 1 / (1 + math.exp(-1)), 1.702
sk = torch.sigmoid(k * z)
c, cubic = math.sqrt(2 / math.pi), 0.044715
tanh_of = torch.tanh(c * (z + cubic * z**3))
r = z.clamp(min=1e-12).sqrt()
p = 3 / (r + 1)

phi_of_one = {
    "swiglu_oai": 1 / (1 + math.exp(-k)),
    "situ_glu": 4 * math.tanh(1 / 4) * sigmoid_of_one,
    "powglu": sigmoid_of_one,
}
written = {
    "relu": torch.where(z > 0, 1.0, 0.0 * z),
    "relu2": 2 * z.clamp(min=0),
    "leaky_relu": torch.where(z > 0, 1.0, 0.01 + 0.0 * z),
    "elu": torch.where(z > 0, 1.0, z.exp()),
    "selu": 1.0507009873554805 * torch.where(z > 0, 1.0, 1.6732632423543772 * z.exp()),
    "softplus": s,
    "sigmoid": s * (1 - s),
    "tanh": 1 - t**2,
    "swish": s + z * s * (1 - s),
    "quick_gelu": sk + k * z * sk * (1 - sk),
    "gelu": cdf + z * pdf,
    "gelu_tanh": (1 + tanh_of) / 2 + z / 2 * (1 - tanh_of**2) * c * (1 + 3 * cubic * z**2),
    "xielu": torch.where(z > 0, 2 * 0.8 * z, 0.8 * (z.exp() - 1)) + 0.5,
    "swiglu_oai": torch.where(z > 7, 0.0, sk + k * z * sk * (1 - sk)),
    "situ_glu": (1 - torch.tanh(z / 4) ** 2) * s + 4 * torch.tanh(z / 4) * s * (1 - s),
    "powglu": torch.where(
        z > 0,
        r ** (2 * p) * s * (p / r**2 - 3 * torch.log(r) / (r * (r + 1) ** 2) + 1 - s),
        s + z * s * (1 - s),
    ),
}
for variant, formula in written.items():
    assert torch.allclose(slope(variant), formula, rtol=1e-9, atol=1e-12), variant

# Swish is lowest, -0.2785, at -1.2785; its slope reaches 1.0998 at 2.3994.
swish = gf.functional.swish(z)
assert math.isclose(float(swish.min()), -0.27846, abs_tol=1e-5)
assert math.isclose(float(z[swish.argmin()]), -1.2785, abs_tol=1e-4)
assert math.isclose(float(slope("swish").max()), 1.09984, abs_tol=1e-5)
assert math.isclose(float(z[slope("swish").argmax()]), 2.3994, abs_tol=1e-4)

# GELU is lowest, -0.1700, at -0.7518; its slope reaches 1.1289 at sqrt(2).
gelu = gf.functional.activation(z, "gelu")
assert math.isclose(float(gelu.min()), -0.16997, abs_tol=1e-5)
assert math.isclose(float(z[gelu.argmin()]), -0.7518, abs_tol=1e-4)
assert math.isclose(float(slope("gelu").max()), 1.12890, abs_tol=1e-5)
assert math.isclose(float(z[slope("gelu").argmax()]), math.sqrt(2), abs_tol=1e-4)

# The gate of PowGLU, m = 3, is highest at 12.9 and falls from there.
g = torch.linspace(0.01, 1000, 100_000, dtype=torch.float64)
gate = gf.functional.gating(g, torch.ones_like(g), "powglu")
assert math.isclose(float(gate.max()), 5.316, abs_tol=1e-3)
assert math.isclose(float(g[gate.argmax()]), 12.90, abs_tol=0.01)

# The two approximations of GELU are off by up to 0.0005 and 0.02.
for name, most in (("gelu_tanh", 4.73e-4), ("quick_gelu", 2.03e-2)):
    apart = float((gf.functional.activation(z, name) - gelu).abs().max())
    assert math.isclose(apart, most, rel_tol=0.01)
    print(f"{name} differs from GELU by at most {apart:.2e}")
