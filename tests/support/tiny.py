"""A tiny source to compile, with a cache folder and a compiler of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.native import compiler, library

ANSWER = """
extern "C" __attribute__((visibility("default"))) int answer() { return %d; }
"""


try:
    COMPILER = native.find_compiler()[0]
except BuildError:
    COMPILER = "false"
needs_compiler = pytest.mark.skipif(COMPILER == "false", reason="there is no compiler")
needs_threads = pytest.mark.skipif(
    native.openmp() is None, reason="PyTorch has no OpenMP library here"
)


class Bench:
    """A tiny source, a cache folder of its own, and a compiler that notes every call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.log = folder, folder / "cache", folder / "calls"
        self._monkeypatch = monkeypatch
        self.source = self.write(folder / "tiny.cpp", ANSWER % 42)
        monkeypatch.setenv("GATEDFFN_CACHE", str(self.cache))
        monkeypatch.delenv("GATEDFFN_NATIVE", raising=False)
        self.use_compiler()

    @staticmethod
    def write(path: Path, text: str) -> Path:
        path.write_text(text, encoding="utf-8")
        return path

    def use_compiler(self, before: str = "", name: str = "noted") -> Path:
        """Makes the compiler a script that notes its first argument and runs `before` first.

        `before` can tell compiling from linking by $step.
        """
        script = f"""#!/bin/sh
case "$*" in *--version*) step=version;; *-shared*) step=link;; *) step=compile;; esac
echo "$step" >> {self.log}
{before}
exec {COMPILER} "$@"
"""
        path = self.write(self.folder / name, script)
        path.chmod(0o755)
        self._monkeypatch.setenv("CXX", str(path))
        compiler.version.cache_clear()
        return path

    def load(self, level: str | None = None, source: Path | None = None) -> int:
        """Loads as a new process would, and asks the library."""
        native.best.cache_clear()
        native.load.cache_clear()
        loaded = native.load(source or self.source, level)
        answer: int = loaded.answer()
        return answer

    def steps(self) -> list[str]:
        """The calls of the compiler so far, but for those that ask for its version."""
        lines = self.log.read_text(encoding="utf-8").split() if self.log.exists() else []
        return [line for line in lines if line != "version"]

    def libraries(self) -> set[str]:
        return {path.name for path in self.cache.glob("*.so")}


def with_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor runs a level that no compiler knows, and the portable one."""
    levels = {"newest": native.Level(("-mno-such-instructions",), ()), **native.LEVELS}
    monkeypatch.setattr(compiler, "LEVELS", levels)
    monkeypatch.setattr(library, "levels", lambda: ("newest", "portable"))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
