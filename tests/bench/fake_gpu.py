"""A GPU that is none: CPU tensors, a clock of its own, and peers that behave as the real ones.

Run as `python -m fake_gpu` it is a worker, the limits or the memory of a measurement, by what its
command line gets.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.bench import devices, gpu_peers, limits, memory, worker
from gatedffn.bench.messages import serve


class Runtime:
    """What is used of `torch.cuda`. Time is read from `now`; nothing is known before it is over."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.synchronized = 0
        self.said: list[str] = []
        self.graphs: list[Graph] = []
        self.Event = lambda enable_timing: Event(self, enable_timing)
        self.CUDAGraph = Graph

    def synchronize(self) -> None:
        self.synchronized += 1

    def empty_cache(self) -> None:
        self.said.append("emptied")

    def reset_peak_memory_stats(self) -> None:
        self.said.append("reset")

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return 10**6

    def mem_get_info(self) -> tuple[int, int]:
        return 3 << 30, 4 << 30

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            name="none",
            major=9,
            minor=0,
            multi_processor_count=1,
            total_memory=4 << 30,
            L2_cache_size=1024,
        )

    @contextlib.contextmanager
    def graph(self, graph: "Graph") -> Iterator[None]:
        graph.captured = True
        self.graphs.append(graph)
        yield


class Graph:
    """It has seen nothing: a replay leaves what the captured step left."""

    captured = False
    replays = 0

    def replay(self) -> None:
        assert self.captured
        self.replays += 1


class Event:
    """A point in time that can be read once the queue is empty."""

    def __init__(self, runtime: Runtime, enable_timing: bool) -> None:
        assert enable_timing
        self.runtime = runtime

    def record(self) -> None:
        self.seconds, self.before = self.runtime.now(), self.runtime.synchronized

    def elapsed_time(self, other: "Event") -> float:
        assert self.runtime.synchronized > other.before, "read before it is over"
        return 1e3 * (other.seconds - self.seconds)


class SiLUMul(torch.autograd.Function):
    """As Liger-Kernel's: backward writes the gradients over the branches."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            leaves = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
            made = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, grad.float())
        for branch, gradient in zip((a, b), made, strict=True):
            branch.data.copy_(gradient)
        return a.detach(), b.detach()


class MLP(nn.Module):
    """As quack's: the first projection's rows are a gate's, a up one's, and so on."""

    def __init__(
        self, d_model: int, d_hidden: int, activation: str, device: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        made = {"bias": False, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(d_model, (1 + self.gated) * d_hidden, **made)  # type: ignore[arg-type]
        self.fc2 = nn.Linear(d_hidden, d_model, **made)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc1(x)
        hidden = F.silu(first[..., ::2]) * first[..., 1::2] if self.gated else F.relu(first)
        output: Tensor = self.fc2(hidden)
        return output


def modules() -> dict[str, ModuleType]:
    """The peers' modules by name."""
    contents: dict[str, dict[str, object]] = {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": SiLUMul},
        "quack": {},
        "quack.mlp": {"MLP": MLP},
    }
    found = {}
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        found[name] = module
    return found


def bring_modules() -> None:
    """Makes the peers importable in this process."""
    sys.modules.update(modules())


def install(put: Callable[[object, str, object], None], runtime: Runtime | None = None) -> None:
    """Makes this process one with that GPU and those peers; `put` is `setattr`, or undoes it."""
    place = devices.Cuda(runtime or Runtime(), "cpu")
    put(devices, "cuda", lambda: place)
    put(gpu_peers.Liger, "needs", ("liger_kernel",))
    put(gpu_peers.Quack, "needs", ("quack",))
    put(limits, "GPU_SQUARE", 64)
    put(limits, "COPIED", 4096)
    put(limits, "SECONDS", 0.002)


if __name__ == "__main__":
    install(setattr)
    bring_modules()
    if len(sys.argv) == 1:
        serve(limits._make_ready)
    elif ":" in sys.argv[1]:
        worker.main()
    else:
        serve(memory._make_ready)
