"""Checkpoints: a safetensors or PyTorch file, or a folder of them with an index."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoints import safetensors
from gatedffn.interop.checkpoints.safetensors import DTYPES, NAMES, Entry

CHUNK = 1 << 19  # elements moved at a time: few enough that their memory is used again
LARGEST_JSON = 200_000_000  # bytes of an index or a configuration
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONFIG = "config.json"
SET_ASIDE = "config.original.json"


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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise CheckpointError(
                f"{path} does not load with weights_only=True: {reason}"
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
    """A checkpoint: its files, and which of them holds each tensor."""

    path: Path
    stores: list[Store]
    folder: bool
    where: dict[str, Store] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for store in self.stores:
            for name in store.entries:
                if name in self.where:
                    raise CheckpointError(
                        f"{name!r} is in {self.where[name].path.name} and in {store.path.name}"
                    )
                self.where[name] = store

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


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path: a file, or a folder with an index or one file of weights.

    Raises:
        CheckpointError: there is none, or several, or one that is not sound.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: a pipe or a device has no end")
    return Checkpoint(path, [_open_file(path)], folder=False)


def _open_file(path: Path) -> Store:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLES:
        return TorchFile(path)
    raise CheckpointError(
        f"{path} ends with {path.suffix or 'no suffix'}: known are .safetensors, "
        f"{', '.join(PICKLES)}"
    )


def _open_folder(folder: Path) -> Checkpoint:
    for name in INDEXES:
        if (folder / name).is_file():
            return _open_index(folder, name)
    for suffixes in ((".safetensors",), PICKLES):
        files = sorted(f for f in folder.iterdir() if f.suffix in suffixes and f.is_file())
        if len(files) > 1:
            raise CheckpointError(
                f"{folder} has {len(files)} files of weights and no index: name one of them"
            )
        if files:
            return Checkpoint(folder, [_open_file(inside(folder, files[0].name))], folder=True)
    raise CheckpointError(f"{folder} holds no weights: no .safetensors, {', '.join(PICKLES)}")


def _open_index(folder: Path, name: str) -> Checkpoint:
    index = read_json(inside(folder, name))
    weights = index.get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(f, str) for f in weights.values())
    ):
        raise CheckpointError(f"{folder / name} must have a weight_map of file names by tensor")
    stores = {file: _open_file(inside(folder, file)) for file in sorted(set(weights.values()))}
    found = Checkpoint(folder, list(stores.values()), folder=True, index=index)
    for tensor, file in weights.items():
        if tensor not in stores[file].entries:
            raise CheckpointError(f"{folder / name} says that {file} has {tensor!r}: it has not")
    left = next((tensor for tensor in found.where if tensor not in weights), None)
    if left is not None:
        raise CheckpointError(
            f"{found.where[left].path} has {left!r}, of which {folder / name} says nothing"
        )
    return found


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder, wherever links lead; names from a file come here first.

    A link may lead to `blobs` beside `snapshots`, as in the cache of Hugging Face.

    Raises:
        CheckpointError: the name is no plain file name, or leads out of the folder, or to nothing.
    """
    plain = name not in ("", ".", "..") and not any(c in name for c in '/\\:"')
    plain = plain and safetensors.printable(name)
    if not plain:
        raise CheckpointError(f"{name!r} is no plain file name: files are in {folder} itself")
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: there is no such file") from None
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(f"{path} is a link that leads out of the folder")
    if not real.is_file():
        raise CheckpointError(f"{path} is no file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, too large or no JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is too large for what it should be")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return found


def read_config(path: Path) -> dict[str, Any] | None:
    """The model's configuration beside its weights, or the one that a conversion set aside."""
    folder = path if path.is_dir() else path.parent
    for name in (CONFIG, SET_ASIDE):
        if (folder / name).is_file():
            return read_json(inside(folder, name))
    return None
