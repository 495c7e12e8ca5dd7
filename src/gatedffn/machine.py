"""The machine that a measurement ran on: what its figures depend on."""

import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

import gatedffn
from gatedffn import native
from gatedffn.ops import kernels


def card() -> dict[str, Any]:
    """Processor, cores, memory and versions, and the commit where the package is a checkout."""
    return {
        "processor": native.processor_name(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.level() or "none",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gatedffn": gatedffn.__version__,
        "commit": _commit(),
    }


def sources() -> str:
    """A hash of the package's files, checkout or not: figures are those of a source."""
    digest, package = hashlib.sha256(), Path(gatedffn.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def busy() -> float:
    """The part of the processor, 0 to 1, that others use at the moment."""
    return float(psutil.cpu_percent(interval=0.5)) / 100


def _commit() -> str | None:
    """Of the checkout that the package is in; "+" after it when its files are other than there."""
    package = Path(gatedffn.__file__).parent
    # A package that is installed below somebody else's checkout is not of that checkout.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".")
    return None if commit is None else commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
