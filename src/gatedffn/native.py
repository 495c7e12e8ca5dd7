"""Compiles this package's C++ at first use and keeps the result in the user's own cache folder.

One source is compiled once for each instruction-set level that is asked for, and the level is
chosen at run time. The result is named by a hash of all that it depends on: the sources, the
compiler, the flags, the threading library and the processor.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from gatedffn.errors import BuildError

log = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 300.0  # seconds that a compiler may take
# Contraction is wanted (one rounding instead of two); the rest of -ffast-math would break the
# limits at infinity. Traps and errno are what else keeps loops from being vectors.
FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"),
    *("-mfma", "-mf16c", "-mbmi2"),
)


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set: what the compiler is told, and PyTorch's checks that it can run here."""

    flags: tuple[str, ...]
    checks: tuple[str, ...]


LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "amx": Level(
            (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
            ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_init_amx"),
        ),
        "avx512_bf16": Level((*AVX512, "-mavx512bf16"), ("_is_avx512_bf16_supported",)),
        "avx512": Level(AVX512, ("_is_avx512_supported",)),
        "avx2": Level(("-mavx2", "-mfma", "-mf16c", "-mbmi2"), ("_is_avx2_supported",)),
        "portable": Level((), ()),
    }
)
"""Every level by name, the fastest first; the last runs everywhere."""

WITH_TILES = ("amx",)
"""The levels that multiply tiles of bfloat16."""


def enabled() -> bool:
    """Whether compiled code may be used: `GATEDFFN_NATIVE=off` says no."""
    return os.environ.get("GATEDFFN_NATIVE", "").lower() not in ("0", "off", "no", "false")


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that this processor and this system run, the fastest first."""
    return tuple(
        name
        for name, level in LEVELS.items()
        if all(getattr(torch.cpu, check, bool)() for check in level.checks)
    )


class Refused(BuildError):
    """A compiler that ran and failed: it may lack the flags of one level and know another's."""


@functools.cache
def best(source: Path) -> str:
    """The fastest level that runs here and that the compiler builds a source for.

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
    """The shared library compiled from a C++ source, for a level or for the `best` one.

    Raises:
        BuildError: there is no compiler, it fails, the cache folder is not the user's own, the
            level does not run here, or compiled code is switched off.
    """
    if not enabled():
        raise BuildError("compiled code is switched off by GATEDFFN_NATIVE: unset it")
    name = level or best(source)
    if name not in levels():
        raise BuildError(f"level {name!r} does not run here; these do: {', '.join(levels())}")
    compiler = find_compiler()
    library = openmp()
    threads = ["-fopenmp"] if library else []
    # Linked in a step of its own: -fopenmp there would bring the compiler's OpenMP library.
    compiling = [*compiler, *FLAGS, *LEVELS[name].flags, *threads, "-c", str(source)]
    linking = [*compiler, "-shared", "-fPIC", *([library] if library else [])]
    key = _key(source, (_version(tuple(compiler)), *compiling, *linking, processor()))
    target = cache_folder() / f"{source.stem}-{name}-{key}.so"
    try:
        if not target.exists():
            with alone(target.with_suffix(".lock")):
                if not target.exists():
                    _build(compiling, linking, target)
        if not _private(target.stat()):
            raise BuildError(f"{target} may be written by others, and it is run: delete it")
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(
            f"{target} cannot be built or loaded: {error}; set GATEDFFN_CACHE to a folder of your "
            "own on a disk with space, from which libraries may be loaded"
        ) from error


def find_compiler() -> list[str]:
    """The C++ compiler's command: `CXX` where it is set, else the first one found.

    Raises:
        BuildError: there is none.
    """
    try:
        wish = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX is not a command: {error}") from error
    names = wish[:1] or COMPILERS
    for name in names:
        path = shutil.which(name)
        if path:
            return [path, *wish[1:]]
    raise BuildError(
        f"no C++ compiler is found ({', '.join(names)}): install g++ or clang, or set CXX; "
        "without one the layers run on PyTorch's own operators"
    )


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
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise BuildError(f"there is no cache folder: {error}; set GATEDFFN_CACHE") from error
    if not _private(found):
        raise BuildError(
            f"the cache folder {folder} is not private: others may write to it, and what lies "
            "there is run; set GATEDFFN_CACHE to a folder of your own, or chmod go-w it"
        )
    return folder


def _private(found: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, who alone may write to it."""
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Holds a lock that the system releases when its holder dies.

    Raises:
        BuildError: the system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("this system has no file locks: kernels and choices need them") from error
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiling: list[str], linking: list[str], target: Path) -> None:
    log.info("compiling %s", target.name)
    # One builder at a time is here, so what lies there already is of one that was killed.
    folder = target.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        made, result = folder / "made.o", folder / target.name
        _call([*compiling, "-o", str(made)])
        _call([*linking, str(made), "-o", str(result)])
        with result.open("rb") as file:
            os.fsync(file.fileno())
        result.chmod(0o700)  # whatever the umask is: what lies here is run
        result.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(command: list[str]) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        # A signal says nothing of the source: the next process may succeed.
        kind = BuildError if done.returncode < 0 else Refused
        raise kind(f"{shlex.join(command)} failed with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@functools.cache
def source_version() -> str:
    """A hash of every C++ file of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(source: Path, parts: tuple[str, ...]) -> str:
    """A name for all that the compiled code depends on."""
    digest = hashlib.sha256(source.read_bytes())
    for part in (source_version(), *parts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _call([*compiler, "--version"])


@functools.cache
def processor() -> str:
    """The processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


MULTIPLIES = {
    "torch.bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "torch.float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""Any of these instruction sets of x86 or ARM multiplies numbers of that dtype."""


@functools.cache
def multiplies(dtype: str) -> bool:
    """Whether this processor has instructions for products in a dtype, as far as it says."""
    sets = set(processor().split())
    wanted = MULTIPLIES.get(dtype)
    return not wanted or not sets or bool(sets.intersection(wanted))


@functools.cache
def openmp() -> str | None:
    """The OpenMP library that PyTorch runs its own threads with; None where it has none.

    A second one in the process would bring a second pool of threads, and both would wait by
    spinning: so ours links to the very file that is loaded.
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
