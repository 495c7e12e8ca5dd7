"""The models of the comparison, in which only the feed-forward differs, and how they start."""

from gatedffn.compare.models.arms import arm_width, blank, build
from gatedffn.compare.models.costs import Cost, cost, mismatches
from gatedffn.compare.models.initial import initialise
from gatedffn.compare.models.mixture import counted_loads

__all__ = [
    "Cost",
    "arm_width",
    "blank",
    "build",
    "cost",
    "counted_loads",
    "initialise",
    "mismatches",
]
