"""How a GPU times and counts, with a runtime that stands in for `torch.cuda`."""

import pytest
import torch

from bench.fake_gpu import Runtime
from gatedffn.bench import devices
from gatedffn.bench.devices import HOST, Cuda, Host, check_device
from gatedffn.errors import SettingError


class Clock:
    """Time that passes when told to."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds


class Cache:
    """What the GPU's cache holds; overwriting it takes time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.overwritten = False

    def zero_(self) -> None:
        self.clock.seconds += 10.0
        self.overwritten = True


class Steps:
    def __init__(self, clock: Clock, cache: Cache) -> None:
        self.clock, self.cache = clock, cache
        self.done = 0

    def prepare(self) -> None:
        self.clock.seconds += 100.0
        self.cache.overwritten = False

    def step(self) -> None:
        assert self.cache.overwritten, "the cache holds what prepared the step"
        self.done += 1
        self.clock.seconds += 0.25


def test_only_the_step_is_timed_and_the_cache_is_overwritten() -> None:
    clock = Clock()
    place = Cuda(Runtime(clock.now), "cpu")
    assert place._other_memory.nbytes == 4 * 1024
    cache = Cache(clock)
    vars(place)["_other_memory"] = cache
    steps = Steps(clock, cache)
    assert place.times(steps, 0.0, fewest=4, most=9) == [0.25] * 4
    assert steps.done == 4


class Short:
    """Steps of 20 microseconds but for the first, on a clock that takes 0.1 to read."""

    def __init__(self, *first: float) -> None:
        self.clock = Clock()
        self.done = 0
        self.first = iter(first)

    def now(self) -> float:
        self.clock.seconds += 1e-7
        return self.clock.seconds

    def prepare(self) -> None:
        raise AssertionError("nothing prepares a step on the processor")

    def step(self) -> None:
        self.done += 1
        self.clock.seconds += next(self.first, 20e-6)


def test_a_short_step_is_repeated_until_the_clock_does_not_matter() -> None:
    steps = Short()
    times = Host(steps.now).times(steps, 0.0, fewest=4, most=9)
    assert len(times) == 4
    assert times == pytest.approx([20e-6] * 4, rel=1e-4)
    assert steps.done == 1 + 2 + 4 + 8 + 16 + 32 + 4 * 64
    assert devices.SAMPLE <= 64 * 20e-6


def test_samples_of_different_lengths_do_not_mix() -> None:
    steps = Short(2e-3, 2e-3)
    times = Host(steps.now).times(steps, 0.0, fewest=3, most=9)
    assert times == pytest.approx([20e-6] * 3, rel=1e-4)


@pytest.mark.parametrize("place", [HOST, Cuda(Runtime(), "cpu")], ids=["host", "cuda"])
def test_as_many_steps_as_fit(place: devices.Place) -> None:
    class Nothing:
        def prepare(self) -> None: ...

        def step(self) -> None: ...

    assert len(place.times(Nothing(), 0.0, fewest=3, most=50)) == 3
    assert len(place.times(Nothing(), 10.0, fewest=3, most=50)) == 50


def test_steps_are_queued_many_at_a_time() -> None:
    runtime = Runtime()

    class Nothing:
        def prepare(self) -> None: ...

        def step(self) -> None: ...

    times = Cuda(runtime, "cpu").times(Nothing(), 10.0, fewest=1, most=51)
    assert len(times) == 51
    assert runtime.synchronized == 3  # after 1, 25 and 25


def test_memory_is_that_of_the_second_step() -> None:
    events: list[str] = []

    class Counting(Runtime):
        before = iter([100, 130])

        def memory_allocated(self) -> int:
            events.append("read")
            return next(self.before)

        def reset_peak_memory_stats(self) -> None:
            events.append("reset")

        def max_memory_allocated(self) -> int:
            events.append("most")
            return 180

    place = Cuda(Counting(), "cpu")
    assert place.in_use(lambda: events.append("step")) == (80, 30)
    assert events == ["read", "step", "reset", "step", "most", "read"]


def test_a_graph_is_replayed() -> None:
    steps: list[int] = []
    replay = Cuda(Runtime(), "cpu").captured(lambda: steps.append(1))
    replay()
    replay()
    assert steps == [1]
    with pytest.raises(NotImplementedError, match="there are no graphs on cpu"):
        HOST.captured(lambda: None)


def test_memory_goes_back_to_the_others() -> None:
    runtime = Runtime()
    Cuda(runtime, "cpu").release()
    assert runtime.said == ["emptied"]
    assert runtime.synchronized == 1


def test_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    card = Cuda(Runtime(), "cpu").card()
    assert card["name"] == "none"
    assert card["capability"] == "9.0"
    assert card["free_bytes"] == 3 << 30
    assert card["driver"] is None
    assert {"multiprocessors", "memory_bytes", "cache_bytes", "cuda", "triton"} <= card.keys()


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    beginning = "this machine has no CUDA device that PyTorch can use: "
    with pytest.raises(SettingError, match=f"{beginning}PyTorch .* is built without CUDA"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SettingError, match=rf"{beginning}torch.cuda.is_available\(\) is False"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device("cuda")
