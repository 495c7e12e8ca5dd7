"""The cache folder, which is the user's own: what lies there is run."""

import os
import stat
from pathlib import Path

from gatedffn.errors import BuildError


def cache_folder() -> Path:
    """The user's private cache: `GATEDFFN_CACHE`, or `gatedffn` under the system's cache folder.

    Raises:
        BuildError: it cannot be made, belongs to someone else, or others may write to it.
    """
    chosen = os.environ.get("GATEDFFN_CACHE")
    try:
        if not chosen:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            chosen = os.fspath(Path(base) / "gatedffn")
        folder = Path(chosen).resolve()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = is_private(folder)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"there is no cache folder: {error}; set GATEDFFN_CACHE") from error
    if not found:
        raise BuildError(
            f"the cache folder {folder} is not private: others may write to it, and what lies "
            "there is run; set GATEDFFN_CACHE to a folder of your own, or chmod go-w it"
        )
    return folder


def is_private(path: Path) -> bool:
    """Whether a file or folder belongs to this user, who alone may write to it."""
    found = path.stat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
