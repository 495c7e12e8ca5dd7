"""The libraries that a wheel brings: compiled when it was built, for whoever has no compiler.

A library's name has a hash of its sources and flags, so that none is found whose sources are
others by now, and a hash of itself, so that none is loaded that is damaged.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gatedffn.errors import BuildError
from gatedffn.native.compiler import Refused, build, find_compiler, fingerprint, flags
from gatedffn.native.instructions import LEVELS

FOLDER = Path(__file__).parent / "built"


def prebuilt(source: Path, level: str) -> Path | None:
    """The library that came with the package for a source as it is now; None if none did.

    Raises:
        BuildError: it is damaged.
    """
    for path in FOLDER.glob(f"{_name(source, level)}-*.so"):
        if path.stem.rpartition("-")[2] != _digest(path):
            raise BuildError(
                f"{path} is damaged: install gatedffn again, or delete it to have it compiled here"
            )
        return path
    return None


def prebuild(source: Path, folder: Path) -> list[Path]:
    """Compiles a source for every level that the compiler knows, as `prebuilt` looks for it.

    Raises:
        BuildError: there is no compiler, or it fails at the level that asks nothing of it.
    """
    compiler = find_compiler()

    def compiled(level: str) -> Path | None:
        target = folder / f"{_name(source, level)}.so"
        try:
            build(compiler, flags(level, threads=True), source, target)
        except Refused:
            if not LEVELS[level].flags:
                raise
            return None
        return target.rename(target.with_stem(f"{target.stem}-{_digest(target)}"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [path for path in pool.map(compiled, LEVELS) if path]


def _name(source: Path, level: str) -> str:
    return f"{source.stem}-{level}-{fingerprint(source, flags(level, threads=True))}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]
