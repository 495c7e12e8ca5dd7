"""A report from stored runs alone, of one folder or of parts that were done apart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compare.conftest import Log, numbers
from gatedffn.cli.app import app
from gatedffn.compare.join import joined
from gatedffn.compare.schedule import Extent
from gatedffn.compare.settings import Setting
from gatedffn.compare.store import read_runs
from gatedffn.compare.study import Prepared, Result, prepare, study
from gatedffn.errors import SettingError, StorageError, UnknownVariant


@pytest.fixture
def prepared(tiny: Setting, prose: Path) -> Prepared:
    return prepare(replace(tiny, steps=4), [str(prose)])


def done(prepared: Prepared, folder: Path, **changes: Any) -> Result:
    setting = replace(prepared.setting, **changes)
    result = study(replace(prepared, setting=setting), folder, Log())
    assert result is not None
    return result


def test_a_folder_gives_its_report_again(prepared: Prepared, tmp_path: Path) -> None:
    made = done(prepared, tmp_path)
    [again] = joined([tmp_path], {})
    assert again.rows == made.rows
    assert again.setting == made.setting
    assert again.data == made.data
    [twice] = joined([tmp_path, tmp_path], {})
    assert twice.rows == made.rows, "the same run twice counts once"
    [other] = joined([tmp_path], {"baseline": "SwiGLU", "variants": ("ReLU", "SwiGLU", "relu")})
    assert {row.variant: row.verdict for row in other.rows}["swiglu"] == "baseline"
    by_arm = {row.variant: row.mismatch for row in other.rows}
    assert by_arm["swiglu"] == 0 < by_arm["relu"], "to the baseline of the report"
    with pytest.raises(UnknownVariant, match="nonsense"):
        joined([tmp_path], {"variants": ("relu", "nonsense")})


def test_shards_make_the_whole(prepared: Prepared, tmp_path: Path) -> None:
    tuned = replace(prepared.setting, seeds=3, learning_rates=(1e-3, 3e-3))
    prepared = replace(prepared, setting=tuned)
    whole = done(prepared, tmp_path / "whole")
    parts = [tmp_path / str(part) for part in (1, 2)]
    for part, folder in enumerate(parts, 1):
        study(prepared, folder, Log(), extent=Extent(shard=(part, 2)))
    # Both searched the rate, by the same runs; beside these each has its own seeds.
    assert [len(numbers(folder)) for folder in parts] == [4 + 2, 4 + 2]
    [together] = joined(parts, {})
    assert [(r.variant, r.loss, r.learning_rate, r.seeds) for r in together.rows] == [
        (r.variant, r.loss, r.learning_rate, r.seeds) for r in whole.rows
    ]
    assert together.setting.seeds == 3
    assert [r["run"]["seed"] for r in together.runs["relu"]] == [0, 1, 2]


def test_variants_of_several_folders_come_together(prepared: Prepared, tmp_path: Path) -> None:
    done(prepared, tmp_path / "a")
    done(prepared, tmp_path / "b", variants=("swiglu",), baseline="swiglu")
    [result] = joined([tmp_path / "b", tmp_path / "a"], {})
    assert {row.variant for row in result.rows} == {"relu", "swiglu"}
    assert result.setting.baseline == "relu", "the last folder's"


def test_runs_of_different_settings_are_told_apart(prepared: Prepared, tmp_path: Path) -> None:
    done(prepared, tmp_path)
    done(prepared, tmp_path, init="0.02")
    with pytest.raises(SettingError, match=r"different settings: init is 0\.02 and fan_in; name"):
        joined([tmp_path], {})
    [result] = joined([tmp_path], {"init": "0.02"})
    assert result.setting.init == "0.02"


def test_every_scale_of_a_folder_is_reported_again(prepared: Prepared, tmp_path: Path) -> None:
    made = [done(prepared, tmp_path, steps=steps) for steps in (5, 4)]
    asked = ["compare", "--report", str(tmp_path)]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "scales.png").exists()
    for result in made:
        steps = result.setting.steps
        assert f"steps {steps}: " in (tmp_path / "scales.md").read_text()
        summary = json.loads((tmp_path / f"steps-{steps}" / "summary.json").read_text())
        assert [row["loss"] for row in summary["rows"]] == [row.loss for row in result.rows]
    both = joined([tmp_path], {"steps": (4, 5), "d_model": ()})
    assert [result.rows for result in both] == [result.rows for result in made[::-1]]
    [one] = joined([tmp_path], {"steps": (5,)})
    assert one.rows == made[0].rows
    with pytest.raises(SettingError, match="has steps 6: leave it out"):
        joined([tmp_path], {"steps": (4, 6)})
    for key, record in read_runs(tmp_path).items():
        if (record["run"]["variant"], record["setting"]["steps"]) == ("swiglu", 4):
            (tmp_path / "runs" / f"{key}.json").unlink()
    with pytest.raises(SettingError, match=r"d_model 32, steps 4: .* or name the .* --steps"):
        joined([tmp_path], {"variants": ("relu", "swiglu")})


def test_a_file_of_runs_that_are_not_used_is_told_of(prepared: Prepared, tmp_path: Path) -> None:
    old = tmp_path / "results.jsonl"
    old.write_text("")
    with pytest.raises(StorageError, match="has no finished runs") as caught:
        joined([tmp_path], {})
    assert "results.jsonl" not in str(caught.value)
    done(prepared, tmp_path, seeds=1)
    asked = ["compare", "--report", str(tmp_path)]
    assert "results.jsonl" not in CliRunner().invoke(app, asked).output
    old.write_text('{"key": "a"}\n')
    words = f"{old} is of an older version of gatedffn, and the runs in it are not used"
    assert words in CliRunner().invoke(app, asked).output
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(StorageError, match="has no finished runs") as caught:
        joined([tmp_path], {})
    assert words in str(caught.value)


def test_what_cannot_be_reported(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="has no finished runs"):
        joined([tmp_path / "none"], {})
    assert not (tmp_path / "none").exists()
    done(prepared, tmp_path, seeds=1)
    with pytest.raises(SettingError, match="baseline glu is not among relu, swiglu"):
        joined([tmp_path], {"baseline": "glu"})
    with pytest.raises(SettingError, match="1 runs are missing, such as glu with seed 0"):
        joined([tmp_path], {"variants": ("relu", "glu")})
    (key, record), *_ = read_runs(tmp_path).items()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    for field, value in (("steps", 7), ("unheard_of", 1)):
        changed = record | {"setting": record["setting"] | {field: value}}
        (tmp_path / "runs" / f"{key}.json").write_text(json.dumps(changed))
        with pytest.raises(SettingError, match=f"run {key} is of another version"):
            joined([tmp_path], {})


def test_the_command_reports_without_the_data(prepared: Prepared, tmp_path: Path) -> None:
    for part in (1, 2):
        study(prepared, tmp_path / str(part), Log(), extent=Extent(shard=(part, 2)))
    folders = [str(tmp_path / "1"), str(tmp_path / "2")]
    shown = CliRunner().invoke(
        app, ["compare", "--report", *folders, "--out", str(tmp_path / "all"), "--json"]
    )
    assert shown.exit_code == 0, shown.output
    assert {row["seeds"] for row in json.loads(shown.stdout)["rows"]} == {2}
    asked = ["compare", "--report", *folders]
    for more, message in (
        (["--seeds", "1", "--first-seed", "3"], "leave out --seeds, --first-seed"),
        (["--dry-run", "--preset", "quick"], "leave out --preset, --dry-run"),
        (["--model", "t5"], "has model t5"),
    ):
        with pytest.raises(SettingError, match=message):
            CliRunner().invoke(app, [*asked, *more], catch_exceptions=False)
    assert (tmp_path / "all" / "report.md").exists()
