"""Checkpoints of a run, each with a seal: what its files held when it was whole."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from gatedffn.files import storing, written_aside

SEAL = "sealed.json"
"""Written last: for each file of the checkpoint its digest."""


def seal(folder: Path) -> None:
    """Declares that a checkpoint is written to its end.

    Raises:
        StorageError: the seal cannot be written.
    """
    with storing(folder):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        digests = {str(path.relative_to(folder)): _digest(path) for path in files}
    with written_aside(folder / SEAL) as aside:
        aside.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def at_step(place: Path, step: int) -> Path:
    """The checkpoint of a step, as the Trainer names it."""
    return place / f"checkpoint-{step}"


def newest(place: Path) -> int:
    """The step of the newest checkpoint that was sealed, 0 without one."""
    return max(
        (step for step in _steps(place) if (at_step(place, step) / SEAL).is_file()), default=0
    )


def drop_torn(place: Path) -> list[str]:
    """Removes the newest checkpoints until one is as it was sealed; returns what was removed.

    Raises:
        StorageError: one cannot be removed.
    """
    dropped = []
    for step in sorted(_steps(place), reverse=True):
        path = at_step(place, step)
        if _is_whole(path):
            break
        with storing(path):
            shutil.rmtree(path)
        dropped.append(path.name)
    return dropped


def _steps(place: Path) -> list[int]:
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in place.glob("checkpoint-*"))
    return [int(match[1]) for match in found if match]


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / SEAL).read_bytes())
        return all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False  # a file is missing, or the seal itself is torn


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
