"""Where a workload is computed: how steps are timed there, and what their memory is.

`Host` is the processor and its clock. `Cuda` is a GPU, whose work is queued: events in the queue
give the time, and its cache is overwritten before every step. Both have the same methods.
"""

import functools
import itertools
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch

from gatedffn.bench.workloads import Device
from gatedffn.errors import SettingError

SECOND_STEP = "gatedffn: second step"
SAMPLE = 1e-3
"""Seconds that a sample on the processor takes at least: shorter steps are repeated within it, so
that reading the clock, the loop, and what the system does meanwhile are little beside it."""
BATCH = 25
"""Steps that are queued on a GPU before their times are read."""
CACHES = 4
"""What is written before a step on a GPU, in times of its last cache."""


class Steps(Protocol):
    """What is timed: `step`, after a `prepare` that is not."""

    def prepare(self) -> None: ...

    def step(self) -> None: ...


class Place(ABC):
    """A device that contestants run on."""

    tensors: torch.device
    """Where the tensors of a workload are."""
    warm_samples: int
    """At most so many before timing, in a share of the turn's time."""

    @abstractmethod
    def times(self, steps: Steps, seconds: float, *, fewest: int, most: int) -> list[float]:
        """Of a step, by as many samples as fit into `seconds`; what prepares one is not timed."""

    @abstractmethod
    def in_use(self, step: Callable[[], None]) -> tuple[int, int]:
        """Bytes of tensors in the second of two steps, of all made since before the first.

        Returns: the most at once, and those that are left at the end.
        """

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """The same step as a graph that is launched at once."""
        raise NotImplementedError(f"there are no graphs on {self.tensors.type}")

    @abstractmethod
    def release(self) -> None:
        """Gives memory that no tensor uses back to the other processes."""


class Host(Place):
    """The processor. Short steps are repeated within a sample; nothing there prepares a step.

    Args:
        now: the clock, in seconds.
    """

    tensors = torch.device("cpu")
    warm_samples = 3

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def times(self, steps: Steps, seconds: float, *, fewest: int, most: int) -> list[float]:
        times: list[float] = []
        repeats, end = 1, self.now() + seconds
        while len(times) < fewest or (len(times) < most and self.now() < end):
            taken = self._sample(steps.step, repeats)
            if taken < SAMPLE:
                repeats *= 2
                times.clear()
            else:
                times.append(taken / repeats)
        return times

    def _sample(self, step: Callable[[], None], repeats: int) -> float:
        start = self.now()
        for _ in itertools.repeat(None, repeats):
            step()
        return self.now() - start

    def in_use(self, step: Callable[[], None]) -> tuple[int, int]:
        # The profiler's library reports its start and stop on the terminal unless told otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            step()
            with torch.profiler.record_function(SECOND_STEP):
                step()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        start = min(event.start_ns() for event in events if event.name() == SECOND_STEP)
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                if event.start_ns() >= start:
                    most = max(most, held)
        return most, held

    def release(self) -> None:
        pass  # as the allocator does by itself


class Cuda(Place):
    """The current GPU.

    Args:
        runtime: `torch.cuda`, or what stands in for it in a test.
        tensors: where the tensors are.
    """

    warm_samples = 100

    def __init__(self, runtime: Any = torch.cuda, tensors: str = "cuda") -> None:
        self.runtime = runtime
        self.tensors = torch.device(tensors)

    @functools.cached_property
    def _properties(self) -> Any:
        return self.runtime.get_device_properties(self.tensors)

    @functools.cached_property
    def _other_memory(self) -> torch.Tensor:
        size = CACHES * self._properties.L2_cache_size
        return torch.empty(size, dtype=torch.uint8, device=self.tensors)

    def times(self, steps: Steps, seconds: float, *, fewest: int, most: int) -> list[float]:
        times: list[float] = []
        end, batch = time.perf_counter() + seconds, 1
        while len(times) < fewest or (len(times) < most and time.perf_counter() < end):
            start = time.perf_counter()
            queued = [self._queue(steps) for _ in range(batch)]
            self.runtime.synchronize()
            times += [before.elapsed_time(after) / 1e3 for before, after in queued]
            each = (time.perf_counter() - start) / batch
            fitting = int(max(end - time.perf_counter(), 0.0) / each)
            batch = max(1, min(fitting, BATCH, most - len(times)))
        return times

    def _queue(self, steps: Steps) -> tuple[Any, Any]:
        """Queues a step between two events.

        The memory that is written first takes the GPU longer than the launches of most steps take
        the processor: these are then queued by the time that the step begins.
        """
        before, after = (self.runtime.Event(enable_timing=True) for _ in range(2))
        steps.prepare()
        self._other_memory.zero_()
        before.record()
        steps.step()
        after.record()
        return before, after

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = self.runtime.CUDAGraph()
        with self.runtime.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def in_use(self, step: Callable[[], None]) -> tuple[int, int]:
        before = self.runtime.memory_allocated()
        step()
        self.runtime.reset_peak_memory_stats()
        step()
        most = self.runtime.max_memory_allocated() - before
        return most, self.runtime.memory_allocated() - before

    def release(self) -> None:
        self.runtime.synchronize()
        self.runtime.empty_cache()

    def card(self) -> dict[str, Any]:
        """What the figures of the GPU depend on, and how much of its memory was free."""
        properties = self._properties
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "free_bytes": self.runtime.mem_get_info()[0],
            "cache_bytes": properties.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        }


HOST = Host()


@functools.cache
def cuda() -> Cuda:
    """The GPU of this process."""
    return Cuda()


def place_of(device: Device) -> Place:
    """Where workloads of that device are computed."""
    return HOST if device == "cpu" else cuda()


def check_device(device: Device) -> None:
    """Raises unless workloads of that device can be computed here.

    Raises:
        SettingError: there is no GPU that PyTorch can use.
    """
    if device == "cpu" or torch.cuda.is_available():
        return
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"PyTorch {torch.__version__} is built without CUDA; install a build with it"
    else:
        reason = "torch.cuda.is_available() is False; nvidia-smi says what the driver sees"
    raise SettingError(f"this machine has no CUDA device that PyTorch can use: {reason}")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
