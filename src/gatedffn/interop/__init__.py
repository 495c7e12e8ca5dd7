"""Models and checkpoints of others: `replacing` their blocks, and converting `checkpoints`."""

from gatedffn.interop.replacing.replace import replace
from gatedffn.interop.replacing.report import Report

__all__ = ["Report", "replace"]
