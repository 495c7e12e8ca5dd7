"""What a conversion would do, and whether it can: all that is checked before a byte moves."""

from dataclasses import dataclass, replace
from pathlib import Path

from gatedffn.errors import GatedFFNError, LayoutError
from gatedffn.interop.checkpoints import safetensors
from gatedffn.interop.checkpoints.checkpoint import Checkpoint
from gatedffn.interop.checkpoints.configuration import (
    Config,
    check_gate,
    check_width,
    layouts_of,
    lookup,
    variant_of,
)
from gatedffn.interop.checkpoints.header import Read, Stated, after, resolve, single, stated, words
from gatedffn.interop.checkpoints.opening import open_checkpoint, read_config
from gatedffn.storage.arithmetic import Placed
from gatedffn.storage.blocks import Block, find_blocks, known
from gatedffn.storage.model import Layout
from gatedffn.storage.packing import get_layout
from gatedffn.storage.rows import LAYOUTS
from gatedffn.storage.tensors import tensors_of
from gatedffn.variants import get_variant


@dataclass(slots=True)
class Plan:
    """A conversion that was found to be possible."""

    checkpoint: Checkpoint
    config: Config | None
    read: Read
    to: Layout
    tp: int
    blocks: list[Block]
    targets: list[list[Placed]]
    variant: tuple[str, dict[str, float]] | None

    @property
    def layout(self) -> Layout:
        """The layout of the blocks in the source."""
        return self.read.layout

    @property
    def left(self) -> list[str]:
        """The tensors that are in none of the blocks, nor in those that the header speaks of."""
        own = {name for block in self.blocks for name in block.names} | self.read.hidden
        return [name for name in self.checkpoint.where if name not in own]

    @property
    def stated(self) -> tuple[Stated, ...]:
        """What the header of the result says."""
        return after(self.read, stated(self.checkpoint), self.blocks, self.to, self.tp)

    @property
    def unread(self) -> list[str]:
        """The layouts in the result that the architecture in the configuration does not read.

        Where it is stored in several layouts, each checkpoint is read as it came: two of them may
        use one name for a matrix and its transpose.
        """
        known = [row.name for row in layouts_of(self.config)]
        found = []
        for entry in self.stated:
            row = LAYOUTS.get(entry.layout, self.to)
            other = entry.layout in known and entry.origin not in known
            if not (entry.layout == entry.origin or other) or (entry.tp > 1 and row.per_rank):
                found.append(entry.layout)
        return list(dict.fromkeys(found))


def make_plan(
    source: Path,
    to: Layout,
    layout: str | Layout | None,
    tp: int,
    from_tp: int | None,
    at: str | None,
    experts: int | None,
    variant: str | None,
    any_width: bool,
) -> Plan:
    """The plan of a conversion, whose arguments are those of `convert`.

    Raises:
        LayoutError, CheckpointError: it is not possible.
    """
    checkpoint = open_checkpoint(source)
    config = read_config(source)
    named = None if layout is None else get_layout(layout)
    read = single(resolve(checkpoint, config, named, from_tp, at), checkpoint)
    row = read.layout
    for either in (row, to):
        if either.fused and row.name != to.name:
            raise LayoutError(
                f"layout {either.name!r} shares a matrix with attention, whose part would have no "
                "name in another layout"
            )
    if row.gated != to.gated:
        has, other = ("a gate", "none") if row.gated else ("no gate", "one")
        raise LayoutError(
            f"blocks of layout {row.name!r} have {has}, those of {to.name!r} {other}: they compute "
            "different things"
        )
    computed = _computed(row, to, config, variant)
    _check_variant(row, to, None if computed is None else computed[0])
    if experts is None and row.experts is not None:
        experts = lookup(config, row.experts)
    blocks = blocks_of(read, checkpoint, experts=experts)
    targets = []
    for block in blocks:
        if not any_width:
            check_width(block, config)
        _check_dtypes(checkpoint, block)
        try:
            targets.append(
                tensors_of(to, block.sizes, biases=block.biases, extras=block.extras, tp=tp)
            )
        except LayoutError as error:
            raise LayoutError(f"{block.path}: {error}") from None
    _check_names(checkpoint, blocks, targets)
    _check_beside(checkpoint, row, to, blocks)
    to = replace(to, beside=tuple(dict.fromkeys((*to.beside, *row.beside))))
    return Plan(checkpoint, config, read, to, tp, blocks, targets, computed)


def blocks_of(
    read: Read, checkpoint: Checkpoint, *, experts: int | None = None, d_hidden: int | None = None
) -> list[Block]:
    """The blocks of a checkpoint that are stored so.

    Raises:
        LayoutError: there is none, or the header says that they are stored otherwise.
    """
    try:
        return find_blocks(
            read.layout,
            read.shapes(checkpoint),
            at=read.at,
            experts=experts,
            d_hidden=d_hidden,
            tp=read.tp,
        )
    except LayoutError as error:
        if not read.hidden:
            raise
        raise LayoutError(
            f"{checkpoint.path} is stored as {words(stated(checkpoint))}, as its header says, not "
            f"as {read.layout.name!r}: {error}"
        ) from None


def _computed(
    row: Layout, to: Layout, config: Config | None, variant: str | None
) -> tuple[str, dict[str, float]] | None:
    """What the blocks compute, as named or as the layout or config.json says."""
    if variant is not None:
        named = get_variant(variant)
        check_gate(named.name, row)
        return named.told
    try:
        return variant_of(row, config)
    except GatedFFNError:
        # The order of the weights does not depend on it; a target of one formula does.
        if to.variants:
            raise
        return None


def _check_variant(row: Layout, to: Layout, variant: str | None) -> None:
    """Raises where the target's own code computes something else than the source's."""
    computed = (variant,) if variant else row.variants
    if to.variants and computed and not set(computed) & set(to.variants):
        raise LayoutError(
            f"blocks of layout {row.name!r} compute {' or '.join(computed)} here, and those of "
            f"{to.name!r} compute {' or '.join(to.variants)}"
        )
    if to.beyond and row.beyond != to.beyond:
        raise LayoutError(f"blocks of layout {to.name!r} compute something else: {to.beyond}")


def _check_dtypes(checkpoint: Checkpoint, block: Block) -> None:
    for one in block.placed:
        safetensors.whole(checkpoint.dtype(block.full(one.name)))
    matrices = [one for one in block.placed if one.keys[0] not in block.extras]
    dtypes = {checkpoint.dtype(block.full(one.name)) for one in matrices}
    if len(dtypes) > 1:
        raise LayoutError(
            f"{block.path} holds {' and '.join(sorted(dtypes))}: its tensors must have one dtype"
        )


def _check_beside(checkpoint: Checkpoint, row: Layout, to: Layout, blocks: list[Block]) -> None:
    """Raises where a name that stays beside a block would be a part of it in the target."""
    for block in blocks:
        for name in row.beside:
            if block.full(name) in checkpoint.where and known(to, name) and name not in to.beside:
                raise LayoutError(
                    f"{block.full(name)} is beside the block in layout {row.name!r}, and would be "
                    f"a part of it in layout {to.name!r}"
                )


def _check_names(checkpoint: Checkpoint, blocks: list[Block], targets: list[list[Placed]]) -> None:
    taken = set(checkpoint.where) - {name for block in blocks for name in block.names}
    for block, placed in zip(blocks, targets, strict=True):
        for one in placed:
            name = block.full(one.name)
            if name in taken:
                raise LayoutError(f"the result would have {name} twice")
            taken.add(name)
