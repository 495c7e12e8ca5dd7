"""What a checkpoint's header says of its blocks: which places are stored in which layout."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from gatedffn.errors import CheckpointError, LayoutError
from gatedffn.interop.checkpoints.checkpoint import Checkpoint
from gatedffn.interop.checkpoints.configuration import Config, from_architecture
from gatedffn.storage.blocks import Block, is_at, known, pattern
from gatedffn.storage.model import Layout
from gatedffn.storage.rows import LAYOUTS

KEY = "gatedffn"
"""The name under which a header holds the layouts."""

MOST_NAMES = 100


@dataclass(frozen=True, slots=True)
class Stated:
    """What a header says of the blocks at some places: their layout and ranks.

    `origin` is the layout before the first conversion, which the model's own code reads; `beside`
    are names in the blocks' modules that belonged to no block there, and stayed.
    """

    layout: str
    tp: int
    at: tuple[str, ...]
    origin: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """How to read blocks of a checkpoint: the layout, the ranks, the places; None are the layout's.

    `entries` are what the header says of them; `hidden` are the tensors of which it says that they
    are stored otherwise.
    """

    layout: Layout
    tp: int
    at: tuple[str, ...] | None
    entries: tuple[Stated, ...]
    hidden: frozenset[str]

    def may_be(self, path: str) -> bool:
        """Whether a block's path is at one of its places."""
        return is_at(path, self.at or self.layout.places)

    def shapes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that blocks may be made of."""
        return {name: s for name, s in checkpoint.shapes.items() if name not in self.hidden}


def text(entries: Sequence[Stated]) -> str:
    """Entries as they are written into a header."""
    said = [asdict(entry) for entry in entries]
    for one in said:
        if not one["beside"]:
            del one["beside"]
    return json.dumps(said)


def stated(checkpoint: Checkpoint) -> tuple[Stated, ...]:
    """What the headers of a checkpoint say of its blocks; nothing where nothing was converted.

    Raises:
        CheckpointError: they contradict each other, or say it in a way that is not known.
    """
    texts = {s.metadata[KEY]: s.path.name for s in checkpoint.stores if KEY in s.metadata}
    if not texts:
        return ()
    if len(texts) > 1:
        raise CheckpointError(f"{' and '.join(texts.values())} name different layouts")
    ((said, name),) = texts.items()
    try:
        found = json.loads(said)
        if isinstance(found, list) and len(found) <= MOST_NAMES:
            return tuple(_entry(one) for one in found)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{name} states its layout in a way that is not known here")


def _entry(said: Mapping[str, object]) -> Stated:
    layout, tp, origin = said["layout"], said["tp"], said["origin"]
    if not isinstance(layout, str) or not isinstance(origin, str) or type(tp) is not int:
        raise TypeError
    return Stated(layout, tp, _texts(said["at"]), origin, _texts(said.get("beside", [])))


def _texts(names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) > MOST_NAMES:
        raise TypeError
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    return tuple(names)


def resolve(
    checkpoint: Checkpoint,
    config: Config | None,
    layout: Layout | None,
    tp: int | None,
    at: str | None,
) -> list[Read]:
    """How the blocks of a checkpoint are stored: as named, or as the header or config.json says.

    Several where the header says different things of different places, and none was named.

    Raises:
        LayoutError: nothing says it, or several layouts fit, or the header says another.
    """
    entries = stated(checkpoint)
    meant = [
        entry
        for entry in entries
        if (layout is None or entry.layout == layout.name) and (at is None or at in entry.at)
    ]
    if not meant:
        named = layout or from_architecture(checkpoint, config)
        where = None if at is None else (at,)
        return [Read(named, 1 if tp is None else tp, where, (), _hidden(checkpoint, entries))]
    groups: dict[tuple[str, int], list[Stated]] = {}
    for entry in meant:
        groups.setdefault((entry.layout, entry.tp), []).append(entry)
    found = []
    for (name, ranks), members in groups.items():
        row = layout or LAYOUTS.get(name)
        if row is None:
            raise LayoutError(f"the header names layout {name!r}, which is not known here")
        if tp is not None and tp != ranks:
            raise LayoutError(f"the header says {ranks} ranks, and {tp} were named")
        places = tuple(p for m in members for p in m.at) if at is None else (at,)
        others = [entry for entry in entries if entry not in members]
        found.append(
            Read(
                with_beside(row, members),
                ranks,
                places,
                tuple(members),
                _hidden(checkpoint, others),
            )
        )
    return found


def single(found: Sequence[Read], checkpoint: Checkpoint) -> Read:
    """The only one.

    Raises:
        LayoutError: the header says several.
    """
    if len(found) > 1:
        raise LayoutError(
            f"{checkpoint.path} holds blocks in several layouts, as its header says: "
            f"{words(e for read in found for e in read.entries)}; name the layout or the place of "
            "those to convert"
        )
    return found[0]


def words(entries: Iterable[Stated]) -> str:
    """Entries as a message has them."""
    return ", ".join(f"{entry.layout!r} at {' and '.join(entry.at)}" for entry in entries)


def with_beside(row: Layout, entries: Iterable[Stated]) -> Layout:
    """The layout with what stands beside its blocks, as a header says."""
    names = (name for entry in entries for name in entry.beside)
    return replace(row, beside=tuple(dict.fromkeys((*row.beside, *names))))


def _hidden(checkpoint: Checkpoint, entries: Collection[Stated]) -> frozenset[str]:
    """The tensors of the blocks that a header speaks of: no other layout may take them for its own.

    Of a layout that is not known here, that is all that is in their modules.
    """
    places = []
    for entry in entries:
        row = LAYOUTS.get(entry.layout)
        row = None if row is None else with_beside(row, (entry,))
        places += [(pattern(place), row) for place in entry.at]
    return frozenset(
        name
        for name in checkpoint.where
        if any(
            (match := compiled.fullmatch(name)) and (row is None or known(row, match["rest"]))
            for compiled, row in places
        )
    )


def after(
    read: Read, before: Sequence[Stated], blocks: Sequence[Block], to: Layout, tp: int
) -> tuple[Stated, ...]:
    """What the header of a result says, when blocks were converted from `read` to a layout.

    Of blocks that are stored as they were at first nothing need be said.
    """
    places = dict.fromkeys(block.place for block in blocks)
    kept = []
    for entry in before:
        left = tuple(p for p in entry.at if not (entry in read.entries and p in places))
        if left:
            kept.append(replace(entry, at=left))
    for place in places:
        origin = next((e.origin for e in read.entries if place in e.at), read.layout.name)
        if to.name == origin and tp == 1:
            continue
        entry = Stated(to.name, tp, (place,), origin, read.layout.beside)
        same = next((i for i, e in enumerate(kept) if replace(e, at=(place,)) == entry), None)
        if same is None:
            kept.append(entry)
        else:
            kept[same] = replace(entry, at=(*kept[same].at, place))
    return tuple(kept)
