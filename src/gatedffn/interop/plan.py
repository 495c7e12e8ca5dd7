"""What a conversion would do, and whether it can: all that is checked before a byte moves."""

from dataclasses import dataclass, replace
from pathlib import Path

from gatedffn.errors import GatedFFNError, LayoutError
from gatedffn.interop import safetensors
from gatedffn.interop.checkpoint import Checkpoint, open_checkpoint, read_config
from gatedffn.interop.configuration import (
    Config,
    Stated,
    check_width,
    layouts_of,
    lookup,
    resolve,
    stated,
    variant_of,
)
from gatedffn.layouts.arithmetic import Placed
from gatedffn.layouts.blocks import Block, find_blocks, known
from gatedffn.layouts.model import Layout
from gatedffn.layouts.packing import get_layout
from gatedffn.layouts.tensors import tensors_of


@dataclass(slots=True)
class Plan:
    """A conversion that was found to be possible."""

    checkpoint: Checkpoint
    config: Config | None
    layout: Layout
    to: Layout
    from_tp: int
    tp: int
    blocks: list[Block]
    targets: list[list[Placed]]
    variant: tuple[str, dict[str, float]] | None

    @property
    def stated(self) -> Stated:
        places = dict.fromkeys(block.place for block in self.blocks)
        return Stated(self.to.name, self.tp, tuple(places), self.origin, self.layout.beside)

    @property
    def origin(self) -> str:
        """The layout that the model's own code reads, as far as anything says it."""
        before = stated(self.checkpoint)
        return self.layout.name if before is None else before.origin

    @property
    def readable(self) -> bool:
        """Whether the architecture that the configuration names reads the result.

        Where it is stored in several layouts, each checkpoint is read as it came: two of them may
        use one name for a matrix and its transpose.
        """
        plain = self.tp == 1 or not self.to.per_rank
        known = [row.name for row in layouts_of(self.config)]
        other = self.to.name in known and self.origin not in known
        return plain and (self.to.name == self.origin or other)


def make_plan(
    source: Path,
    to: Layout,
    layout: str | Layout | None,
    tp: int,
    from_tp: int | None,
    at: str | None,
    experts: int | None,
) -> Plan:
    """The plan of a conversion, whose arguments are those of `convert`.

    Raises:
        LayoutError, CheckpointError: it is not possible.
    """
    checkpoint = open_checkpoint(source)
    config = read_config(source)
    named = None if layout is None else get_layout(layout)
    row, ranks, places = resolve(checkpoint, config, named, from_tp, None if at is None else (at,))
    for one in (row, to):
        if one.fused and row.name != to.name:
            raise LayoutError(
                f"layout {one.name!r} shares a matrix with attention, whose part would have no "
                "name in another layout"
            )
    if row.gated != to.gated:
        has, other = ("a gate", "none") if row.gated else ("no gate", "one")
        raise LayoutError(
            f"blocks of layout {row.name!r} have {has}, those of {to.name!r} {other}: they compute "
            "different things"
        )
    try:
        variant = variant_of(row, config)
    except GatedFFNError:
        # The order of the weights does not depend on it; a target of one formula does.
        if to.variants:
            raise
        variant = None
    _check_variant(row, to, None if variant is None else variant[0])
    if experts is None and row.experts is not None:
        experts = lookup(config, row.experts)
    blocks = find_blocks(row, checkpoint.shapes, at=places, experts=experts, tp=ranks)
    targets = []
    for block in blocks:
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
    return Plan(checkpoint, config, row, to, ranks, tp, blocks, targets, variant)


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
