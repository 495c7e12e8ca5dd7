"""How others store feed-forward blocks, and the way from and to `FeedForward`: what users import.

The rows and the packing are in `storage`; files are read by `interop.checkpoints`.
"""

from gatedffn.interop.checkpoints.loading import load_feed_forward
from gatedffn.storage.model import Extra, Layout, Stored
from gatedffn.storage.packing import get_layout, pack, unpack
from gatedffn.storage.rows import LAYOUTS

__all__ = [
    "LAYOUTS",
    "Extra",
    "Layout",
    "Stored",
    "get_layout",
    "load_feed_forward",
    "pack",
    "unpack",
]
