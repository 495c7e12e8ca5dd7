"""Writing files that every reader can read, and that a kill leaves old or new, never a half.

And the lock for what only one process may write at a time.
"""

import contextlib
import errno
import math
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gatedffn.errors import BuildError, StorageError

# What to do, by what the system says; everything else: choose another folder.
ADVICE = {
    errno.EACCES: "choose another folder, or get the right to write there",
    errno.EPERM: "choose another folder, or get the right to write there",
    errno.EROFS: "it is read-only: choose another folder",
    errno.ENOSPC: "make room, or choose another folder, on another disk",
    errno.EDQUOT: "make room, or choose another folder, on another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "it is a folder: name a file in it",
}
LOOK_AGAIN = 0.02  # seconds between two looks at a lock


def expanded(path: str) -> Path:
    """A path as a user names it, with a home for `~`; one of nobody stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - the other raises where there is none


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        advice = ADVICE.get(error.errno or 0, "choose another folder")
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            file = next((one for one in (path, *path.parents) if one.is_file()), None)
            advice = advice if file is None else f"{file} is a file: name another folder"
        raise StorageError(f"{path} cannot be written: {reason}; {advice}") from error


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk: a rename is only then lasting."""
    if os.name == "nt":
        return  # folders cannot be opened there; the file system keeps their order
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_free(path: Path) -> None:
    """Raises where a path is taken, be it by a link that leads nowhere.

    Raises:
        StorageError: something is there, or nothing can be.
    """
    with storing(path), contextlib.suppress(FileNotFoundError):
        path.lstat()
        raise _taken(path)


def _taken(path: Path) -> StorageError:
    return StorageError(f"{path} exists already: choose another name")


def _aside(path: Path) -> Path:
    """A path beside another that no other process or thread has, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def _rename_new(aside: Path, path: Path) -> None:
    """Renames a file or a folder, unless something has the name by then.

    A folder takes the place of an empty one that is made for it; so does a file where the file
    system has no links.
    """
    try:
        if os.name == "nt":
            aside.rename(path)  # which never replaces there
        elif aside.is_dir():
            path.mkdir()
            aside.rename(path)
        else:
            try:
                os.link(aside, path)
            except FileExistsError:
                raise
            except OSError:
                path.touch(exist_ok=False)
                aside.replace(path)
    except FileExistsError:
        raise _taken(path) from None


@contextlib.contextmanager
def written_aside(path: Path, *, new: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; synced and renamed to `path` when the block ends well.

    Raises:
        StorageError: the folder cannot be made or written; or, where it must be `new`, there is
            something at `path` by then.
    """
    aside = _aside(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            if new:
                _rename_new(aside, path)
            else:
                aside.replace(path)
            sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; synced and renamed when the block ends well.

    Raises:
        StorageError: there is something at `path` by then, or it cannot be written.
    """
    aside = _aside(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        try:
            yield aside
            for file in aside.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            sync_folder(aside)
            _rename_new(aside, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def regular(path: str, flags: int) -> int:
    """An `opener` of `open` that takes files alone: a pipe would be waited for without end."""
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return opened


@contextlib.contextmanager
def alone(lock: Path, patience: float) -> Iterator[None]:
    """Holds a lock that the system releases when its holder dies.

    Raises:
        BuildError: another process holds it for longer than so many seconds, or the system has no
            such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("this system has no file locks: kernels and choices need them") from error
    with open(lock, "w", opener=regular) as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise BuildError(
                        f"another process has held {lock} for {patience:g} seconds: end it"
                    ) from error
                time.sleep(LOOK_AGAIN)
        try:
            yield
        finally:
            # A process that was forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def json_ready(value: Any) -> Any:
    """Numbers that JSON does not have become null, so that every reader can read the file."""
    if isinstance(value, dict):
        return {name: json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
