import math
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from gatedffn.compare.settings import Run, Setting, make_setting
from gatedffn.compare.statistics import kind, rank
from gatedffn.compare.store import Record, read_runs
from gatedffn.compare.study import Prepared, Result, prepare

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


# By how much an arm's loss is above ReLU's, and how much longer a step of it takes.
EFFECTS = {
    "swiglu": (-0.049, 1.03),
    "geglu": (-0.047, 1.06),
    "reglu": (-0.039, 1.01),
    "gelu": (-0.012, 1.02),
    "bilinear": (-0.011, 1.00),
    "glu": (-0.001, 1.04),
    "relu": (0.0, 1.00),
    "swish": (0.031, 1.02),
}


def made_up(changes: Mapping[str, Any] | None = None, **of_setting: Any) -> Result:
    """A comparison of eight arms and five seeds that nobody trained.

    Args:
        changes: fields of the outcome of every run of an arm, by the arm's name.
        of_setting: fields of the setting.
    """
    given = {"variants": tuple(EFFECTS), "seeds": 5, "steps": 200, "context": 256} | of_setting
    setting = make_setting("quick", "decoder", **given)
    draw = random.Random(0)
    blocks = [draw.gauss(0, 0.03) for _ in range(setting.seeds)]
    runs = {
        arm: [
            _record(setting, arm, seed, block + draw.gauss(0, 0.006), (changes or {}).get(arm, {}))
            for seed, block in enumerate(blocks)
        ]
        for arm in setting.variants
    }
    data = {
        "description": "made up: 30 documents",
        "fingerprint": "0123456789abcdef",
        "training_tokens": 1_000_000,
        "bytes_per_token": 1.0,
    }
    return Result(setting, data, rank(runs, setting.baseline, 1.0), runs)


def searched(losses: Mapping[str, tuple[float, float, float]]) -> Result:
    """A made-up comparison with a search over three rates that gave these losses."""
    rates = (1e-3, 3e-3, 9e-3)
    result = made_up(variants=tuple(losses), learning_rates=rates)
    grid = []
    for arm, found in losses.items():
        record = result.runs[arm][0]
        for rate, loss in zip(rates, found, strict=True):
            outcome = {"selection": loss, "diverged": not math.isfinite(loss)}
            run = {"run": record["run"] | {"learning_rate": rate}}
            grid.append(record | run | {"result": record["result"] | outcome})
    return replace(result, grid=grid)


def _record(
    setting: Setting, arm: str, seed: int, noise: float, changes: Mapping[str, Any]
) -> Record:
    effect, time = EFFECTS[arm]
    steps = setting.steps
    curve = [
        (step, 1.9 + effect * step / steps + noise + 8 / step) for step in range(40, steps + 1, 40)
    ]
    outcome = {
        "held_out": curve[-1][1] + 0.02,
        "selection": curve[-1][1],
        "diverged": False,
        "curve": curve,
        "training_curve": [],
        "step_time": 0.072 * time * (1 + 2 * noise),
    }
    return {
        "key": f"{arm}-{seed}",
        "run": {"variant": arm, "seed": seed, "learning_rate": 3e-3},
        "result": {**outcome, **changes},
        "cost": {
            "width": 512 if kind(arm) == "not gated" else 341,
            "parameters": 1_000_000,
            "compared": 800_000,
            "flops": 6_000_000,
            "memory": 100_000_000 if kind(arm) == "not gated" else 104_000_000,
        },
        "setting": asdict(setting),
        "machine": {"processor": "a processor", "cores": 2, "gpu": None, "torch": "2"},
        "finished": "2026-11-28T12:00:00Z",
    }


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
    return prepare(setting, [str(prose)])
