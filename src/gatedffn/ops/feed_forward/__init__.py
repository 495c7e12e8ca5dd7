"""The whole layer as one operator: both projections, gating and the projection down."""

from gatedffn.ops.feed_forward.decision import Decision
from gatedffn.ops.feed_forward.op import BACKENDS, decide, feed_forward, known
from gatedffn.ops.feed_forward.reference import Weights

__all__ = ["BACKENDS", "Decision", "Weights", "decide", "feed_forward", "known"]
