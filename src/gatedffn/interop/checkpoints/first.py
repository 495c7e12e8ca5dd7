"""A file as it was before the first conversion, so that the way back ends with the same bytes.

A file that is as the format's own library writes it needs nothing. Of others, and of shards, which
a block may lie across, the header is kept as a text in the metadata.
"""

from collections.abc import Mapping, Sequence

from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoints import safetensors
from gatedffn.interop.checkpoints.checkpoint import Checkpoint, SafetensorsFile, Store
from gatedffn.interop.checkpoints.header import KEY
from gatedffn.interop.checkpoints.safetensors import Entry

FIRST = "gatedffn_first_header"
"""The name under which a header holds that of the file as it was at first."""


def to_keep(checkpoint: Checkpoint, store: Store) -> str | None:
    """The first header of a file, if without it the way back would end with other bytes."""
    if not isinstance(store, SafetensorsFile):
        return None
    if FIRST in store.metadata or KEY in store.metadata:
        return store.metadata.get(FIRST)
    if any(checkpoint.where[name] is not store for name in store.entries):
        return None  # what another file supersedes will not come back
    shapes = ((name, entry.dtype, entry.shape) for name, entry in store.entries.items())
    usual = safetensors.header_text(shapes, store.metadata) == store.text
    return None if usual and len(checkpoint.stores) == 1 else store.text.decode()


def first_entries(store: Store) -> Mapping[str, Entry]:
    """What a file held at first, as far as it is kept.

    Raises:
        CheckpointError: what is kept is no header.
    """
    if FIRST not in store.metadata:
        return {}
    try:
        return safetensors.parse(store.metadata[FIRST].encode())[0]
    except CheckpointError as error:
        raise CheckpointError(f"{store.path} keeps a first header that is none: {error}") from None


def again(store: Store, entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes | None:
    """The first header of a file, if these are the tensors that it held."""
    held = {name: (entry.dtype, entry.shape) for name, entry in first_entries(store).items()}
    same = held == {name: (dtype, shape) for name, dtype, shape in entries}
    return store.metadata[FIRST].encode() if held and same else None
