"""Models and checkpoints of others: replacing their blocks, reading, converting."""

from gatedffn.interop.replace import replace
from gatedffn.interop.report import Report

__all__ = ["Report", "replace"]
