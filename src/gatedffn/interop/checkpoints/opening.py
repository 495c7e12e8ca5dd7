"""Which files are the checkpoint at a path, and the JSON beside them.

In a folder they are those that transformers would load; where it would load none, the only one.
"""

import json
import re
from pathlib import Path
from typing import Any

from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoints.checkpoint import (
    Checkpoint,
    SafetensorsFile,
    Store,
    TorchFile,
    few,
)
from gatedffn.interop.checkpoints.safetensors import printable, reading

LARGEST_JSON = 200_000_000  # bytes of an index or a configuration
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONFIG = "config.json"
SET_ASIDE = "config.original.json"
NAMED = "transformers_weights"
"""The field of a configuration that names the file or index to load."""
TAKEN = (".safetensors", ".safetensors.index.json")
"""How names in it must end."""
ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where transformers looks for weights, one after the other."""
# Parts of tensors, which transformers loads before all else.
DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path: a file, an index, or a folder with an index or one file of weights.

    Raises:
        CheckpointError: there is none, or several, or one that is not sound.
    """
    with reading(path):
        there = path.exists()
    if not there:
        raise CheckpointError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: a pipe or a device has no end")
    if is_index(path.name):
        return _open_index(path.parent, path.name)
    return Checkpoint(path, [_open_file(path)])


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index, of a variant or not.

    >>> is_index("model.safetensors.index.json"), is_index("model.safetensors.index.fp16.json")
    (True, True)
    """
    return re.fullmatch(r".+\.index(\.[^.]+)?\.json", name) is not None


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
    with reading(folder):
        held = sorted(
            file.name
            for file in folder.iterdir()
            if (file.suffix in (".safetensors", *PICKLES) or is_index(file.name)) and file.is_file()
        )
    chosen = _chosen(folder, held)
    if is_index(chosen):
        found = _open_index(folder, chosen)
    else:
        found = Checkpoint(folder, [_open_file(inside(folder, chosen))], chosen)
    read = {chosen, *(store.path.name for store in found.stores)}
    beside = [
        name
        for name in held
        # Other pickles are the state of an optimiser or of a run as often as not.
        if name not in read and (name in ORDER or not name.endswith(PICKLES))
    ]
    found.beside = tuple(sorted(beside, key=lambda name: (name not in ORDER, not is_index(name))))
    return found


def _chosen(folder: Path, held: list[str]) -> str:
    """The file or index to read, of those that a folder holds.

    An index none of whose files is there is left by weights that are gone: what comes next counts.
    """
    if any(DISTRIBUTED.fullmatch(name) for name in held):
        raise CheckpointError(
            f"{folder} holds a distributed checkpoint, whose files are parts of tensors: load it "
            "where it was trained and save it as one"
        )
    named = (read_config(folder) or {}).get(NAMED)
    if named is not None:
        if named not in held:
            raise CheckpointError(
                f"the configuration in {folder} has {NAMED} = {str(named)[:100]!r}, which is no "
                "file of weights there: correct it, or name the file to read"
            )
        if not str(named).endswith(TAKEN):
            raise CheckpointError(
                f"the configuration in {folder} has {NAMED} = {named!r}, and transformers takes "
                f"there what ends with {' or '.join(TAKEN)}: take the field out"
            )
        return str(named)
    known = [name for name in ORDER if name in held]
    for name in known:
        wanted = set(_weight_map(folder, name)[1].values()) if is_index(name) else {name}
        if not wanted.isdisjoint(held):
            return name
    if known:
        return known[0]
    for suffixes in ((".safetensors",), PICKLES):
        files = [name for name in held if name.endswith(suffixes)]
        if len(files) > 1:
            raise CheckpointError(
                f"{folder} has {len(files)} files of weights, and none is called "
                f"{' or '.join(ORDER)}: name one of them, or its index; there are "
                f"{few([*filter(is_index, held), *files])}"
            )
        if files:
            return files[0]
    raise CheckpointError(f"{folder} holds no weights: no .safetensors, {', '.join(PICKLES)}")


def _weight_map(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What an index says, and the file that it names for each tensor."""
    index = read_json(inside(folder, name))
    weights = index.get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(f, str) for f in weights.values())
    ):
        raise CheckpointError(f"{folder / name} must have a weight_map of file names by tensor")
    return index, weights


def _open_index(folder: Path, name: str) -> Checkpoint:
    index, weights = _weight_map(folder, name)
    stores = {file: _open_file(inside(folder, file)) for file in sorted(set(weights.values()))}
    found = Checkpoint(folder, list(stores.values()), name, index)
    for tensor, file in weights.items():
        if tensor not in stores[file].entries:
            raise CheckpointError(f"{folder / name} says that {file} has {tensor!r}: it has not")
        last = found.where[tensor].path.name
        if last != file:
            raise CheckpointError(
                f"{tensor!r} is in {file}, which {folder / name} names, and in {last}, which "
                f"transformers reads after it and so loads: name {last} there, or take the tensor "
                "out of it"
            )
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
    plain = plain and printable(name)
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
    with reading(path):
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is too large for what it should be")
        text = path.read_bytes()
    try:
        found = json.loads(text.decode("utf-8"))
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
