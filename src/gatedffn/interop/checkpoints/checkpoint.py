"""Checkpoints: a safetensors or PyTorch file, or several of them with an index."""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gatedffn.errors import CheckpointError, first_line
from gatedffn.interop.checkpoints import safetensors
from gatedffn.interop.checkpoints.safetensors import DTYPES, NAMES, Entry

CHUNK = 1 << 19  # elements moved at a time: few enough that their memory is used again
MOST_SHOWN = 3


class Store(Protocol):
    """A file of tensors."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def elements(self, name: str, first: int, count: int) -> Tensor:
        """Elements of a tensor, flat, as whole numbers of their size."""
        ...


class SafetensorsFile:
    """A safetensors file, read in ranges.

    Raises:
        CheckpointError: its header is not sound.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = safetensors.read_header(path)
        self.entries, self.metadata, self.start = header.entries, header.metadata, header.start
        self.text = header.text

    def elements(self, name: str, first: int, count: int) -> Tensor:
        dtype = safetensors.whole(self.entries[name].dtype)
        return self.read(name, first * dtype.itemsize, dtype, count)

    def read(self, name: str, at: int, dtype: torch.dtype, count: int) -> Tensor:
        """`count` values of a dtype, from byte `at` of a tensor on."""
        begin = self.start + self.entries[name].begin + at
        return safetensors.read(self.path, begin, dtype, count)


def _reason(error: Exception) -> str:
    """Why PyTorch refused a file, without its advice to read it unsafely."""
    found = re.search(r"WeightsUnpickler error: (.+?)(?=\. |\.?$)", str(error), re.M)
    return found[1] if found else first_line(error).partition(". This file can still")[0]


class TorchFile:
    """A file that `torch.save` wrote, read with `weights_only=True` alone and mapped, not loaded.

    Raises:
        CheckpointError: it holds anything but a flat dictionary of tensors, or cannot be read so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            if not zipfile.is_zipfile(path):
                raise CheckpointError(
                    f"{path} is no file of torch.save, or one of before PyTorch 1.6: load it with "
                    "weights_only=True and save it again"
                )
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle makes the reader raise nearly anything
            raise CheckpointError(
                f"{path} does not load with weights_only=True: {_reason(error)}"
            ) from None
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{path} holds {name!r} of type {type(tensor).__name__}: save the state dict "
                    "of tensors alone"
                )
            if not safetensors.printable(name):
                raise CheckpointError(f"{path} has a name that is none: {name[:40]!r}")
            if tensor.dtype not in NAMES or tensor.layout != torch.strided:
                raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}, {tensor.layout}")
            if tensor.device.type != "cpu":
                raise CheckpointError(f"{path}: {name!r} is on {tensor.device}: it has no values")
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path}: {name!r} is {tuple(tensor.shape)}, more than is stored: save it "
                    "contiguous"
                )
        self.tensors: dict[str, Tensor] = found
        self.last: tuple[str, Tensor] | None = None
        self.entries: Mapping[str, Entry] = {
            name: Entry(NAMES[t.dtype], tuple(t.shape), 0, t.numel() * t.element_size())
            for name, t in found.items()
        }

    def elements(self, name: str, first: int, count: int) -> Tensor:
        dtype = safetensors.whole(self.entries[name].dtype)
        if self.last is None or self.last[0] != name:
            # One that is not contiguous is copied, once for all its parts.
            plain = self.tensors[name].detach().resolve_conj().resolve_neg().contiguous()
            self.last = name, plain.view(-1).view(dtype)
        return self.last[1][first : first + count]


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint: its files, and which of them holds each tensor.

    Of a folder, `chosen` is the name of the file or index that was read, and `beside` are those of
    others that hold weights too. Where several files hold a tensor the last counts; `superseded` is
    how often it did.
    """

    path: Path
    stores: list[Store]
    chosen: str | None = None
    index: dict[str, Any] | None = None
    beside: tuple[str, ...] = ()
    superseded: int = 0
    where: dict[str, Store] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for store in self.stores:
            for name in store.entries:
                self.superseded += self.where.pop(name, None) is not None
                self.where[name] = store

    @property
    def folder(self) -> bool:
        """Whether it is a folder's."""
        return self.chosen is not None

    @property
    def notes(self) -> list[str]:
        """What a user should know of the choice between files."""
        found = []
        if self.beside:
            found.append(f"the weights are those of {self.chosen}; not read: {few(self.beside)}")
        if self.superseded:
            count = f"tensors that are in several files: {self.superseded}"
            found.append(f"{count}; the last of them counts")
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: store.entries[name].shape for name, store in self.where.items()}

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors calls it."""
        return self.where[name].entries[name].dtype

    def elements(self, name: str, first: int, count: int) -> Tensor:
        """Elements of a tensor, flat, as whole numbers of their size."""
        return self.where[name].elements(name, first, count)

    def parts(self, name: str) -> Iterator[Tensor]:
        """All of a tensor's bytes, in parts."""
        store = self.where[name]
        entry = store.entries[name]
        if DTYPES[entry.dtype] % 8:
            assert isinstance(store, SafetensorsFile)  # PyTorch has no such dtypes
            for at in range(0, entry.size, CHUNK):
                yield store.read(name, at, torch.uint8, min(CHUNK, entry.size - at))
            return
        count = entry.size * 8 // DTYPES[entry.dtype]
        for first in range(0, count, CHUNK):
            yield store.elements(name, first, min(CHUNK, count - first))


def few(names: Sequence[str], most: int = MOST_SHOWN) -> str:
    """Names of files as a line has them: some, and how many more.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = [name if safetensors.printable(name) else ascii(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
