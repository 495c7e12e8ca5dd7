"""Choosing among equal ways: measured once, kept, shared, and never in the way."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.ops import choice

KEY = ("forward", torch.float32, 4)


class Clock:
    """Time that only the ways themselves let pass, so that nothing here depends on the machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def ways(self, **seconds: float) -> Callable[[], choice.Ways]:
        """Ways that let so much time pass, and note that they ran."""

        def way(name: str) -> Callable[[], object]:
            def run() -> None:
                self.runs.append(name)
                self.now += seconds[name]

            return run

        return lambda: {name: way(name) for name in seconds}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(choice, "PATIENCE", math.inf)
    return clock


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test's own, and nothing chosen yet."""
    before = dict(choice._made)
    with monkeypatch.context() as environment:
        environment.setenv("GATEDFFN_CACHE", str(tmp_path / "cache"))
        environment.delenv("GATEDFFN_TUNE", raising=False)
        a_new_process()
        yield tmp_path / "cache"
    a_new_process()
    choice._made.update(before)


def a_new_process() -> None:
    """Forgets all that a process holds; what is on disk stays."""
    choice.forget()
    choice._file.cache_clear()
    choice._switched_off.cache_clear()


def stored() -> Path:
    path = choice._file()
    assert path is not None
    return path


# measuring


def test_the_fastest_is_taken(clock: Clock) -> None:
    assert choice.choose(KEY, clock.ways(first=0.004, second=0.003, third=0.001)) == "third"
    found = choice.known(KEY)
    assert found is not None
    assert found.reason == "measured"
    assert found.milliseconds == pytest.approx({"first": 4.0, "second": 3.0, "third": 1.0})


@pytest.mark.parametrize(("seconds", "chosen"), [(0.96, "first"), (0.94, "second")])
def test_the_first_is_left_only_for_a_clear_gain(clock: Clock, seconds: float, chosen: str) -> None:
    assert choice.choose(KEY, clock.ways(first=1.0, second=seconds)) == chosen


def test_the_least_of_several_rounds_counts_and_the_first_run_does_not(clock: Clock) -> None:
    seconds = iter([0.1, *[5.0] * (choice.ROUNDS - 2), 2.0, 4.0])

    def way() -> None:
        clock.now += next(seconds)

    assert choice._race({"only": way}) == pytest.approx({"only": 2.0})
    assert next(seconds, None) is None


def test_ways_take_turns(clock: Clock) -> None:
    choice._race(clock.ways(first=0.003, second=0.002)())
    assert clock.runs == ["first", "second"] * (1 + choice.ROUNDS)


def test_long_ways_are_measured_twice_at_most(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "PATIENCE", 2.0)
    choice._race(clock.ways(first=9.0, second=8.0)())
    assert clock.runs.count("first") == clock.runs.count("second") == 1 + 2


@pytest.mark.parametrize("kind", [RuntimeError, Exception], ids=["PyTorch", "Triton"])
def test_a_way_that_fails_is_out(clock: Clock, kind: type[Exception]) -> None:
    def broken() -> None:
        raise kind("no primitive")

    ways = {**clock.ways(first=1.0, second=0.5)(), "broken": broken}
    assert set(choice._race(ways)) == {"first", "second"}
    with pytest.raises(kind, match="no primitive"):  # nothing is left to fall back on
        choice._race({"broken": broken, **clock.ways(second=0.5)()})


def test_who_is_far_behind_is_not_measured_again(clock: Clock) -> None:
    found = choice._race(clock.ways(slow=9.0, fast=1.0, near=1.5)())
    assert found == pytest.approx({"slow": 9.0, "fast": 1.0, "near": 1.5})
    assert clock.runs.count("slow") == 2  # once to warm up
    assert clock.runs.count("near") == clock.runs.count("fast") == 1 + choice.ROUNDS


def test_short_ways_are_repeated_until_they_have_taken_long_enough(clock: Clock) -> None:
    found = choice._race(clock.ways(only=choice.ENOUGH / 4)())
    assert found == pytest.approx({"only": choice.ENOUGH / 4})
    assert len(clock.runs) >= 1 + 4 * choice.ROUNDS


def test_a_single_way_is_not_run(clock: Clock) -> None:
    assert choice.choose(KEY, clock.ways(only=1.0)) == "only"
    assert clock.runs == []
    assert not stored().exists()


# keeping


def test_a_choice_holds_for_the_process(clock: Clock) -> None:
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"
    runs = len(clock.runs)
    # Neither another speed nor another's file changes it: equal calls give equal numbers.
    stored().write_text("{}", encoding="utf-8")
    assert choice.choose(KEY, clock.ways(first=1.0, second=2.0)) == "second"
    assert len(clock.runs) == runs


def test_each_key_has_its_own_choice(clock: Clock) -> None:
    other = (*KEY, "other")
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"
    assert choice.choose(other, clock.ways(first=1.0, second=2.0)) == "first"
    assert choice.known((*KEY, "third")) is None
    assert set(json.loads(stored().read_text(encoding="utf-8"))) == {str(KEY), str(other)}


def test_the_next_process_takes_the_stored_choice(clock: Clock) -> None:
    choice.choose(KEY, clock.ways(first=2.0, second=1.0))
    measured = choice.known(KEY)
    runs = len(clock.runs)
    a_new_process()
    assert choice.known(KEY) is None
    assert choice.choose(KEY, clock.ways(first=1.0, second=2.0)) == "second"
    assert len(clock.runs) == runs
    adopted = choice.known(KEY)
    assert measured is not None
    assert adopted is not None
    assert adopted.milliseconds == measured.milliseconds
    assert adopted.reason == "measured by an earlier process"


ANOTHER_PROCESS = """
from torch import float32
from gatedffn.ops import choice
def run(): raise AssertionError("measured, though it is stored")
print(choice.choose(("forward", float32, 4), lambda: {"first": run, "second": run}))
"""


def test_a_process_of_its_own_takes_the_stored_choice(clock: Clock) -> None:
    choice.choose(KEY, clock.ways(first=2.0, second=1.0))
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "second", done.stderr


def test_the_first_writer_wins(clock: Clock) -> None:
    """Another process stores its choice while this one measures: both take that one."""

    def ways() -> choice.Ways:
        made = dict(clock.ways(first=2.0, second=1.0)())

        def first() -> None:
            clock.now += 2.0
            entry = {"chosen": "first", "milliseconds": {"first": 1.0, "second": 2.0}}
            stored().write_text(json.dumps({str(KEY): entry}), encoding="utf-8")

        return made | {"first": first}

    assert choice.choose(KEY, ways) == "first"
    assert json.loads(stored().read_text(encoding="utf-8"))[str(KEY)]["chosen"] == "first"


def test_what_others_stored_meanwhile_stays(clock: Clock) -> None:
    choice.choose(KEY, clock.ways(first=2.0, second=1.0))
    a_new_process()
    choice.choose((*KEY, "other"), clock.ways(first=1.0, second=2.0))
    a_new_process()
    assert choice.choose(KEY, clock.ways(first=1.0, second=2.0)) == "second"


def test_another_version_or_machine_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {stored()}
    for owner, name, value in (
        (native, "processor", lambda: "another"),
        (native, "source_version", lambda: "another"),
        (torch, "__version__", "another"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            choice._file.cache_clear()
            paths.add(stored())
    assert len(paths) == 4


# by rule


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "false"])
def test_switched_off_the_first_is_taken_and_nothing_runs(
    word: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEDFFN_TUNE", word)
    a_new_process()
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "first"
    assert clock.runs == []
    assert choice.known(KEY) is None
    assert not stored().exists()


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_under_deterministic_algorithms_the_first_is_taken(clock: Clock) -> None:
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "first"
    assert clock.runs == []


def test_the_rule_wins_over_what_was_measured(clock: Clock) -> None:
    ways = clock.ways(first=2.0, second=1.0)
    assert choice.choose(KEY, ways) == "second"
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.choose(KEY, ways) == "first"
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.choose(KEY, ways) == "second"


# files that are of no use

ENTRY = {"chosen": "first", "milliseconds": {}}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "cut_off": b'{"forward',
    "not_text": b"\xff\xfe\x00",
    "a_list": b"[]",
    "a_number": b"1",
    "nan": b"NaN",
    "an_entry_that_is_text": json.dumps({str(KEY): "first"}).encode(),
    "an_entry_that_is_null": json.dumps({str(KEY): None}).encode(),
    "a_choice_that_is_a_list": json.dumps({str(KEY): ENTRY | {"chosen": ["first"]}}).encode(),
    "times_that_are_a_list": json.dumps({str(KEY): ENTRY | {"milliseconds": [1]}}).encode(),
    "no_times": json.dumps({str(KEY): {"chosen": "first"}}).encode(),
    "a_way_that_does_not_exist": json.dumps({str(KEY): ENTRY | {"chosen": "gone"}}).encode(),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_a_file_that_is_of_no_use_is_ignored_and_replaced(content: bytes, clock: Clock) -> None:
    stored().write_bytes(content)
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"
    found = choice.known(KEY)
    assert found is not None
    assert found.reason == "measured"
    assert json.loads(stored().read_text(encoding="utf-8"))[str(KEY)]["chosen"] == "second"


def test_without_a_cache_folder_a_choice_holds_for_the_process(clock: Clock, folder: Path) -> None:
    folder.write_text("a file is in the way", encoding="utf-8")
    with pytest.raises(BuildError):
        native.cache_folder()
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"
    runs = len(clock.runs)
    assert choice.choose(KEY, clock.ways(first=1.0, second=2.0)) == "second"
    assert len(clock.runs) == runs
    assert choice.stored() == {}


# Known faults of gatedffn.ops.choice: see the reasons.


def test_a_file_that_nests_too_deep_is_ignored(clock: Clock) -> None:
    stored().write_bytes(b"[" * 100_000)
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"


def test_a_file_that_cannot_be_written_does_not_stop_the_call(clock: Clock) -> None:
    stored().with_suffix(".lock").mkdir()
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"


def test_a_file_that_cannot_be_replaced_does_not_stop_the_call(clock: Clock) -> None:
    stored().mkdir()
    assert choice.choose(KEY, clock.ways(first=2.0, second=1.0)) == "second"
