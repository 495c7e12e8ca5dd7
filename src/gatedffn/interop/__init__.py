"""Other people's models: their feed-forward blocks replaced in place."""

from gatedffn.interop.replace import replace
from gatedffn.interop.report import Report

__all__ = ["Report", "replace"]
