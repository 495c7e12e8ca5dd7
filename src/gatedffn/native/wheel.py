"""The libraries that a wheel brings: compiled when it was built, for whoever has no compiler.

A library's name has a hash of its sources and flags, so that none is found whose sources are
others by now, and as in the cache a hash of itself.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gatedffn.errors import BuildError
from gatedffn.native.cache import is_intact, of_name
from gatedffn.native.compiler import Refused, build, find_compiler, fingerprint, flags
from gatedffn.native.instructions import LEVELS

FOLDER = Path(__file__).parent / "built"


def prebuilt(source: Path, level: str) -> Path | None:
    """The library that came with the package for a source as it is now; None if none did.

    Raises:
        BuildError: it is damaged.
    """
    for path in of_name(FOLDER, _name(source, level)):
        if not is_intact(path):
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
        told = flags(level, threads=True)
        try:
            return build(compiler, told, source, folder, _name(source, level))
        except Refused:
            if not LEVELS[level].flags:
                raise
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [path for path in pool.map(compiled, LEVELS) if path]


def _name(source: Path, level: str) -> str:
    return f"{source.stem}-{level}-{fingerprint(source, flags(level, threads=True))}"
