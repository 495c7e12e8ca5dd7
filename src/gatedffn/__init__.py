"""The Transformer's feed-forward layer, gated and not: every variant, exact, in one place."""

from typing import TYPE_CHECKING

from gatedffn import functional, layouts, paper
from gatedffn.activations import variant
from gatedffn.convolution import GatedConv1d, GatedConvStack
from gatedffn.errors import GatedFFNError
from gatedffn.experts import Experts
from gatedffn.explanation import explain
from gatedffn.interop import replace
from gatedffn.layers import GLU, FeedForward, Swish
from gatedffn.mixture import MixtureFeedForward
from gatedffn.sizing import hidden_size
from gatedffn.variants import VARIANTS, Variant, get_variant

if TYPE_CHECKING:
    from gatedffn.parallel import parallelize
else:

    def __getattr__(name: str) -> object:
        # PyTorch's DTensor takes seconds to import: who shards a layer waits for it, nobody else.
        if name == "parallelize":
            from gatedffn.parallel import parallelize

            return parallelize
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "parallelize",
    "replace",
    "variant",
]
