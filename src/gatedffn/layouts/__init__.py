"""How others store feed-forward blocks, and the way from and to the names of `FeedForward`.

`LAYOUTS` has a row for every layout, in `rows.py`; `model.py` has the words of a row, and
`arithmetic.py` the formula of the order.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from gatedffn.layouts.model import Extra, Layout, Stored
from gatedffn.layouts.packing import get_layout, pack, unpack
from gatedffn.layouts.rows import LAYOUTS

if TYPE_CHECKING:
    from gatedffn.layers import FeedForward

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


def load_feed_forward(
    path: str | Path,
    layout: str | Layout | None = None,
    layer: int | str = 0,
    *,
    expert: int | None = None,
    variant: str | None = None,
    tp: int | None = None,
    at: str | None = None,
    experts: int | None = None,
    d_hidden: int | None = None,
) -> "FeedForward":
    """A `FeedForward` with the weights of one block of a checkpoint.

    Args:
        path: a safetensors or PyTorch file, or a folder of them with an index.
        layout: its name; None reads it from the file's header or from `config.json`.
        layer: the number of a layer, or the whole path of a block's module.
        expert: the expert, where the block has some.
        variant: what it computes; None reads it from the layout or from `config.json`.
        tp: the ranks that a packed matrix holds; None is what the header says, else 1.
        at: where blocks are, as the end of a module's path such as "layers.{layer}.mlp".
        experts, d_hidden: as in `unpack`.

    Raises:
        LayoutError: the layout is unknown, ambiguous or another than the header says; the block
            does not fit to it; or it computes what `FeedForward` does not.
        CheckpointError: the file is damaged, missing or of a wrong kind.

    >>> import tempfile, torch
    >>> names = [f"layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(dict.fromkeys(names, torch.eye(2)), f"{folder}/model.pt")
    ...     load_feed_forward(f"{folder}/model.pt", "llama", variant="swiglu").d_hidden
    2
    """
    from gatedffn.interop.checkpoints.loading import load

    return load(
        Path(path),
        layout=None if layout is None else get_layout(layout),
        layer=layer,
        expert=expert,
        variant=variant,
        tp=tp,
        at=at,
        experts=experts,
        d_hidden=d_hidden,
    )
