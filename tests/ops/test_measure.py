"""Choosing among equal ways: measured once, kept, shared, and never in the way."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.ops import measure

KEY = "forward, float32, up to 4 tokens"


class Clock:
    """Time that only the ways themselves let pass, so that nothing here depends on the machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def choose(self, key: str = KEY, **ways: float | Callable[[], None]) -> measure.Choice:
        """The choice among ways that let so many seconds pass, and note that they ran."""

        def trial(name: str, takes: float) -> None:
            self.runs.append(name)
            self.now += takes

        trials = {
            name: way if callable(way) else partial(trial, name, way) for name, way in ways.items()
        }
        return measure.choose(key, list(ways), lambda: trials)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(measure, "PATIENCE", math.inf)
    return clock


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test's own, and nothing chosen yet."""
    before = dict(measure._made)
    with monkeypatch.context() as environment:
        environment.setenv("GATEDFFN_CACHE", str(tmp_path / "cache"))
        environment.delenv("GATEDFFN_TUNE", raising=False)
        a_new_process()
        yield tmp_path / "cache"
    a_new_process()
    measure._made.update(before)


def a_new_process() -> None:
    """Forgets all that a process holds; what is on disk stays."""
    measure.forget()
    measure._file.cache_clear()
    measure._switched_off.cache_clear()
    measure.not_kept.cache_clear()


def stored() -> Path:
    path = measure._file()
    assert path is not None
    return path


# measuring


def test_the_fastest_is_taken(clock: Clock) -> None:
    found = clock.choose(first=0.004, second=0.003, third=0.001)
    assert found == measure.known(KEY)
    assert (found.chosen, found.reason) == ("third", "measured")
    assert found.milliseconds == pytest.approx({"first": 4.0, "second": 3.0, "third": 1.0})


@pytest.mark.parametrize(("seconds", "chosen"), [(0.96, "first"), (0.94, "second")])
def test_the_first_is_left_only_for_a_clear_gain(clock: Clock, seconds: float, chosen: str) -> None:
    assert clock.choose(first=1.0, second=seconds).chosen == chosen


def test_the_least_of_several_rounds_counts_and_the_first_run_does_not(clock: Clock) -> None:
    seconds = iter([0.1, *[5.0] * (measure.ROUNDS - 2), 2.0, 4.0])

    def way() -> None:
        clock.now += next(seconds)

    assert clock.choose(first=way, second=3.0).milliseconds == pytest.approx(
        {"first": 2e3, "second": 3e3}
    )
    assert next(seconds, None) is None


def test_ways_take_turns(clock: Clock) -> None:
    clock.choose(first=0.003, second=0.002)
    assert clock.runs == ["first", "second"] * (1 + measure.ROUNDS)


def test_long_ways_are_measured_twice_at_most(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PATIENCE", 2.0)
    clock.choose(first=9.0, second=8.0)
    assert clock.runs.count("first") == clock.runs.count("second") == 1 + 2


@pytest.mark.parametrize("kind", [RuntimeError, Exception], ids=["PyTorch", "Triton"])
def test_a_way_that_fails_is_out(clock: Clock, kind: type[Exception]) -> None:
    def broken() -> None:
        raise kind("no primitive")

    assert set(clock.choose(first=1.0, broken=broken, third=0.5).milliseconds) == {"first", "third"}
    assert clock.choose("other", broken=broken, second=0.5).chosen == "second"
    with pytest.raises(kind, match="no primitive"):  # nothing is left to fall back on
        clock.choose("alone", broken=broken)


def test_who_is_far_behind_is_not_measured_again(clock: Clock) -> None:
    found = clock.choose(slow=9.0, fast=1.0, near=1.5).milliseconds
    assert found == pytest.approx({"slow": 9e3, "fast": 1e3, "near": 1.5e3})
    assert clock.runs.count("slow") == 1 + 2  # once to warm up, and two rounds that agree
    assert clock.runs.count("near") == clock.runs.count("fast") == 1 + measure.ROUNDS


def test_short_ways_are_repeated_until_they_have_taken_long_enough(clock: Clock) -> None:
    short = measure.ENOUGH / 4
    found = clock.choose(first=short, second=short)
    assert found.milliseconds == pytest.approx({"first": 1e3 * short, "second": 1e3 * short})
    assert clock.runs.count("first") >= 1 + 4 * measure.ROUNDS


# rounds that disagree


def of_rounds(clock: Clock, *rounds: float) -> Callable[[], None]:
    """A way whose rounds take so many seconds in turn, and the last of them from then on."""
    left = [rounds[0], *rounds]  # the first run is no round

    def way() -> None:
        clock.runs.append("way")
        clock.now += left.pop(0) if len(left) > 1 else left[0]

    return way


QUIET, BUSY = (1.0,), (1.0, 1.5, 2.0, 3.0, 2.5, *[1.5] * 20)


@pytest.mark.parametrize(
    ("first", "second", "doubtful"),
    [
        (QUIET, (1.2,), False),
        (QUIET, (0.97, 0.98, 0.99), False),  # the gain would not be worth it
        (QUIET, (1.1, 1.4, 1.9, 1.6, *[1.4] * 20), True),  # it may take 0.8
        (QUIET, (1.1, 9.0, 9.0, 1.11, 1.12), False),  # three agree
        (QUIET, (1.1, 9.0, 9.0, 9.0, 9.0, 1.11, 1.12), False),  # three agree when repeated
        (BUSY, (0.9,), True),  # who is listed first, too
        (BUSY, (1.6,), False),  # what disturbs only adds, so it is no reason against the fastest
        (QUIET, (3.0, 9.0, 4.0, 5.0, 3.5), False),  # too far behind for that to matter
    ],
)
def test_a_choice_is_doubtful_if_another_way_could_clearly_beat_it(
    first: Sequence[float], second: Sequence[float], doubtful: bool, clock: Clock
) -> None:
    found = clock.choose(first=of_rounds(clock, *first), second=of_rounds(clock, *second))
    assert found.doubts == doubtful
    assert ("doubtful" in found.reason) == doubtful


def test_a_measurement_is_repeated_until_rounds_agree_or_it_was_often_enough(clock: Clock) -> None:
    def rounds(*of: float) -> int:
        clock.runs.clear()
        clock.choose(str(of), first=of_rounds(clock, *of), second=1.0)
        return clock.runs.count("way") - 1

    assert rounds(1.1) == measure.ROUNDS
    assert rounds(1.1, 1.5, 1.8, 1.6, 1.5, 1.1) == 2 * measure.ROUNDS
    assert rounds(1.1, 1.5, 1.8, 1.6, *[1.5] * 20) == measure.TIMES * measure.ROUNDS


def test_who_was_disturbed_once_is_not_out(clock: Clock) -> None:
    way = of_rounds(clock, 50.0, 0.5)
    assert clock.choose(first=1.0, second=way).chosen == "second"


def measured_by_processes(clock: Clock, *of: Sequence[float]) -> list[measure.Choice]:
    """What processes one after another choose when the second way's rounds take so long."""
    found = []
    for rounds in of:
        a_new_process()
        found.append(clock.choose(first=1.0, second=of_rounds(clock, *rounds)))
    return found


def test_what_is_doubtful_is_measured_again_by_the_next_process(clock: Clock) -> None:
    doubtful, clear, after = measured_by_processes(clock, BUSY, (0.5,), (9.0,))
    assert (doubtful.chosen, doubtful.doubts, doubtful.reason) == (
        "first",
        1,
        "measured, doubtful: rounds disagreed 1 time, a later process measures again",
    )
    assert (clear.chosen, clear.doubts, clear.reason) == ("second", 0, "measured")
    assert after == replace(clear, by="measured by an earlier process")


def test_what_stays_doubtful_is_kept_after_some_processes(clock: Clock) -> None:
    found = measured_by_processes(clock, *[BUSY] * measure.TIMES, (0.5,), (0.5,))
    assert [choice.doubts for choice in found] == [1, 2, 3, 3, 3]
    assert {choice.chosen for choice in found} == {"first"}
    assert found[-1].reason == (
        "measured by an earlier process, doubtful: rounds disagreed 3 times, it stays"
    )


def test_a_doubtful_choice_holds_for_its_process(clock: Clock) -> None:
    (doubtful,) = measured_by_processes(clock, BUSY)
    assert clock.choose(first=1.0, second=0.5) is doubtful


def test_of_two_that_measure_a_doubtful_choice_again_the_first_writer_wins(clock: Clock) -> None:
    measured_by_processes(clock, BUSY)
    a_new_process()

    def second() -> None:
        clock.now += 0.5
        entry = {"chosen": "first", "milliseconds": {"first": 1.0}, "doubts": 2}
        stored().write_text(json.dumps({KEY: entry}), encoding="utf-8")

    assert clock.choose(first=1.0, second=second).chosen == "first"
    assert json.loads(stored().read_text(encoding="utf-8"))[KEY]["doubts"] == 2


def test_an_older_file_has_no_doubts(clock: Clock) -> None:
    entry = {"chosen": "second", "milliseconds": {"first": 2.0, "second": 1.0}}
    stored().write_text(json.dumps({KEY: entry}), encoding="utf-8")
    found = clock.choose(first=1.0, second=2.0)
    assert (found.chosen, found.reason) == ("second", "measured by an earlier process")


# keeping


def test_a_choice_holds_for_the_process(clock: Clock) -> None:
    chosen = clock.choose(first=2.0, second=1.0)
    assert chosen.chosen == "second"
    runs = len(clock.runs)
    # Neither another speed nor another's file changes it: equal calls give equal numbers.
    stored().write_text("{}", encoding="utf-8")
    assert clock.choose(first=1.0, second=2.0) is chosen
    assert len(clock.runs) == runs


def test_a_choice_that_is_none_of_the_ways_is_made_anew(clock: Clock) -> None:
    assert clock.choose(first=2.0, second=1.0).chosen == "second"
    assert clock.choose(first=2.0, third=3.0).chosen == "first"
    a_new_process()
    found = clock.choose(first=2.0, second=1.0)
    assert (found.chosen, found.reason) == ("first", "measured by an earlier process")


def test_each_key_has_its_own_choice(clock: Clock) -> None:
    assert clock.choose(first=2.0, second=1.0).chosen == "second"
    assert clock.choose("other", first=1.0, second=2.0).chosen == "first"
    assert measure.known("third") is None
    assert set(json.loads(stored().read_text(encoding="utf-8"))) == {KEY, "other"}


def test_the_next_process_takes_the_stored_choice(clock: Clock) -> None:
    measured = clock.choose(first=2.0, second=1.0)
    runs = len(clock.runs)
    a_new_process()
    assert measure.known(KEY) is None
    adopted = clock.choose(first=1.0, second=2.0)
    assert len(clock.runs) == runs
    assert adopted == replace(measured, by="measured by an earlier process")


ANOTHER_PROCESS = """
from gatedffn.ops import measure
def trials(): raise AssertionError("measured, though it is stored")
print(measure.choose("forward, float32, up to 4 tokens", ["first", "second"], trials).chosen)
"""


def test_a_process_of_its_own_takes_the_stored_choice(clock: Clock) -> None:
    clock.choose(first=2.0, second=1.0)
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "second", done.stderr


def test_the_first_writer_wins(clock: Clock) -> None:
    """Another process stores its choice while this one measures: both take that one."""

    def first() -> None:
        clock.now += 2.0
        entry = {"chosen": "first", "milliseconds": {"first": 1.0, "second": 2.0}}
        stored().write_text(json.dumps({KEY: entry}), encoding="utf-8")

    assert clock.choose(first=first, second=1.0).chosen == "first"
    assert json.loads(stored().read_text(encoding="utf-8"))[KEY]["chosen"] == "first"


def test_what_others_stored_meanwhile_stays(clock: Clock) -> None:
    clock.choose(first=2.0, second=1.0)
    a_new_process()
    clock.choose("other", first=1.0, second=2.0)
    a_new_process()
    assert clock.choose(first=1.0, second=2.0).chosen == "second"


def test_another_version_or_machine_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {stored()}
    for owner, name, value in (
        (native, "processor", lambda: "another"),
        (native, "source_version", lambda: "another"),
        (torch, "__version__", "another"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            measure._file.cache_clear()
            paths.add(stored())
    assert len(paths) == 4


# by rule


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "false"])
def test_measuring_is_switched_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.tuning()
    monkeypatch.setenv("GATEDFFN_TUNE", word)
    assert measure.tuning()  # the environment is read once
    a_new_process()
    assert not measure.tuning()


def test_nothing_is_measured_under_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert not measure.tuning()
    finally:
        torch.use_deterministic_algorithms(False)
    assert measure.tuning()


# files that are of no use

ENTRY = {"chosen": "first", "milliseconds": {}}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "cut_off": b'{"forward',
    "not_text": b"\xff\xfe\x00",
    "a_list": b"[]",
    "a_number": b"1",
    "nan": b"NaN",
    "an_entry_that_is_text": json.dumps({KEY: "first"}).encode(),
    "an_entry_that_is_null": json.dumps({KEY: None}).encode(),
    "a_choice_that_is_a_list": json.dumps({KEY: ENTRY | {"chosen": ["first"]}}).encode(),
    "times_that_are_a_list": json.dumps({KEY: ENTRY | {"milliseconds": [1]}}).encode(),
    "times_that_are_not_numbers": json.dumps(
        {KEY: ENTRY | {"milliseconds": {"first": math.nan}}}
    ).encode(),
    "doubts_that_are_text": json.dumps({KEY: ENTRY | {"doubts": "1"}}).encode(),
    "doubts_below_none": json.dumps({KEY: ENTRY | {"doubts": -1}}).encode(),
    "no_times": json.dumps({KEY: {"chosen": "first"}}).encode(),
    "a_way_that_does_not_exist": json.dumps({KEY: ENTRY | {"chosen": "gone"}}).encode(),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_a_file_that_is_of_no_use_is_ignored_and_replaced(content: bytes, clock: Clock) -> None:
    stored().write_bytes(content)
    found = clock.choose(first=2.0, second=1.0)
    assert (found.chosen, found.reason) == ("second", "measured")
    assert json.loads(stored().read_text(encoding="utf-8"))[KEY]["chosen"] == "second"


def test_without_a_cache_folder_a_choice_holds_for_the_process(clock: Clock, folder: Path) -> None:
    folder.write_text("a file is in the way", encoding="utf-8")
    with pytest.raises(BuildError):
        native.cache_folder()
    assert clock.choose(first=2.0, second=1.0).chosen == "second"
    runs = len(clock.runs)
    assert clock.choose(first=1.0, second=2.0).chosen == "second"
    assert len(clock.runs) == runs
    assert measure.stored() == {}


def test_that_choices_are_not_kept_is_said_once(
    clock: Clock, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file is in the way", encoding="utf-8")
    clock.choose(first=2.0, second=1.0)
    clock.choose("other", first=2.0, second=1.0)
    (said,) = caplog.messages
    assert "equal seeds then differ by rounding (GATEDFFN_TUNE=off chooses by rule)" in said


def test_that_a_choice_cannot_be_written_is_said_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stored().with_suffix(".lock").mkdir()
    clock.choose(first=2.0, second=1.0)
    clock.choose("other", first=2.0, second=1.0)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("suffix", [".json", ".lock"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(suffix: str, clock: Clock) -> None:
    os.mkfifo(stored().with_suffix(suffix))
    assert measure.stored() == {}
    assert clock.choose(first=2.0, second=1.0).chosen == "second"


def test_another_process_that_writes_for_ever_is_not_waited_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LOCKED", 0.1)
    with native.alone(stored().with_suffix(".lock"), 1.0):
        assert clock.choose(first=2.0, second=1.0).chosen == "second"


FORKED_WHILE_MEASURING = """
import os, signal, threading
from gatedffn.ops import measure

measuring, done = threading.Event(), threading.Event()

def slow():
    measuring.set()
    done.wait(60)

choose = lambda: measure.choose("a", ["first"], lambda: {"first": slow})
threading.Thread(target=choose, daemon=True).start()
measuring.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    found = measure.choose("b", ["first"], lambda: {"first": measure.nothing})
    os._exit(0 if found.chosen == "first" else 1)
status = os.waitpid(child, 0)[1]
done.set()
os._exit(os.waitstatus_to_exitcode(status) & 127)
"""

FORKED_WITH_A_FILE_OPEN = """
import os, pathlib, signal, sys
from gatedffn import native

lock = pathlib.Path(sys.argv[1])
with native.alone(lock, 5.0):
    child = os.fork()
    if not child:
        signal.pause()
try:
    with native.alone(lock, 5.0):
        pass
finally:
    os.kill(child, signal.SIGKILL)
"""


@pytest.mark.parametrize("program", [FORKED_WHILE_MEASURING, FORKED_WITH_A_FILE_OPEN])
def test_a_process_that_is_forked_waits_for_no_lock(program: str, tmp_path: Path) -> None:
    # In a process of its own: a fork of this one may need more memory than there is.
    environment = os.environ | {"GATEDFFN_CACHE": str(tmp_path / "cache"), "GATEDFFN_TUNE": ""}
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    assert subprocess.run(command, env=environment, timeout=150, check=False).returncode == 0


def test_a_file_that_nests_too_deep_is_ignored(clock: Clock) -> None:
    stored().write_bytes(b"[" * 100_000)
    assert clock.choose(first=2.0, second=1.0).chosen == "second"


def test_a_file_that_cannot_be_written_does_not_stop_the_call(clock: Clock) -> None:
    stored().with_suffix(".lock").mkdir()
    assert clock.choose(first=2.0, second=1.0).chosen == "second"


def test_a_file_that_cannot_be_replaced_does_not_stop_the_call(clock: Clock) -> None:
    stored().mkdir()
    assert clock.choose(first=2.0, second=1.0).chosen == "second"
