"""Writing files so that a kill at any moment leaves the old content or the new, never a half."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gatedffn.errors import StorageError


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one `StorageError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path} cannot be written: {reason}; choose another folder") from error


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; synced and renamed to `path` when the block ends well.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; synced and renamed when the block ends well.

    Raises:
        StorageError: there is something at `path` already, or it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    if path.exists():
        raise StorageError(f"{path} exists already: choose another name")
    if aside.exists():
        raise StorageError(f"{aside} is there, left by a run that was killed: delete it")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        try:
            yield aside
            for file in aside.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
