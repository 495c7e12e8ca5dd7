"""Rounding and infinities: what the element-wise part guarantees."""

import math

import torch

import gatedffn as gf

# bfloat16 and float16: computed in float32 throughout, rounded once at the end.
gate = torch.randn(100_000, dtype=torch.bfloat16)
up = torch.randn(100_000, dtype=torch.bfloat16)
once = gf.functional.gating(gate, up, "swiglu")
twice = torch.nn.functional.silu(gate) * up  # eager PyTorch rounds after silu, and again
exact = gf.functional.gating(gate.double(), up.double(), "swiglu")


def error(hidden: torch.Tensor) -> float:
    return float((hidden.double() - exact).norm() / exact.norm())


print(f"relative error: rounded once {error(once):.1e}, twice {error(twice):.1e}")
assert once.dtype == torch.bfloat16
assert error(once) < error(twice)

# At infinity a function has its limit, and a NaN stays a NaN.
ends = torch.tensor([-math.inf, math.inf, math.nan])
torch.testing.assert_close(
    gf.functional.swish(ends), torch.tensor([0.0, math.inf, math.nan]), equal_nan=True
)
