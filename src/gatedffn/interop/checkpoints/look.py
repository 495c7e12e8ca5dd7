"""What a checkpoint holds, without writing anything: its blocks, and the layouts that they fit."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gatedffn.errors import GatedFFNError, LayoutError
from gatedffn.interop.checkpoints.checkpoint import Checkpoint
from gatedffn.interop.checkpoints.configuration import Config, lookup, variant_of
from gatedffn.interop.checkpoints.header import Read, resolve, stated
from gatedffn.interop.checkpoints.opening import open_checkpoint, read_config
from gatedffn.interop.checkpoints.plan import blocks_of
from gatedffn.storage.arguments import check_arguments
from gatedffn.storage.blocks import Block
from gatedffn.storage.packing import get_layout
from gatedffn.storage.rows import LAYOUTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A layout that the tensors fit: its blocks, from the first to the last, and what they hold.

    `sizes` are those of the first block in words. `held` says of each kind of tensor which
    branches it holds and in which order; `packed` that some hold both. `variant` is what the blocks
    compute, where the layout or `config.json` says it.
    """

    layout: str
    used_by: str
    blocks: int
    first: str
    last: str
    sizes: str
    held: tuple[str, ...]
    packed: bool
    variant: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found. `said` is what names the layout: the header or `config.json`, if one does.

    `provable` says that the order of gate and up follows from what is there; `why` in words.
    """

    path: str
    tensors: int
    said: str | None
    fits: tuple[Fit, ...]
    provable: bool
    why: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)


def look(source: str | Path, layout: str | None = None, *, at: str | None = None) -> Look:
    """The blocks of a checkpoint, how they are stored, and whether that is provable.

    Where neither the header nor `config.json` names the layout, it is every one that the names and
    shapes of the tensors fit.

    Args:
        source: a file, an index or a folder, as in `convert`.
        layout: only this one.
        at: where the blocks are, if elsewhere.

    Raises:
        CheckpointError: the file is damaged, missing or of a wrong kind.
        LayoutError: no layout fits; the message names the one that is nearest.

    >>> import tempfile, torch
    >>> names = [f"layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(dict.fromkeys(names, torch.eye(2)), f"{folder}/model.pt")
    ...     look(f"{folder}/model.pt", "llama").fits[0].blocks
    1
    """
    check_arguments(path=source, at=at)
    path = Path(source)
    checkpoint, config = open_checkpoint(path), read_config(path)
    named = None if layout is None else get_layout(layout)
    said: str | None = None
    reads: Sequence[Read]
    try:
        reads = resolve(checkpoint, config, named, None, at)
        if named is None:
            said = _said(checkpoint, config)
    except LayoutError as error:
        if named is not None or stated(checkpoint):
            raise
        place = None if at is None else (at,)
        reads = [Read(row, 1, place, (), frozenset()) for row in LAYOUTS.values()]
        reason = str(error)
    fits, failed = [], []
    for read in reads:
        row = read.layout
        experts = lookup(config, row.experts) if row.experts else None
        try:
            fits.append(_fit(blocks_of(read, checkpoint, experts=experts), config))
        except LayoutError as error:
            failed.append(str(error))
    if not fits:
        if len(failed) == 1:
            raise LayoutError(failed[0])
        raise LayoutError(
            f"no layout fits the tensors of {path}: {reason}; `convert --list WORD` shows the "
            "layouts, and --at names another place of the blocks"
        )
    fits.sort(key=lambda fit: -fit.blocks)
    provable, why = _order(fits, said, layout)
    return Look(
        path=str(path),
        tensors=len(checkpoint.where),
        said=said,
        fits=tuple(fits),
        provable=provable,
        why=why,
        notes=tuple(checkpoint.notes),
    )


def _said(checkpoint: Checkpoint, config: Config | None) -> str:
    if stated(checkpoint):
        return "the header of the file, which a conversion wrote"
    named = (config or {}).get("architectures") or []
    return f"config.json, by its architecture {' and '.join(map(str, named))}"


def _fit(blocks: Sequence[Block], config: Config | None) -> Fit:
    first = blocks[0]
    row, sizes = first.layout, first.sizes
    try:
        computed = variant_of(row, config)
    except GatedFFNError:  # a name that is no row's: the order does not depend on it
        computed = None
    many = "" if sizes.experts is None else f"{sizes.experts} experts of "
    return Fit(
        layout=row.name,
        used_by=row.used_by,
        blocks=len(blocks),
        first=first.path,
        last=blocks[-1].path,
        sizes=f"{many}{sizes.d_model} -> {sizes.d_hidden} -> {sizes.d_out}",
        held=tuple(
            f"{s.name}: {' and '.join(s.roles)}" + (f", {s.order}" if s.order else "")
            for s in row.stored
        ),
        packed=any(len(s.roles) > 1 for s in row.stored),
        variant=None if computed is None else computed[0],
    )


def _order(fits: Sequence[Fit], said: str | None, layout: str | None) -> tuple[bool, str]:
    if said is not None:
        return True, f"the order is provable: it is named by {said}"
    if layout is not None:
        return False, "the layout was named, and its order taken for granted"
    if len({fit.held for fit in fits}) > 1:
        return False, (
            "the layouts that fit read the same tensors differently, and no shape tells which is "
            "right: name it with --from"
        )
    if fits[0].packed:
        return False, (
            "no shape tells which half of a packed matrix is the gate: name the layout with --from"
        )
    return True, "the order is provable: gate and up are tensors of their own, told by their names"
