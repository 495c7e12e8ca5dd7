import sys
from pathlib import Path
from typing import Any

import pytest

from gatedffn.compare.settings import Run, Setting, make_setting
from gatedffn.compare.store import read_runs
from gatedffn.compare.study import Prepared, prepare

TINY: dict[str, Any] = {
    "steps": 12,
    "seeds": 2,
    "d_model": 32,
    "layers": 1,
    "context": 32,
    "batch": 4,
    "variants": ("relu", "swiglu"),
    "selection_tokens": 320,
    "held_out_tokens": 640,
    "evaluations": 3,
}


@pytest.fixture
def tiny() -> Setting:
    """A comparison of a few seconds."""
    return make_setting("quick", "decoder", **TINY)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A folder of thirty short texts, all different."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for i in range(30):
        words = " ".join(f"word{(i * j) % 97} sits by item {i + j}," for j in range(80))
        (folder / f"{i}.txt").write_text(words + "\n")
    return folder


class Log:
    """A display that notes what it is told."""

    def __init__(self) -> None:
        self.begun: list[Run] = []
        self.steps: list[int] = []
        self.notes: list[str] = []
        self.planned = self.reused = 0

    def begin(self, run: Run) -> None:
        self.begun.append(run)

    def plan(self, runs: int) -> None:
        self.planned = runs

    def step(self, run: Run, step: int, loss: float | None) -> None:
        self.steps.append(step)

    def finish(self, record: dict[str, Any], *, reused: bool) -> None:
        self.reused += reused

    def note(self, words: str) -> None:
        self.notes.append(words)


def numbers(folder: Path) -> dict[str, Any]:
    """All that a run computes, times left out."""
    records = read_runs(folder).items()
    return {k: {n: v for n, v in r["result"].items() if n != "step_time"} for k, r in records}


def command(prose: Path, folder: Path, *more: str) -> list[str]:
    arguments = [sys.executable, "-m", "gatedffn", "compare", str(prose), f"--out={folder}"]
    for name, value in {**TINY, "checkpoint_every": 5}.items():
        if name == "variants":
            arguments += [f"--variant={variant}" for variant in value]
        elif name != "evaluations":  # it has no option
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return [*arguments, *more]


@pytest.fixture
def from_the_command_line(prose: Path) -> Prepared:
    """What `command` does, whose number of evaluations is the preset's."""
    changes = {name: value for name, value in TINY.items() if name != "evaluations"}
    setting = make_setting("quick", "decoder", **changes, checkpoint_every=5)
    return prepare(setting, [str(prose)], "text")
