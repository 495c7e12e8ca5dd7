"""Models and checkpoints of others: `replacing` their blocks, and converting `checkpoints`.

Importing it registers `experts_implementation="gatedffn"` with transformers, as soon as that is
imported.
"""

from gatedffn.interop.registry import register
from gatedffn.interop.replacing.replace import replace
from gatedffn.interop.replacing.report import Report

__all__ = ["Report", "replace"]

register()
