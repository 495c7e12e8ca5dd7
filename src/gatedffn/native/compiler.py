"""The C++ compiler: which one, with which flags, and what a library's name depends on.

It needs nothing of PyTorch: a wheel is built where there is none.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from gatedffn.errors import BuildError
from gatedffn.native.cache import named_by_hash
from gatedffn.native.instructions import LEVELS

log = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 300.0  # seconds that a compiler may take
REMEMBERED = 3600.0  # seconds for which one that takes longer is not tried again
# Contraction is wanted (one rounding instead of two); the rest of -ffast-math would break the
# limits at infinity. Traps and errno are what else keeps loops from being vectors.
FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
LINKING = ("-shared", "-fPIC")


class Hanging(BuildError):
    """The compiler did not end in time."""


class Refused(BuildError):
    """There is no compiler, or it ran and failed: another level may be had all the same."""


def enabled() -> bool:
    """Whether compiled code may be used: `GATEDFFN_NATIVE=off` says no."""
    return os.environ.get("GATEDFFN_NATIVE", "").lower() not in ("0", "off", "no", "false")


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
    raise Refused(
        f"no C++ compiler is found ({', '.join(names)}): install g++ or clang, or set CXX; "
        "what is not prebuilt runs on PyTorch's own operators"
    )


def flags(level: str, threads: bool) -> list[str]:
    """What the compiler is told for a level."""
    return [*FLAGS, *LEVELS[level].flags, *(["-fopenmp"] if threads else [])]


def build(compiler: list[str], flags: list[str], source: Path, folder: Path, name: str) -> Path:
    """Compiles a source to the shared library of a name, which appears whole or not at all.

    Raises:
        BuildError: the compiler fails.
        Hanging: it takes longer than `PATIENCE`.
    """
    log.info("compiling %s", name)
    until = time.monotonic() + PATIENCE
    # One builder at a time is here, so what lies there already is of one that was killed.
    aside = folder / f"{name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        made, result = aside / "made.o", aside / name
        _call([*compiler, *flags, "-c", str(source), "-o", str(made)], until)
        # Without -fopenmp, which would bring the compiler's own library: see `library.openmp`.
        _call([*compiler, *LINKING, str(made), "-o", str(result)], until)
        with result.open("rb") as file:
            os.fsync(file.fileno())
        result.chmod(0o755)  # whatever the umask is: what lies here is run, by others too
        return result.replace(folder / named_by_hash(name, result))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _call(command: list[str], until: float) -> str:
    """What a command prints; what it started ends with it, at that time at the latest."""
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    with process:
        try:
            out, errors = process.communicate(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise Hanging(f"{shlex.join(command)} did not end within {PATIENCE:g} s") from error
        finally:
            if process.returncode is None:
                _end_all(process)
    if process.returncode:
        # A signal says nothing of the source: the next process may succeed.
        kind = BuildError if process.returncode < 0 else Refused
        raise kind(f"{shlex.join(command)} failed with {process.returncode}: {errors[-2000:]}")
    return out


def _end_all(process: subprocess.Popen[str]) -> None:
    """Ends a process that leads a group, and the group: a compiler's parts are programs too."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


@functools.cache
def version(compiler: tuple[str, ...]) -> str:
    """What the compiler says that it is."""
    return _call([*compiler, "--version"], time.monotonic() + PATIENCE)


@contextlib.contextmanager
def remembering(compiler: list[str], folder: Path) -> Iterator[None]:
    """Keeps in a folder that a compiler hangs, so that others do not wait for it too.

    Raises:
        BuildError: it did, not long ago.
    """
    note = folder / f"hanging-{hashlib.sha256(shlex.join(compiler).encode()).hexdigest()[:20]}"
    try:
        age = time.time() - note.stat().st_mtime
    except OSError:
        age = REMEMBERED
    if 0 <= age < REMEMBERED:
        raise BuildError(
            f"{shlex.join(compiler)} did not end {age:.0f} s ago: it is tried again after "
            f"{REMEMBERED:g} s, or when {note} is deleted"
        )
    try:
        yield
    except Hanging:
        with contextlib.suppress(OSError):
            note.touch()
        raise


@functools.cache
def source_version() -> str:
    """A hash of every C++ file of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(source: Path, parts: list[str]) -> str:
    """A name for a source, all that it may include, and what else its code depends on."""
    digest = hashlib.sha256(source.read_bytes())
    for part in (source_version(), *LINKING, *parts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]
