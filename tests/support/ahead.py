"""Compiling kernels for GPUs that are not there, through the very code that launches them.

    @needs_compiler
    @every_target
    def test_it_compiles(target):
        with ahead.compiling(target) as launches:
            my_launch(torch.empty(64, 64, dtype=torch.bfloat16))  # tensors of the CPU; runs nothing
        for launch in launches:
            launch.assert_fits()
        assert "ld.global.v4.b32" in launches[0].ptx
        print(launches[0])   # name, target, registers, stack, shared memory

Triton specialises a kernel on its arguments (alignment of pointers, strides that 16 divides, ones,
None), so what is compiled is what that call would run on the chip. The launching code must take
tensors of the CPU: call what lies below the check of the device. Triton's interpreter must be off.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gatedffn.ops import gpu

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100 and H200, B200."""
# Bytes of shared memory that a program can have there.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 64 << 10  # of a multiprocessor

needs_compiler = pytest.mark.skipif(
    gpu.interpreting(), reason="Triton's interpreter is on, which compiles nothing"
)
every_target = pytest.mark.parametrize("target", TARGETS, ids=[f"sm_{t}" for t in TARGETS])


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel. `stack` counts the bytes of a thread that lie in memory: what spilled."""

    name: str
    target: int
    warps: int
    registers: int
    stack: int
    shared: int
    ptx: str
    code: bytes

    def __str__(self) -> str:
        return (
            f"{self.name} sm_{self.target}: {self.registers} registers, {self.stack} bytes spilled,"
            f" {self.shared} bytes shared, {self.warps} warps"
        )

    def assert_fits(self) -> None:
        """Raises unless all lies in registers and one program fits on a multiprocessor."""
        assert self.stack == 0, str(self)
        assert self.shared <= SHARED[self.target], str(self)
        assert self.registers * self.warps * 32 <= REGISTERS, str(self)

    def machine_code(self) -> str:
        """The instructions of the chip, disassembled."""
        return _tool("nvdisasm", ["-c"], self.code)


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was not carried out: its kernel, its grid and all its arguments."""

    binary: Binary
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.binary}, grid {self.grid}"

    @property
    def ptx(self) -> str:
        return self.binary.ptx

    def assert_fits(self) -> None:
        self.binary.assert_fits()


@contextmanager
def compiling(target: int) -> Iterator[list[Launch]]:
    """Within it a launch compiles its kernel for a compute capability and is noted, not run. A
    kernel is cut as the rule says: there is nothing to race on.
    """
    from triton import knobs
    from triton.runtime import driver

    stand_in = _Driver(target)
    before, raced = driver._active, gpu.raced
    hooks = knobs.runtime.kernel_load_start_hook
    hooks.add(stand_in.loading)
    driver.set_active(stand_in)
    gpu.raced = _by_rule  # type: ignore[assignment]
    try:
        yield stand_in.launches
    finally:
        driver.set_active(before)
        gpu.raced = raced
        hooks.remove(stand_in.loading)


def _by_rule(_: str, among: Mapping[str, Any], *__: object) -> tuple[Any, bool]:
    return next(iter(among.values())), False


class _Driver:
    """What Triton asks of a driver on the way to a launch."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.launches: list[Launch] = []
        self.utils = self
        self._files: dict[str, Path] = {}
        self._warps = 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return -self.target  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # assert_fits says more

    def loading(
        self, module: object, function: object, name: str, files: dict[str, str], key: str
    ) -> None:
        self._files = {Path(path).suffix: Path(path) for path in files.values()}

    def launcher_cls(self, source: object, metadata: Any) -> Any:
        self._warps = metadata.num_warps
        return _note

    def load_binary(
        self, name: str, code: bytes, shared: int, device: int
    ) -> tuple[object, Binary, int, int, int]:
        used = _tool("cuobjdump", ["--dump-resource-usage"], code)
        registers, stack = (int(re.findall(rf"{what}:(\d+)", used)[0]) for what in ("REG", "STACK"))
        ptx = self._files[".ptx"].read_text(encoding="utf-8")
        binary = Binary(name, self.target, self._warps, registers, stack, shared, ptx, code)
        return self, binary, registers, stack, 1024


def _note(x: int, y: int, z: int, _stream: int, binary: Binary, *rest: Any) -> None:
    """Takes the place of a launch: Triton keeps it beside a kernel, whoever stands in by then."""
    from triton.runtime import driver

    driver.active.launches.append(Launch(binary, (x, y, z), rest[4:]))


def _tool(name: str, options: list[str], code: bytes) -> str:
    """What one of the binary tools that Triton brings says of a compiled kernel."""
    from triton.backends import nvidia

    assert nvidia.__file__ is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        tool = Path(nvidia.__file__).parent / "bin" / name
        done = subprocess.run(
            [str(tool), *options, str(path)], capture_output=True, text=True, check=True
        )
    return done.stdout
