"""The Transformer's feed-forward layer, gated and not: every variant, exact, in one place."""

from gatedffn import functional, layouts, paper
from gatedffn.convolution import GatedConv1d, GatedConvStack
from gatedffn.errors import GatedFFNError
from gatedffn.experts import Experts
from gatedffn.explanation import explain
from gatedffn.interop import replace
from gatedffn.layers import GLU, FeedForward, Swish
from gatedffn.mixture import MixtureFeedForward
from gatedffn.sizing import hidden_size
from gatedffn.variants import VARIANTS, Variant, get_variant

__version__ = "0.1.0"

__all__ = [
    "GLU",
    "VARIANTS",
    "Experts",
    "FeedForward",
    "GatedConv1d",
    "GatedConvStack",
    "GatedFFNError",
    "MixtureFeedForward",
    "Swish",
    "Variant",
    "explain",
    "functional",
    "get_variant",
    "hidden_size",
    "layouts",
    "paper",
    "replace",
]
