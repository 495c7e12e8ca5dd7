"""Converting the feed-forward blocks of a checkpoint from one layout to another.

Everything else passes through byte for byte, and so do the places of the blocks: only the names of
the tensors in a block become the target's. At most one tensor is in memory at a time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from gatedffn.errors import CheckpointError, StorageError
from gatedffn.files import check_free, folder_written_aside, written_aside
from gatedffn.interop.checkpoints import left, safetensors
from gatedffn.interop.checkpoints.checkpoint import (
    CHUNK,
    Checkpoint,
    SafetensorsFile,
    Store,
)
from gatedffn.interop.checkpoints.first import FIRST, again, first_entries, to_keep
from gatedffn.interop.checkpoints.folders import copy_others, result_name, write_index
from gatedffn.interop.checkpoints.header import KEY, text
from gatedffn.interop.checkpoints.opening import open_checkpoint
from gatedffn.interop.checkpoints.plan import Plan, make_plan
from gatedffn.interop.checkpoints.verify import Error, compare
from gatedffn.storage.arguments import check_arguments
from gatedffn.storage.arithmetic import Placed, Source
from gatedffn.storage.blocks import Block, find_blocks
from gatedffn.storage.model import Layout
from gatedffn.storage.packing import get_layout

Progress = Callable[[int, int], None]
# A tensor to write: its name, dtype, shape and parts.
Written = tuple[str, str, tuple[int, ...], Iterator[Tensor]]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did."""

    source: str
    target: str
    layout_from: str
    layout_to: str
    tp: int
    blocks: tuple[str, ...]
    passed: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    variant: str | None
    errors: tuple[Error, ...] | None

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | Layout,
    layout: str | Layout | None = None,
    tp: int = 1,
    from_tp: int | None = None,
    at: str | None = None,
    experts: int | None = None,
    variant: str | None = None,
    any_width: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Writes a checkpoint whose feed-forward blocks are stored in another layout.

    Args:
        source: a safetensors or PyTorch file, an index, or a folder, of which those files are read
            that transformers would load.
        target: a safetensors file for a file, a folder for a folder; must not exist.
        to: the layout to write.
        layout: the layout that is there; None reads it from the header or from `config.json`.
        tp: tensor-parallel ranks whose parts the packed matrices shall hold one after the other.
        from_tp: the same for the source; None is what its header says, else 1.
        at: where the blocks are, as the end of a module's path such as "layers.{layer}.mlp".
        experts: their number, where the source has them flattened into another axis.
        variant: what the blocks compute; None is what the layout or `config.json` says.
        any_width: whether blocks may have other widths than `config.json` says, as those of
            pruned models have.
        verify: whether to run every block of source and result on the same input; the target
            appears only if they agree.
        progress: called with the bytes written so far and their total.

    Raises:
        LayoutError: a layout is unknown, does not fit, or cannot express the blocks.
        CheckpointError: the source is damaged, or the result differs.
        StorageError: the target exists or cannot be written.
    """
    check_arguments(
        source=source,
        target=target,
        tp=tp,
        from_tp=from_tp,
        at=at,
        experts=experts,
        any_width=any_width,
        verify=verify,
        progress=progress,
    )
    source, target = Path(source), Path(target)
    plan = make_plan(source, get_layout(to), layout, tp, from_tp, at, experts, variant, any_width)
    check_free(target)
    if not plan.checkpoint.folder and target.suffix != ".safetensors":
        raise StorageError(f"{target} must end with .safetensors: nothing else is written")
    if plan.checkpoint.folder and target.suffix == ".safetensors":
        raise StorageError(f"{plan.checkpoint.path} is a folder: {target} must be one too")
    if target.absolute().resolve().is_relative_to(plan.checkpoint.path.resolve()):
        raise StorageError(f"{target} is inside {plan.checkpoint.path}: choose another place")
    files = _files(plan, progress)
    written = _write_folder if plan.checkpoint.folder else _write_file
    notes, errors = written(plan, target, files, verify)
    return Conversion(
        source=str(source),
        target=str(target),
        layout_from=plan.layout.name,
        layout_to=plan.to.name,
        tp=tp,
        blocks=tuple(block.path for block in plan.blocks),
        passed=len(plan.checkpoint.where) - sum(len(block.placed) for block in plan.blocks),
        files=tuple(files),
        notes=(*plan.checkpoint.notes, *left.note(plan.left), *notes),
        variant=plan.variant[0] if plan.variant else None,
        errors=errors,
    )


def _files(plan: Plan, progress: Progress | None) -> dict[str, list[Written]]:
    """What to write, by file: each target tensor where the source's first one was."""
    stores = {result_name(store.path.name): store for store in plan.checkpoint.stores}
    if len(stores) < len(plan.checkpoint.stores):
        raise CheckpointError(f"{plan.checkpoint.path}: two files would get one name")
    counter = _Counter(progress)
    files: dict[str, list[Written]] = {name: [] for name in stores}
    home = {id(store): name for name, store in stores.items()}
    own = {name for block in plan.blocks for name in block.names}
    first = {} if plan.stated else {n: f for f, s in stores.items() for n in first_entries(s)}
    for name, store in plan.checkpoint.where.items():
        if name not in own:
            entry = store.entries[name]
            parts = counter.count(plan.checkpoint.parts(name), entry.size)
            files[home[id(store)]].append((name, entry.dtype, entry.shape, parts))
    for block, placed in zip(plan.blocks, plan.targets, strict=True):
        source = Source(block.placed, _fetch(plan.checkpoint, block))
        for one in placed:
            holder = block.full(source.holders[one.keys[0], one.first].name)
            dtype = plan.checkpoint.dtype(holder)
            size = _size(one) * safetensors.DTYPES[dtype] // 8
            parts = counter.count(_parts(one, source), size)
            file = first.get(block.full(one.name)) or home[id(plan.checkpoint.where[holder])]
            files[file].append((block.full(one.name), dtype, one.shape, parts))
    return {name: entries for name, entries in files.items() if entries}


def _fetch(checkpoint: Checkpoint, block: Block) -> Callable[[str, int, int], Tensor]:
    return lambda name, first, count: checkpoint.elements(block.full(name), first, count)


def _size(one: Placed) -> int:
    return one.experts * one.planes * one.rows * one.cols


def _parts(one: Placed, source: Source) -> Iterator[Tensor]:
    """A target tensor from its beginning to its end, some rows at a time."""
    step = max(1, CHUNK // one.cols)
    for expert in range(one.experts):
        for plane in range(one.planes):
            for lo in range(0, one.rows, step):
                hi = min(lo + step, one.rows)
                yield one.compose(source.rows, one.first + expert, plane, lo, hi)
    source.turned.clear()


class _Counter:
    """Counts the bytes that pass."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.done = self.total = 0

    def count(self, parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
        self.total += size
        return self._pass(parts)

    def _pass(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            yield part
            self.done += part.numel() * part.element_size()
            if self.progress is not None:
                self.progress(self.done, self.total)


def _write(plan: Plan, path: Path, store: Store, entries: list[Written]) -> None:
    """Writes a file with the metadata as it was, and what is said of the blocks, if anything is."""
    kept = dict(store.metadata) if isinstance(store, SafetensorsFile) else {"format": "pt"}
    kept = {name: said for name, said in kept.items() if name not in (KEY, FIRST)}
    if not plan.stated:
        like = again(store, [entry[:3] for entry in entries])
        safetensors.write_file(path, entries, kept, like)
        return
    kept[KEY] = text(plan.stated)
    first = to_keep(plan.checkpoint, store)
    if first is not None:
        kept[FIRST] = first
    safetensors.write_file(path, entries, kept)


Outcome = tuple[list[str], tuple[Error, ...] | None]


def _write_file(plan: Plan, target: Path, files: dict[str, list[Written]], verify: bool) -> Outcome:
    ((_, entries),) = files.items()
    with written_aside(target, new=True) as aside:
        _write(plan, aside, plan.checkpoint.stores[0], entries)
        errors = None
        if verify:
            errors = _verified(plan, Checkpoint(aside, [SafetensorsFile(aside)]))
    return [], errors


def _write_folder(
    plan: Plan, target: Path, files: dict[str, list[Written]], verify: bool
) -> Outcome:
    stores = {result_name(store.path.name): store for store in plan.checkpoint.stores}
    with folder_written_aside(target) as aside:
        weights = {}
        for name, entries in files.items():
            _write(plan, aside / name, stores[name], entries)
            weights.update({entry[0]: name for entry in entries})
        result = aside / result_name(plan.checkpoint.chosen or "")
        if plan.checkpoint.index is not None:
            write_index(plan.checkpoint, result, weights)
        notes = copy_others(plan, aside)
        errors = _verified(plan, open_checkpoint(result)) if verify else None
    return notes, errors


def _verified(plan: Plan, result: Checkpoint) -> tuple[Error, ...]:
    blocks = find_blocks(
        plan.to,
        plan.read.shapes(result),
        at=tuple(dict.fromkeys(block.place for block in plan.blocks)),
        experts=plan.blocks[0].sizes.experts if plan.to.flattened else None,
        tp=plan.tp,
    )
    return compare(plan.checkpoint, plan.blocks, result, blocks, plan.variant)
