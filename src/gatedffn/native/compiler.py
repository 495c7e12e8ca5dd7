"""The C++ compiler: which one, with which flags, and what a library's name depends on.

It needs nothing of PyTorch: a wheel is built where there is none.
"""

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from gatedffn.errors import BuildError
from gatedffn.native.instructions import LEVELS

log = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 300.0  # seconds that a compiler may take
# Contraction is wanted (one rounding instead of two); the rest of -ffast-math would break the
# limits at infinity. Traps and errno are what else keeps loops from being vectors.
FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
LINKING = ("-shared", "-fPIC")


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


def build(compiler: list[str], flags: list[str], source: Path, target: Path) -> None:
    """Compiles a source to a shared library, which appears whole or not at all.

    Raises:
        BuildError: the compiler fails.
    """
    log.info("compiling %s", target.name)
    # One builder at a time is here, so what lies there already is of one that was killed.
    folder = target.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        made, result = folder / "made.o", folder / target.name
        _call([*compiler, *flags, "-c", str(source), "-o", str(made)])
        # Without -fopenmp, which would bring the compiler's own library: see `library.openmp`.
        _call([*compiler, *LINKING, str(made), "-o", str(result)])
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
def version(compiler: tuple[str, ...]) -> str:
    """What the compiler says that it is."""
    return _call([*compiler, "--version"])


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
