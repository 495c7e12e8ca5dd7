"""The kernels compiled for another processor and run by an emulator, on this process's memory."""

import ctypes
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gatedffn.native.compiler import FLAGS
from gatedffn.ops import kernels

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
ANYBODY, SET_PTRACER = -1, 0x59616D61


class Library:
    """What `kernels.library` gives, its functions called in the emulator."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Callable[[bytes], int]:
        def run(arguments: bytes) -> int:
            self.called.add(name)
            called = name.encode()
            into, out = self._process.stdin, self._process.stdout
            assert into is not None
            assert out is not None
            into.write(struct.pack("ii", len(called), len(arguments)) + called + arguments)
            into.flush()
            answer = out.read(8)
            assert len(answer) == 8, f"the emulator ended at {name}"
            return int.from_bytes(answer, "little", signed=True)

        return run


@contextmanager
def library(folder: Path) -> Iterator[Any]:
    """The kernels for aarch64, compiled into a folder."""
    names = re.findall(r"^EXPORT \w+ (gatedffn_\w+)\(", kernels.SOURCE.read_text(), re.M)
    tiles = {"gatedffn_tiles", "gatedffn_tiles_scratch"}
    calls = "".join(f"NAMED({name})\n" for name in names if name not in tiles)
    (folder / "names.h").write_text(calls)
    program = folder / "emulated"
    source = Path(__file__).with_suffix(".cpp")
    places = [f"-I{kernels.SOURCE.parent}", f"-I{folder}"]
    subprocess.run(
        [COMPILER, *FLAGS, "-O1", *places, "-static", str(source), "-o", str(program)], check=True
    )
    ctypes.CDLL(None).prctl(SET_PTRACER, ctypes.c_ulong(ANYBODY))
    pipe = subprocess.PIPE
    command = [EMULATOR, str(program), f"/proc/{os.getpid()}/mem"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        yield Library(process)
        process.stdin.close()  # type: ignore[union-attr]
