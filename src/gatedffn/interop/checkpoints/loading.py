"""A block of a checkpoint as a `FeedForward`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gatedffn.errors import CheckpointError, LayoutError
from gatedffn.interop.checkpoints.checkpoint import Checkpoint
from gatedffn.interop.checkpoints.configuration import check_gate, check_width, lookup, variant_of
from gatedffn.interop.checkpoints.header import resolve, stated, words
from gatedffn.interop.checkpoints.opening import open_checkpoint, read_config
from gatedffn.interop.checkpoints.plan import blocks_of
from gatedffn.interop.checkpoints.safetensors import TORCH
from gatedffn.layers import FeedForward
from gatedffn.storage.arguments import check_arguments
from gatedffn.storage.blocks import Block
from gatedffn.storage.model import PROJECTIONS, Layout
from gatedffn.storage.packing import canonical, choose, get_layout
from gatedffn.variants import get_variant

log = logging.getLogger(__name__)

# Constants of xIELU that the table has as numbers of its formula.
XIELU = {"xielu_beta": 0.5, "xielu_eps": -1e-6}


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
    any_width: bool = False,
) -> FeedForward:
    """A `FeedForward` with the weights of one block of a checkpoint.

    Args:
        path: a safetensors or PyTorch file, an index, or a folder, of which those files are read
            that transformers would load.
        layout: its name; None reads it from the file's header or from `config.json`.
        layer: the number of a layer, or the whole path of a block's module.
        expert: the expert, where the block has some.
        variant: what it computes; None reads it from the layout or from `config.json`.
        tp: the ranks that a packed matrix holds; None is what the header says, else 1.
        at: where blocks are, as the end of a module's path such as "layers.{layer}.mlp".
        experts, d_hidden: as in `unpack`.
        any_width: whether the block may have another width than `config.json` says.

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
    check_arguments(
        path=path,
        layer=layer,
        expert=expert,
        tp=1 if tp is None else tp,
        at=at,
        experts=experts,
        d_hidden=d_hidden,
        any_width=any_width,
    )
    path = Path(path)
    named = None if layout is None else get_layout(layout)
    checkpoint = open_checkpoint(path)
    for note in checkpoint.notes:
        log.warning("%s: %s", path, note)
    config = read_config(path)
    blocks = []
    for read in resolve(checkpoint, config, named, tp, at):
        row = read.layout
        if isinstance(layer, str) and read.entries and not read.may_be(layer):
            continue
        blocks += blocks_of(
            read,
            checkpoint,
            experts=lookup(config, row.experts) if experts is None and row.experts else experts,
            d_hidden=lookup(config, row.width)
            if d_hidden is None and row.fused and row.width
            else d_hidden,
        )
    if not blocks:
        raise LayoutError(
            f"{layer} is at none of the places that the header of {path} speaks of, "
            f"{words(stated(checkpoint))}: name its layout"
        )
    block = choose(blocks, layer)
    row = block.layout
    if not any_width:
        check_width(block, config)
    if row.beyond is not None:
        raise LayoutError(
            f"a block of layout {row.name!r} is not a FeedForward alone: {row.beyond}"
        )
    if variant is None:
        found = variant_of(row, config)
        if found is None:
            raise LayoutError(
                f"nothing says what a block of layout {row.name!r} computes: name the variant"
            )
        name, parameters = found
    else:
        name, parameters = get_variant(variant).told
    if block.sizes.experts is not None and expert is None:
        raise LayoutError(f"{block.path} has {block.sizes.experts} experts: name one")
    weights = read_weights(checkpoint, block, expert)
    return module(weights, block, name, parameters)


def read_weights(checkpoint: Checkpoint, block: Block, expert: int | None) -> dict[str, Tensor]:
    """The matrices and vectors of a block, canonical, in the dtype of the file.

    Raises:
        CheckpointError: a dtype that PyTorch does not compute in, or several.
    """
    dtypes = {checkpoint.dtype(name) for name in block.names}
    if len(dtypes) > 1 or not dtypes <= set(TORCH):
        raise CheckpointError(
            f"{block.path} is {', '.join(sorted(dtypes))}: a block must be one of "
            f"{', '.join(TORCH)}"
        )
    dtype = TORCH[dtypes.pop()]

    def fetch(name: str, first: int, count: int) -> Tensor:
        return checkpoint.elements(block.full(name), first, count).view(dtype)

    return canonical(block, fetch, expert)


def module(
    weights: Mapping[str, Tensor], block: Block, variant: str, parameters: Mapping[str, Any]
) -> FeedForward:
    """The layer with these weights.

    Raises:
        LayoutError: the block has something that the layer does not, or not what it needs.
    """
    check_gate(variant, block.layout)
    own = dict(weights)
    for key, constant in XIELU.items():
        if key in own and abs(float(own.pop(key)) - constant) > 0.01 * abs(constant):
            raise LayoutError(f"{block.path} has another {key} than the formula's, {constant}")
    sizes = block.sizes
    dtype = own["up_proj.weight"].dtype
    layer = FeedForward(
        sizes.d_model,
        sizes.d_hidden,
        variant=variant,
        d_out=sizes.d_out,
        bias=bool(block.biases),
        device="meta",
        dtype=dtype,
        **parameters,
    )
    for role in block.layout.roles:
        if block.biases and role not in block.biases:
            layer.get_submodule(PROJECTIONS[role]).register_parameter("bias", None)
    needed = layer.state_dict()
    left = next((key for key in own if key not in needed), None)
    if left is not None:
        raise LayoutError(f"{block.path} has a {left}, which FeedForward does not compute")
    missing = next((key for key in needed if key not in own), None)
    if missing is not None:
        raise LayoutError(f"{block.path} has no {missing}, which {variant!r} learns")
    owned = {key: tensor.contiguous().clone() for key, tensor in own.items()}
    layer.load_state_dict(owned, strict=True, assign=True)
    return layer
