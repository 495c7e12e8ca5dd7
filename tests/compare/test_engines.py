"""Several workers, here and over one folder: the numbers of one, each of them once."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compare.conftest import Log, command, numbers
from gatedffn.compare.checkpoints import SEAL
from gatedffn.compare.engines.processes import Processes
from gatedffn.compare.engines.speed import Workers, sequences_per_second
from gatedffn.compare.execute import execute
from gatedffn.compare.schedule import Extent
from gatedffn.compare.settings import Run, Setting
from gatedffn.compare.study import Prepared, prepare, study
from gatedffn.compare.team import Team
from gatedffn.errors import RunError, SettingError
from gatedffn.ops import measure


@pytest.fixture
def prepared(tiny: Setting, prose: Path) -> Prepared:
    return prepare(replace(tiny, checkpoint_every=5), [str(prose)])


@pytest.fixture
def whole(prepared: Prepared, tmp_path: Path) -> dict[str, Any]:
    """The numbers of a study that nothing disturbed."""
    study(prepared, tmp_path / "whole", Log())
    return numbers(tmp_path / "whole")


class Killer(Log):
    """Kills a worker at some steps, counted over all runs."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, run: Run, step: int, loss: float | None) -> None:
        super().step(run, step, loss)
        if len(self.steps) in self.at:
            victim = random.Random(len(self.steps)).choice(multiprocessing.active_children())
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)


def test_killed_workers_change_nothing(
    prepared: Prepared, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder, killer = tmp_path / "killed", Killer(7, 30)
    result = study(prepared, folder, killer, workers=2)
    assert result is not None
    assert [row.seeds for row in result.rows] == [2, 2]
    assert numbers(folder) == whole
    assert Counter(killer.begun) == dict.fromkeys(killer.begun, 1)
    assert sum("SIGKILL" in note for note in killer.notes) == 2
    assert not multiprocessing.active_children()
    assert not any((folder / "unfinished").iterdir())


def test_a_run_that_kills_its_worker_again_and_again_is_given_up(
    prepared: Prepared, tmp_path: Path
) -> None:
    class Always(Log):
        def step(self, run: Run, step: int, loss: float | None) -> None:
            for child in multiprocessing.active_children():
                child.kill()

    one = replace(prepared.setting, checkpoint_every=0, variants=("relu",), seeds=1)
    with pytest.raises(RunError, match=r"seed 0.* its process ended 3 times \(killed by SIGKILL\)"):
        study(replace(prepared, setting=one), tmp_path, Always(), workers=2)
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_told(prepared: Prepared, tmp_path: Path) -> None:
    one = replace(prepared.setting, variants=("relu",), seeds=1)
    wrong = replace(prepared, setting=one, tokens=replace(prepared.tokens, vocabulary=2))
    with pytest.raises(RunError, match="IndexError"):
        study(wrong, tmp_path, Log(), workers=2)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_two_commands_share_a_folder_and_one_is_killed(
    from_the_command_line: Prepared, prose: Path, tmp_path: Path
) -> None:
    study(from_the_command_line, tmp_path / "whole", Log())
    folder = tmp_path / "shared"
    own = tmp_path / "own"
    own.mkdir()
    other = subprocess.Popen(
        command(prose, folder, "--workers=2"),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(own)},
        start_new_session=True,
    )
    while not list(folder.glob(f"unfinished/*/checkpoint-*/{SEAL}")):
        assert other.poll() is None
        time.sleep(0.05)
    log = Log()
    os.kill(other.pid, signal.SIGKILL)  # its workers end by themselves
    result = study(from_the_command_line, folder, log)
    assert result is not None
    assert numbers(folder) == numbers(tmp_path / "whole")
    assert log.planned == 4
    assert other.wait() == -signal.SIGKILL
    while any(own.iterdir()):
        time.sleep(0.05)


FIRST_WORKER = """
import multiprocessing, sys
from pathlib import Path
from gatedffn.compare.engines.processes import _without_interrupts

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=input, daemon=True)
    with _without_interrupts():
        child.start()
    print(Path(f"/proc/{child.pid}/status").read_text())
    child.kill()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_very_first_worker_leaves_interrupts_to_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(FIRST_WORKER)
    shown = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    blocked = next(line for line in shown.stdout.splitlines() if line.startswith("SigBlk"))
    assert int(blocked.split()[1], 16) & 1 << (signal.SIGINT - 1)


@pytest.mark.slow
def test_ctrl_c_ends_all_and_the_same_command_goes_on(
    from_the_command_line: Prepared, prose: Path, tmp_path: Path
) -> None:
    started = subprocess.Popen(
        command(prose, tmp_path / "out", "--workers=2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts behind the scenes ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob(f"out/unfinished/*/checkpoint-*/{SEAL}")):
        assert started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does, to all of them
    shown, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "the same command goes on" in " ".join(shown.split())
    assert "Traceback" not in errors  # nor of a worker
    log = Log()
    assert study(from_the_command_line, tmp_path / "out", log) is not None
    assert len(log.steps) < 48, "it went on from where it was"


def test_a_study_by_the_clock_has_whole_blocks(prepared: Prepared, tmp_path: Path) -> None:
    long_ago = time.monotonic() - 3600
    log = Log()
    result = study(prepared, tmp_path, log, extent=Extent(minutes=1), began=long_ago)
    assert result is not None
    assert result.setting.seeds == 2
    assert log.planned == 4
    again = study(prepared, tmp_path, log, extent=Extent(minutes=60, most=3))
    assert again is not None
    assert again.setting.seeds == 3
    assert log.planned == 6
    kept = study(prepared, tmp_path, log, extent=Extent(minutes=1), began=long_ago)
    assert kept is not None
    assert kept.setting.seeds == 3, "what is there counts, whatever the time"


def test_a_study_by_its_intervals_adds_seeds(prepared: Prepared, tmp_path: Path) -> None:
    wide = study(prepared, tmp_path, Log(), extent=Extent(until=100.0))
    assert wide is not None
    assert wide.setting.seeds == 3
    narrow = study(prepared, tmp_path, Log(), extent=Extent(until=1e-9, most=4))
    assert narrow is not None
    assert narrow.setting.seeds == 4


def test_how_many_workers_are_fastest_is_measured_once(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedffn.compare.engines.speed.MEASURED", 0.1)
    measured = Workers(prepared, tmp_path, runs=4)
    assert measured.kept() is None
    pool = Processes(prepared, 2, Log().step)
    try:
        together = pool.measured()
    finally:
        pool.close()
    assert measured.choose(2, together, alone=1e-9) == 2
    assert Workers(prepared, tmp_path, runs=4).kept() == 2
    assert measured.choose(2, together, alone=1e9) == 1
    assert Workers(prepared, tmp_path, runs=4).kept() == 1
    (tmp_path / "workers.json").write_text("[1]")
    assert Workers(prepared, tmp_path, runs=4).kept() is None


def test_runs_measure_no_way_to_compute(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that equal seeds give equal numbers also where nothing was chosen yet."""
    monkeypatch.setattr(measure, "choose", lambda key, *_: pytest.fail(key))
    run = Run(variant="swiglu", seed=0, learning_rate=3e-3)
    execute(run, prepared, tmp_path, lambda *_: None, Team())
    assert sequences_per_second(prepared, least=0.0) > 0


def test_what_cannot_be_asked_for(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="workers is 0"):
        study(prepared, tmp_path, Log(), workers=0)
    with pytest.raises(SettingError, match="shard 3/3 has nothing to do: there are 2 seeds"):
        study(prepared, tmp_path, Log(), extent=Extent(shard=(3, 3)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="leave out --workers"):
        study(prepared, tmp_path, Log(), workers=2)
