"""A run on a GPU, rehearsed: whatever fails, the other steps run and a later call ends it."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import rehearsal
from bench.rehearsal import FAULTS, stand_in, tiny_steps
from gatedffn.bench import gpu_run
from gatedffn.bench.gpu_bars import BARS
from gatedffn.bench.gpu_run import RECORD, SUMMARY, Run
from gatedffn.bench.gpu_steps import STEPS
from gatedffn.files import alone

PATHS = os.pathsep.join(path for path in sys.path if path)
NAMES = [step.name for step in STEPS]
WHY = {
    "raises": "its process ended with 1: RuntimeError: no luck",
    "out of memory": "its process ended with 1: torch.OutOfMemoryError: CUDA out of memory",
    "killed": "its process was ended by SIGKILL",
    "does not compile": "CompilationError: no such instruction",
    "hangs": "it took longer than its share of 3 seconds",
}


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    """Processes of steps begin with what they need imported: their server finds it by this path."""
    multiprocessing.set_forkserver_preload(["bench.rehearsal"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        first = gpu_run._CONTEXT.Process()
        first.start()
        first.join()  # now the server has imported it all
        yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def states(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECORD).read_text())["steps"]
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_most_telling_comes_first() -> None:
    assert NAMES[0] == "checks"
    assert NAMES[-1] == "search"
    assert {bar.step for bar in BARS} == set(NAMES[:-1])
    order = [NAMES.index(bar.step) for bar in BARS if "backward, in" not in bar.words]
    assert order[:6] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("at", range(len(STEPS)), ids=NAMES)
def test_a_fault_at_each_step(at: int, tmp_path: Path) -> None:
    fault = FAULTS[at % len(FAULTS)]
    steps = [stand_in(name) for name in NAMES]
    steps[at] = stand_in(NAMES[at], fault, 3.0 if fault == "hangs" else rehearsal.SHARE)
    assert not Run(tmp_path, steps).call(9.0)
    found = states(tmp_path)
    assert [name for name in NAMES if found[name]["state"] != "done"] == [NAMES[at]]
    assert found[NAMES[at]]["state"] == "failed"
    assert any(WHY[fault] in why for why in found[NAMES[at]]["why"])
    assert WHY[fault] in (tmp_path / SUMMARY).read_text()
    if fault == "hangs":
        (child,) = tmp_path.glob("steps/*/child")
        assert gone(int(child.read_text()))
    steps[at] = stand_in(NAMES[at])
    again = Run(tmp_path, steps)
    assert [step.name for step in again.waiting()] == [NAMES[at]]
    assert again.call(9.0)
    found = states(tmp_path)
    assert {found[name]["state"] for name in NAMES} == {"done"}
    assert [found[name]["tries"] for name in NAMES] == [1 + (n == at) for n in range(len(NAMES))]
    assert all(len(found[name]["records"]) == 1 for name in NAMES)


def test_what_was_not_reached_comes_before_what_failed(tmp_path: Path) -> None:
    steps = [stand_in("a", "raises"), stand_in("b", "its time is up"), stand_in("c"), stand_in("d")]
    Run(tmp_path, steps[:3]).call(9.0)
    later = Run(tmp_path, steps)
    assert [step.name for step in later.waiting()] == ["b", "d", "a"]
    assert states(tmp_path)["b"]["why"] == ["its time was up; the next call goes on with it"]


def test_no_step_begins_that_would_not_end(tmp_path: Path) -> None:
    steps = [stand_in("a"), stand_in("short", seconds=15.0)]
    run = Run(tmp_path, steps)
    run.call(0.3)  # eighteen seconds: not enough for the first
    assert [run.of(step)["state"] for step in steps] == ["left", "done"]


def test_other_sources_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(tmp_path, [stand_in("a")]).call(9.0)
    assert not Run(tmp_path, [stand_in("a")]).waiting()
    monkeypatch.setattr(gpu_run, "sources", lambda: "others")
    changed = Run(tmp_path, [stand_in("a")])
    assert changed.waiting()
    assert changed.of(changed.steps[0])["records"] == []


def test_a_figure_stays_where_a_later_try_has_none(tmp_path: Path) -> None:
    assert not Run(tmp_path, [stand_in("a", "out of memory")]).call(9.0)
    assert not Run(tmp_path, [stand_in("a", "does not compile")]).call(9.0)
    (record,) = states(tmp_path)["a"]["records"]
    assert record["reason"] is None
    assert "CompilationError" in states(tmp_path)["a"]["why"][0]


def cut_off(folder: Path) -> None:
    os.waitpid = lambda *_: (0, 0)  # the server, its sibling, is alive
    Run(folder, [stand_in("a"), stand_in("b", "hangs", 600.0)]).call(9.0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_command_may_be_killed(tmp_path: Path) -> None:
    """What it had is there, what it had started is gone, and the next call begins where it was."""
    process = multiprocessing.get_context("fork").Process(target=cut_off, args=(tmp_path,))
    process.start()
    until = time.monotonic() + 60.0
    while not (child := list(tmp_path.glob("steps/b-1/child"))) or not child[0].read_text():
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.join()
    while not gone(int(child[0].read_text())):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert states(tmp_path)["a"]["state"] == "done"
    steps = [stand_in("a"), stand_in("b"), stand_in("c")]
    run = Run(tmp_path, steps)
    assert states(tmp_path)["b"]["why"] == ["the command was ended while it ran"]
    assert [step.name for step in run.waiting()] == ["b", "c"]
    assert run.call(9.0)


@pytest.mark.slow
def test_every_step_against_the_stub(tmp_path: Path) -> None:
    """This library runs out of memory in all of them; then nothing fails, and no bar is empty."""
    assert not Run(tmp_path, tiny_steps("out of memory")).call(9.0)
    for name, of in states(tmp_path).items():
        assert of["state"] == "failed", name
        assert "OutOfMemoryError: CUDA out of memory" in "; ".join(of["why"]), of["why"]
    assert states(tmp_path)["8192x4096x14336-bfloat16"]["records"][1]["figures"] is not None
    run = Run(tmp_path, tiny_steps())
    assert not run.call(9.0)
    assert [step.name for step in run.waiting()] == ["search"]  # its time was up
    assert run.call(9.0), states(tmp_path)
    state = json.loads((tmp_path / RECORD).read_text())
    assert [bar["bar"] for bar in state["bars"] if bar["found"] is None] == []
    assert len(state["calls"]) == 3
    written = (tmp_path / SUMMARY).read_text()
    assert "none, 4 GiB: driver None" in written
    assert "not measured" not in written
    assert written.count("TFLOP/s") == len(BARS) - 1


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = f"--out={tmp_path / 'out'}"
    assert gpu_run.main([out]) == 2
    assert "no CUDA device that PyTorch can use" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert gpu_run.main([out, "--minutes=0"]) == 2
    assert "--minutes is 0: it must be above 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_run.Run.__init__, "__defaults__", ((stand_in("checks"),),))
    assert gpu_run.main([out]) == 0
    assert "operators that are wrong | at most 0 | 0 | reached" in capsys.readouterr().out
    with alone(tmp_path / "out" / ".lock", 0.0):
        assert gpu_run.main([out]) == 2
    assert "another process has held" in capsys.readouterr().err
    for other in ("{", "[]", '{"steps": 3, "calls": []}'):
        (tmp_path / "out" / RECORD).write_text(other)
        assert gpu_run.main([out]) == 2
        assert "is no record of a run: move it away" in capsys.readouterr().err
