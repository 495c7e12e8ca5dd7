"""Stacked feed-forward layers of which each token goes through some: experts."""

from gatedffn.ops.experts.op import BACKENDS, WEIGHS, check_options, experts
from gatedffn.ops.experts.reference import Stack

__all__ = ["BACKENDS", "WEIGHS", "Stack", "check_options", "experts"]
