"""A tiny comparison from end to end: repeated, killed and resumed, in two processes."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compare.conftest import TINY, Log, numbers
from gatedffn.compare.engines.speed import seconds_of_a_run
from gatedffn.compare.models import initialise
from gatedffn.compare.report import write_report
from gatedffn.compare.schedule import Extent
from gatedffn.compare.settings import Run, Setting
from gatedffn.compare.store import Store
from gatedffn.compare.study import (
    Prepared,
    Result,
    estimate,
    prepare,
    result_of,
    study,
)
from gatedffn.errors import SettingError, StorageError


@pytest.fixture
def prepared(tiny: Setting, prose: Path) -> Prepared:
    return prepare(tiny, [str(prose)])


def run(prepared: Prepared, folder: Path, log: Log | None = None) -> Result:
    result = study(prepared, folder, log or Log())
    assert result is not None
    return result


def test_the_same_seed_gives_the_same_numbers(prepared: Prepared, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(prepared, tmp_path / name)
    first = numbers(tmp_path / "a")
    assert first == numbers(tmp_path / "b")
    assert len(first) == 4
    assert len({r["held_out"] for r in first.values()}) == 4


def test_what_a_run_warns_of_is_kept_with_it(prepared: Prepared, tmp_path: Path) -> None:
    class Warns(Log):
        def step(self, run: Run, step: int, loss: float | None) -> None:
            super().step(run, step, loss)
            if run.variant == "swiglu":
                warnings.warn("the loss jumped", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(prepared, tmp_path, Warns())
    assert [r["warnings"] for r in result.runs["swiglu"]] == [["the loss jumped"]] * 2
    assert "the loss jumped" not in str([r["warnings"] for r in result.runs["relu"]])


def test_a_run_learns_and_is_measured(prepared: Prepared, tmp_path: Path) -> None:
    result = run(prepared, tmp_path)
    for records in result.runs.values():
        for record in records:
            curve = record["result"]["curve"]
            assert [step for step, _ in curve] == [4, 8, 12]
            assert curve[-1][1] < curve[0][1]
            assert record["result"]["selection"] == curve[-1][1]
            assert not record["result"]["diverged"]
            assert record["machine"]["torch"]
            assert record["setting"]["steps"] == 12


def test_a_run_leaves_small_numbers_as_they_were(prepared: Prepared, tmp_path: Path) -> None:
    small, flushed = torch.tensor(1e-40), []

    class Watching(Log):
        def step(self, run: Run, step: int, loss: float | None) -> None:
            flushed.append(float(small * 0.5) == 0.0)

    run(prepared, tmp_path, Watching())
    assert flushed == [True] * 48
    assert float(small * 0.5) > 0.0


def test_finished_runs_are_kept_and_new_ones_added(prepared: Prepared, tmp_path: Path) -> None:
    run(prepared, tmp_path)
    before = numbers(tmp_path)
    log = Log()
    wider = replace(prepared, setting=replace(prepared.setting, seeds=3))
    result = run(wider, tmp_path, log)
    assert log.reused == 4
    assert [(r.variant, r.seed) for r in log.begun] == [("relu", 2), ("swiglu", 2)]
    after = numbers(tmp_path)
    assert len(after) == 6
    assert {key: after[key] for key in before} == before
    assert all(row.seeds == 3 for row in result.rows)


DRIVER = """
import os, sys
from pathlib import Path
from gatedffn.compare.settings import make_setting
from gatedffn.compare.study import prepare, study

class Killed:
    count = 0
    def plan(self, runs): pass
    def begin(self, run): pass
    def finish(self, record, *, reused): pass
    def step(self, run, step, loss):
        Killed.count += 1
        if Killed.count == {kill_at}:
            os.kill(os.getpid(), 9)

if __name__ == "__main__":
    setting = make_setting("quick", "decoder", **{setting!r})
    study(prepare(setting, [{prose!r}]), Path({folder!r}), Killed())
"""


@pytest.mark.parametrize("checkpoint_every", [0, 5])
def test_killed_and_started_again(
    prepared: Prepared, prose: Path, tmp_path: Path, checkpoint_every: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    setting = replace(prepared.setting, checkpoint_every=checkpoint_every)
    prepared = replace(prepared, setting=setting)
    run(prepared, whole)
    driver = tmp_path / "driver.py"
    changes = {**TINY, "checkpoint_every": checkpoint_every}
    # In the second run, after its eighth step: past a checkpoint at 5, before its end at 12.
    driver.write_text(
        DRIVER.format(setting=changes, prose=str(prose), folder=str(killed), kill_at=12 + 8)
    )
    ended = subprocess.run([sys.executable, str(driver)], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert len(numbers(killed)) == 1
    log = Log()
    run(prepared, killed, log)
    assert log.reused == 1
    assert log.steps[0] == (6 if checkpoint_every else 1)
    assert numbers(killed) == numbers(whole)
    assert not any((killed / "unfinished").iterdir())


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing")],
)
def test_a_full_disk_at_a_checkpoint_is_one_line(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.Trainer.save_model", full)
    setting = replace(prepared.setting, checkpoint_every=5)
    with pytest.raises(StorageError, match="a checkpoint cannot be written") as caught:
        run(replace(prepared, setting=setting), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_cannot_be_stored_keeps_its_checkpoints(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space")

    prepared = replace(prepared, setting=replace(prepared.setting, checkpoint_every=5))
    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", full)
        with pytest.raises(StorageError, match="no space"):
            run(prepared, tmp_path)
    log = Log()
    run(prepared, tmp_path, log)
    # Of four runs of twelve steps the first goes on from its last checkpoint.
    assert len(log.begun) == 4
    assert 36 <= len(log.steps) <= 38


def test_a_grid_with_one_seed_counts_it_once(prepared: Prepared, tmp_path: Path) -> None:
    setting = replace(prepared.setting, learning_rates=(3e-3, 6e-3))
    result = run(replace(prepared, setting=setting), tmp_path)
    assert [row.seeds for row in result.rows] == [2, 2]
    assert all([r["run"]["seed"] for r in runs] == [0, 1] for runs in result.runs.values())


def test_a_loss_that_is_no_number_is_json_all_the_same(prepared: Prepared, tmp_path: Path) -> None:
    result = run(prepared, tmp_path)
    runs = {arm: [dict(r) for r in records] for arm, records in result.runs.items()}
    for r in runs["relu"]:
        r["result"] = {**r["result"], "held_out": None, "diverged": True}
    records = {Run(**r["run"]): r for of_arm in runs.values() for r in of_arm}
    write_report(result_of(prepared.setting, prepared.data, records, [0, 1]), tmp_path)
    summary = (tmp_path / "summary.json").read_text()
    assert "Infinity" not in summary
    assert "Not told apart from ReLU" in json.loads(summary)["conclusion"]


def test_rates_are_tuned_on_the_first_seed(prepared: Prepared, tmp_path: Path) -> None:
    setting = replace(prepared.setting, learning_rates=(1e-5, 1e-2), variants=("relu", "glu"))
    prepared = prepare(setting, [])
    log = Log()
    result = run(prepared, tmp_path, log)
    assert len(log.begun) == 6
    # A rate of 1e-5 hardly moves in twelve steps.
    assert {row.learning_rate for row in result.rows} == {1e-2}
    assert {r.seed for r in log.begun[:4]} == {0}


def test_a_run_that_explodes_is_counted_as_diverged(
    tiny: Setting, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exploding(model: torch.nn.Module, init: str, seed: int) -> None:
        initialise(model, init, seed)
        if seed == 1:
            model.get_parameter("model.layers.0.mlp.down_proj.weight").data.mul_(1e30)

    monkeypatch.setattr("gatedffn.compare.training.initialise", exploding)
    prepared = prepare(replace(tiny, variants=("swiglu",), baseline="swiglu"), [str(prose)])
    result = run(prepared, tmp_path)
    assert (result.rows[0].verdict, result.rows[0].diverged) == ("diverged", 1)
    write_report(result, tmp_path)
    assert "Runs that diverged: 1." in (tmp_path / "report.md").read_text()


def test_report_and_figures(prepared: Prepared, tmp_path: Path) -> None:
    result = run(prepared, tmp_path)
    paths = write_report(result, tmp_path)
    assert {p.name for p in paths} == {
        *("report.md", "report.html", "summary.json", "curves.png", "differences.png")
    }
    assert all(path.stat().st_size > 500 for path in paths)
    report = (tmp_path / "report.md").read_text()
    for phrase in (
        "1 / sqrt(fan_in)",
        "It was not tuned",
        "1.944",
        "1.789",
        "another setting",
        "hold for all variants at once",
        f"{result.rows[0].loss:.3f}",
    ):
        assert phrase in report
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["variant"] for row in summary["rows"]] == [row.variant for row in result.rows]


def test_unequal_sizes_are_said_in_the_report(tiny: Setting, prose: Path, tmp_path: Path) -> None:
    setting = replace(tiny, multiple_of=64, allow_mismatch=True, seeds=1)
    result = run(prepare(setting, [str(prose)]), tmp_path)
    write_report(result, tmp_path)
    assert "THE SIZES ARE UNEQUAL" in (tmp_path / "report.md").read_text()


def test_gated_convolutions_and_the_lstm(tiny: Setting, prose: Path, tmp_path: Path) -> None:
    from gatedffn.compare.settings import CONVOLUTION_ARMS

    setting = replace(
        tiny, model="gated-conv", variants=CONVOLUTION_ARMS, seeds=1, steps=4, d_model=64
    )
    result = run(prepare(setting, [str(prose)]), tmp_path)
    assert {row.variant for row in result.rows} == set(CONVOLUTION_ARMS)
    assert all(row.step_time for row in result.rows)
    write_report(result, tmp_path)
    assert "| LSTM |" in (tmp_path / "report.md").read_text()


def test_the_estimate_is_with_the_workers_there_will_be(prepared: Prepared, tmp_path: Path) -> None:
    for workers, extent, runs in ((1, None, 4), (2, None, 4), (2, Extent(shard=(1, 2)), 2)):
        found = estimate(prepared, tmp_path / "none", workers=workers, extent=extent)
        assert (found.runs, found.workers) == (runs, workers)
        assert 0 < found.seconds < 3600
    with pytest.raises(SettingError, match="shard 3/3 has nothing to do"):
        estimate(prepared, tmp_path / "none", extent=Extent(shard=(3, 3)))
    assert not (tmp_path / "none").exists()


def test_the_estimate_is_of_the_data_there_are(prepared: Prepared) -> None:
    def sequences(most: int) -> float:
        setting = replace(prepared.setting, selection_tokens=most, held_out_tokens=most)
        return seconds_of_a_run(replace(prepared, setting=setting), 1.0)

    tokens = prepared.tokens
    selection, held_out = (len(part) // 32 for part in (tokens.selection, tokens.held_out))
    assert sequences(10**12) == 12 * 4 + (3 * selection + held_out) / 3
    assert sequences(320) == 12 * 4 + (3 * 10 + 10) / 3


@pytest.mark.slow
def test_two_processes_share_a_run(prepared: Prepared, prose: Path, tmp_path: Path) -> None:
    # The command has no option for the number of evaluations, which changes no loss at the end.
    run(prepared, tmp_path / "one")
    folder = tmp_path / "two"
    arguments = ["-m", "gatedffn", "compare", str(prose), "--out", str(folder)]
    for name, value in TINY.items():
        if name == "variants":
            arguments += [f"--variant={variant}" for variant in value]
        elif name != "evaluations":
            arguments.append(f"--{name.replace('_', '-')}={value}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("run 4 of 4") == 1
    one = sorted(r["held_out"] for r in numbers(tmp_path / "one").values())
    two = sorted(r["held_out"] for r in numbers(folder).values())
    assert len(two) == 4
    # The same sums in another order: float32 rounding over twelve steps, and no more.
    assert two == pytest.approx(one, rel=1e-4)


def test_a_batch_that_processes_cannot_share(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match="3 processes cannot share"):
        study(prepared, tmp_path, Log())
