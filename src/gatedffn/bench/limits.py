"""What this machine can do at most, measured in the same run as those who try.

Run as `python -m gatedffn.bench.limits` it is one more process that takes its turns.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gatedffn.bench.devices import HOST, Place, place_of
from gatedffn.bench.messages import Answering, Message, serve
from gatedffn.bench.workloads import Workload
from gatedffn.errors import BuildError
from gatedffn.native import load

Bound = Literal["arithmetic", "reading"]

SQUARE = 1536
"""The size of the product that PyTorch does: large enough for its best rate."""
GPU_SQUARE = 8192
COPIED = 1 << 30
"""Bytes that a GPU copies: many times its last cache."""
SECONDS = 0.1
LEAST = 4096
"""Bytes that are read at least: less has no rate of its own."""
PASSES = 12
"""Over the weights: the processor's last cache learns within some of them what to keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The rates of one turn, a second, and what they come from."""

    flops: float
    bytes: float
    sources: dict[str, float]

    def seconds(self, workload: Workload) -> float:
        """No layer can be faster: every multiply-add is done, every weight read once.

        Gating moves each of its tensors once.
        """
        return max(workload.flops / self.flops, workload.least_bytes / self.bytes)

    def bound(self, workload: Workload) -> Bound:
        """Which of the two it is."""
        arithmetic = workload.flops / self.flops >= workload.least_bytes / self.bytes
        return "arithmetic" if arithmetic else "reading"


class Limits:
    """Measures both rates: with loops of our own, and with PyTorch's operations.

    Without a compiler there are PyTorch's alone; `sources` names those that were measured.
    """

    def __init__(self, workload: Workload, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.buffer = torch.ones(max(workload.least_bytes, LEAST) // 4)
        self.square = torch.ones(SQUARE, SQUARE, dtype=workload.torch_dtype)
        self.product = torch.empty_like(self.square)
        self.bfloat16 = workload.dtype == "bfloat16"
        self.native = _native()

    def measure(self) -> Limit:
        """One turn."""
        flops = {"PyTorch's product": 2 * SQUARE**3 / _fastest(HOST, self._multiply)}
        read = {"PyTorch's sum": self.buffer.nbytes / _fastest(HOST, self.buffer.sum)}
        if self.native is not None:
            flops["multiply-adds in registers"] = self.native.fma_peak(self.threads, SECONDS)
            if self.bfloat16:
                # bfloat16 weights can also be computed with in float32, so both count.
                rate = self.native.bf16_peak(self.threads, SECONDS)
                flops["bfloat16 products in registers"] = rate
            read["streams"] = max(self._read(self.native) for _ in range(PASSES))
        return Limit(flops=max(flops.values()), bytes=max(read.values()), sources={**flops, **read})

    def _multiply(self) -> Tensor:
        return torch.mm(self.square, self.square, out=self.product)

    def _read(self, native: ctypes.CDLL) -> float:
        rate: float = native.read_rate(self.buffer.data_ptr(), self.buffer.nbytes, self.threads)
        return rate


class GpuLimits:
    """Measures both rates of a GPU with PyTorch's operations.

    The vendor's matrix product of numbers by chance, since zeros take less power and are faster,
    and the copy of a large tensor, which counts what is read and what is written.
    """

    def __init__(self, workload: Workload, place: Place) -> None:
        self.place = place
        shape = (GPU_SQUARE, GPU_SQUARE)
        self.a, self.b = (
            torch.randn(shape, device=place.tensors).to(workload.torch_dtype) for _ in range(2)
        )
        self.product = torch.empty_like(self.a)
        self.source = torch.ones(COPIED // 4, device=place.tensors)
        self.copy = torch.empty_like(self.source)

    def measure(self) -> Limit:
        """One turn."""
        product = 2 * GPU_SQUARE**3 / _fastest(self.place, self._multiply)
        copy = 2 * self.source.nbytes / _fastest(self.place, lambda: self.copy.copy_(self.source))
        sources = {"PyTorch's product": product, "PyTorch's copy": copy}
        return Limit(flops=product, bytes=copy, sources=sources)

    def _multiply(self) -> Tensor:
        return torch.mm(self.a, self.b, out=self.product)


class Repeated:
    """A function as steps that need no preparation."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        self.function()


def _fastest(place: Place, function: Callable[[], object]) -> float:
    return min(place.times(Repeated(function), SECONDS, fewest=3, most=100))


def _native() -> ctypes.CDLL | None:
    try:
        library = load(Path(__file__).with_suffix(".cpp"))
    except BuildError:
        return None
    for function in (library.fma_peak, library.bf16_peak):
        function.argtypes, function.restype = [ctypes.c_int, ctypes.c_double], ctypes.c_double
    library.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.read_rate.restype = ctypes.c_double
    return library


def _make_ready(message: Message) -> tuple[Answering, Message]:
    workload = Workload(**message["workload"])
    limits: Limits | GpuLimits
    if workload.device == "cpu":
        limits = Limits(workload, message["threads"])
    else:
        limits = GpuLimits(workload, place_of(workload.device))

    def turn(message: Message) -> Message:
        del message
        limit = limits.measure()
        return {"flops": limit.flops, "bytes": limit.bytes, "sources": limit.sources}

    return turn, {}


if __name__ == "__main__":
    serve(_make_ready)
