"""The whole layer as one operator: both projections, gating and the projection down."""

from gatedffn.ops.feed_forward.op import BACKENDS, check_options, feed_forward
from gatedffn.ops.feed_forward.reference import Weights

__all__ = ["BACKENDS", "Weights", "check_options", "feed_forward"]
