"""The element-wise part of the layer: `phi(gate) * psi(up)`, or `phi(up)` without a gate."""

from gatedffn.ops.gating.op import gating

__all__ = ["gating"]
