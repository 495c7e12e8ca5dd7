"""The safetensors format: a header that is checked in full before a byte of it is believed.

A file is eight bytes with the header's length, the header in JSON, and the tensors one after the
other without gaps. Nothing is loaded but what is asked for.
"""

import contextlib
import ctypes
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedffn.errors import CheckpointError

LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
LONGEST_NAME = 1000
MOST_AXES = 64

# Bits of an element, in the order in which the format's own writer puts the dtypes, backwards.
DTYPES = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
RANKS = {name: rank for rank, name in enumerate(DTYPES)}
TORCH = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {
    **{dtype: name for name, dtype in TORCH.items()},
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.complex64: "C64",
}
# Elements are moved as whole numbers of their size: no value is ever interpreted.
WHOLE = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: its dtype as the format calls it, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds, and the header's text; `start` is where its tensors' bytes begin."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int
    text: bytes


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says of a file that cannot be read into one `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        CheckpointError: the file is missing, or its header is not one that the format allows.
    """
    with reading(path), path.open("rb") as file:
        whole = os.fstat(file.fileno()).st_size
        if whole < 8:
            raise CheckpointError(f"{path} is no safetensors file: it has {whole} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, whole - 8):
            raise CheckpointError(
                f"{path} is no sound safetensors file: its header would be {length} bytes, of "
                f"{whole - 8} that follow and {LARGEST_HEADER} that are allowed"
            )
        text = file.read(length)
    try:
        entries, metadata = parse(text, whole - 8 - length)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no sound safetensors file: {error}") from None
    return Header(entries, metadata, 8 + length, text)


def parse(text: bytes, size: int | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a header's text; `size` are the bytes that follow, if known.

    Raises:
        CheckpointError: it is not one that the format allows.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_reject)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is no JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise CheckpointError("its header is no JSON object")
    metadata = found.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("its __metadata__ must be texts by name")
    entries = {name: _entry(name, value) for name, value in found.items()}
    if size is None:
        size = max((entry.end for entry in entries.values()), default=0)
    at, last = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{name!r} ends at byte {entry.end}, and the file has {size} of tensors"
            )
        if entry.begin < at:
            raise CheckpointError(f"{name!r} overlaps {last!r}")
        if entry.begin > at:
            raise CheckpointError(f"there is a gap of {entry.begin - at} bytes before {name!r}")
        at, last = entry.end, name
    if at != size:
        raise CheckpointError(f"{size - at} bytes at its end belong to no tensor")
    return entries, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if not printable(name):
            raise CheckpointError(f"its header has a name that is none: {name[:40]!r}")
        if name in found:
            raise CheckpointError(f"its header has {name!r} twice")
        found[name] = value
    return found


def printable(name: str) -> bool:
    """Whether a name can be shown in a line of a terminal: no control characters, no endless one.

    >>> printable("model.norm.weight"), printable(chr(27))
    (True, False)
    """
    return len(name) <= LONGEST_NAME and name.isprintable()


def _reject(constant: str) -> None:
    raise CheckpointError(f"its header has {constant}, which is no JSON")


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name!r} must have dtype, shape and data_offsets, and no more")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{name!r} has dtype {str(dtype)[:40]!r}, which the format has not")
    if not _whole_numbers(shape) or len(shape) > MOST_AXES:
        raise CheckpointError(f"{name!r} has a shape that is no list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{name!r} has data_offsets that are not two whole numbers")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{name!r} ends before it begins")
    bits = prod(shape) * DTYPES[dtype]
    if bits != (end - begin) * 8:
        raise CheckpointError(
            f"{name!r} is {dtype} {tuple(shape)}, and its offsets span {end - begin} bytes"
        )
    if begin % max(DTYPES[dtype] // 8, 1):
        raise CheckpointError(
            f"{name!r} begins at byte {begin}, which is no multiple of the size of {dtype}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in value
    )


def order(name: str, dtype: str) -> tuple[int, str]:
    """The place of a tensor in a file, as the format's own writer has it: wide dtypes first."""
    return -RANKS[dtype], name


def whole(dtype: str) -> torch.dtype:
    """The dtype that moves elements of a dtype unread.

    Raises:
        CheckpointError: they are no whole bytes.
    """
    bits = DTYPES[dtype]
    if bits not in WHOLE:
        raise CheckpointError(f"{dtype} packs several elements into a byte: they cannot be moved")
    return WHOLE[bits]


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; the tensor must be kept as long as it is used."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def read(path: Path, at: int, dtype: torch.dtype, count: int) -> Tensor:
    """`count` values from byte `at` of a file on.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    tensor = torch.zeros(count, dtype=dtype)
    view = as_bytes(tensor)
    done = 0
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(at)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{path} became shorter while it was read")
            done += got
    return tensor


def header_text(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The header of tensors with their names, dtypes and shapes, as the format's own writer has it.

    Raises:
        CheckpointError: it is longer than the format allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: order(entry[0], entry[1])):
        size = prod(shape) * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(f"a header of {len(text)} bytes is more than the format allows")
    return text


def write_file(
    path: Path,
    entries: Iterable[tuple[str, str, tuple[int, ...], Iterator[Tensor]]],
    metadata: Mapping[str, str],
    like: bytes | None = None,
) -> None:
    """Writes a file: each tensor with its name, dtype, shape and the parts of its elements.

    The parts are asked for when they are written, one after the other. `like` is the text of a
    header of the same tensors, which is then the file's; the metadata is in it.

    Raises:
        CheckpointError: the parts are not as long as the shape says.
    """
    given = list(entries)
    if like is None:
        text = header_text((entry[:3] for entry in given), metadata)
        ready = sorted(given, key=lambda entry: order(entry[0], entry[1]))
    else:
        text = like
        at = {name: entry.begin for name, entry in parse(text)[0].items()}
        ready = sorted(given, key=lambda entry: at[entry[0]])
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, parts in ready:
            begin = file.tell()
            for part in parts:
                kept = part.contiguous()
                file.write(as_bytes(kept))
            if file.tell() - begin != prod(shape) * DTYPES[dtype] // 8:
                raise CheckpointError(f"{name!r} came out with {file.tell() - begin} bytes")
