"""Loading: the fastest level that can be had, on PyTorch's own threads."""

import ctypes
import functools
import logging
from pathlib import Path

from gatedffn.errors import BuildError
from gatedffn.files import alone
from gatedffn.native import compiler
from gatedffn.native.cache import cache_folder, is_intact, of_name, why_not_trusted
from gatedffn.native.compiler import (
    Refused,
    build,
    enabled,
    find_compiler,
    fingerprint,
    flags,
    remembering,
    version,
)
from gatedffn.native.cpu import levels, processor
from gatedffn.native.wheel import prebuilt

log = logging.getLogger(__name__)

MARGIN = 10.0  # seconds that another process may take longer than its compiler


@functools.cache
def best(source: Path) -> str:
    """The fastest level that runs here and that a source is prebuilt or can be compiled for.

    Raises: as `load`.
    """
    reasons = []
    for name in levels():
        try:
            load(source, name)
        except Refused as error:
            log.info("level %s is left out: %s", name, error)
            reasons.append(error)
        else:
            return name
    raise reasons[0]


@functools.cache
def load(source: Path, level: str | None = None) -> ctypes.CDLL:
    """The shared library of a C++ source, for a level or for the `best` one.

    Raises:
        BuildError: none is prebuilt, and there is no compiler, it fails, or the cache folder is
            not the user's own; the level does not run here; or compiled code is switched off.
    """
    if not enabled():
        raise BuildError("compiled code is switched off by GATEDFFN_NATIVE: unset it")
    name = level or best(source)
    if name not in levels():
        raise BuildError(f"level {name!r} does not run here; these do: {', '.join(levels())}")
    path = _prebuilt(source, name) or _compiled(source, name)
    try:
        # The library names nobody whose threads it runs on: it finds them among the symbols that
        # the whole process sees, where PyTorch's wheels have put theirs already.
        if (threads := openmp()) and not hasattr(ctypes.CDLL(None), "omp_get_num_threads"):
            ctypes.CDLL(threads, ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        advice = "with GATEDFFN_CACHE set to a folder from which libraries may be loaded"
        if "undefined symbol" in str(error):
            advice = "with CXX set to a compiler of C++, such as g++ where it is gcc"
        raise BuildError(
            f"{path} cannot be loaded: {error}; delete it to have it compiled here, {advice}"
        ) from error


def state(source: Path) -> str:
    """Which level of a source runs here, and who compiled it; or why none does."""
    try:
        level = best(source)
        origin = "prebuilt" if _prebuilt(source, level) else "compiled here"
    except BuildError as error:
        return str(error)
    fastest = levels()[0]
    more = "" if level == fastest else f"; a newer compiler may know {fastest}"
    return f"{origin} for {level}{more}"


@functools.cache
def openmp() -> str | None:
    """The OpenMP library that PyTorch runs its own threads with; None where it has none.

    A second one in the process would bring a second pool of threads, and both would wait by
    spinning: so ours takes the one that is loaded.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in maps:
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            return path
    return None


def _prebuilt(source: Path, level: str) -> Path | None:
    """What a wheel brought calls OpenMP, so it is of no use where PyTorch has none."""
    return prebuilt(source, level) if openmp() else None


def _compiled(source: Path, level: str) -> Path:
    """The library in the cache folder, compiled now if it is not there yet, or is damaged."""
    command, told, folder = find_compiler(), flags(level, bool(openmp())), cache_folder()
    with remembering(command, folder):
        says = version(tuple(command))
    key = fingerprint(source, [says, *command, *told, processor()])
    name = f"{source.stem}-{level}-{key}"
    try:
        found = _kept(folder, name)
        if found is None:
            with alone(folder / f"{name}.lock", compiler.PATIENCE + MARGIN):
                found = _kept(folder, name)
                if found is None:
                    for damaged in of_name(folder, name):
                        log.warning("%s is damaged: it is compiled again", damaged)
                        damaged.unlink()
                    with remembering(command, folder):
                        found = build(command, told, source, folder, name)
        wrong = why_not_trusted(found)
    except OSError as error:
        raise BuildError(
            f"{name} cannot be built: {error}; set GATEDFFN_CACHE to a folder of your own on a "
            "disk with space"
        ) from error
    if wrong:
        raise BuildError(f"{found} is not loaded: {wrong}, or delete it")
    return found


def _kept(folder: Path, name: str) -> Path | None:
    return next((path for path in of_name(folder, name) if is_intact(path)), None)
