"""The cache folder: what lies there is run, so nobody but its user and root may have written it."""

import contextlib
import functools
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

from gatedffn.errors import BuildError
from gatedffn.files import regular

log = logging.getLogger(__name__)

ROOT = 0  # the user who could change this process as well


def cache_folder() -> Path:
    """The user's cache: `GATEDFFN_CACHE`, or `gatedffn` under the system's cache folder.

    One that root made, as the build of a container does, is read and not written. Where there is
    none and none can be made, it is a folder of the user's own among temporary files.

    Raises:
        BuildError: it cannot be made, belongs to someone else, or others may write to it.
    """
    chosen = os.environ.get("GATEDFFN_CACHE")
    try:
        folder = _made(Path(chosen)) if chosen else _of_the_system()
        wrong = why_not_trusted(folder)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"there is no cache folder: {error}; set GATEDFFN_CACHE") from error
    if wrong:
        raise BuildError(
            f"the cache folder {folder} is not private: {wrong}; or set GATEDFFN_CACHE to a folder "
            "of your own"
        )
    return folder


def _made(folder: Path) -> Path:
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _of_the_system() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The specification of these folders has relative ones ignored.
        home = base if base.is_absolute() else Path.home() / ".cache"
        folder = _made(home / "gatedffn")
        if os.access(folder, os.W_OK) or any(folder.iterdir()):
            return folder
        reason = f"{folder} is empty and may not be written"
    except (OSError, RuntimeError) as error:
        if not hasattr(os, "getuid"):
            raise
        reason = str(error)
    return _temporary(reason)


@functools.cache
def _temporary(reason: str) -> Path:
    """A folder among temporary files that nobody else may even read; said once."""
    folder = Path(tempfile.gettempdir()).resolve() / f"gatedffn-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(
            f"{reason}; and {folder} is not a folder that you alone may enter: delete it, or chmod "
            "700 it"
        )
    log.warning(
        "compiled code and choices are kept in %s, for as long as that lasts: %s; set "
        "GATEDFFN_CACHE to a folder of your own",
        folder,
        reason,
    )
    return folder


def why_not_trusted(path: Path) -> str | None:
    """Why code from a file or folder is not run, and what to do; None where it is."""
    found = path.stat()
    if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), ROOT):
        return f"it belongs to user {found.st_uid}, and what lies there is run; chown it"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it, and what lies there is run; chmod go-w it"
    return None


# A library's name ends with its hash, so that none is loaded that is damaged.


def named_by_hash(name: str, library: Path) -> str:
    """The name of a library's file."""
    return f"{name}-{_digest(library)}.so"


def of_name(folder: Path, name: str) -> list[Path]:
    """The files that should be the library of a name."""
    return sorted(folder.glob(f"{name}-*.so"))


def is_intact(library: Path) -> bool:
    """Whether a library can be read, and is what it was when it was named."""
    try:
        return library.stem.rpartition("-")[2] == _digest(library)
    except OSError:
        return False


def _digest(library: Path) -> str:
    with open(library, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]
