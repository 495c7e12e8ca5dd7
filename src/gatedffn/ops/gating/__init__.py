"""The element-wise part of the layer: `phi(gate) * psi(up)`, or `phi(up)` without a gate."""

from gatedffn.ops.gating.op import gating
from gatedffn.ops.gating.packed import branches, packed_gating

__all__ = ["branches", "gating", "packed_gating"]
