"""The command as a user types it."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gatedffn.cli.app import COMMANDS, app
from gatedffn.cli.progress import LiveTable
from gatedffn.errors import GatedFFNError, SettingError
from gatedffn.variants import VARIANTS

SIZES = {
    "steps": 4,
    "seeds": 2,
    "d-model": 32,
    "layers": 1,
    "context": 32,
    "batch": 4,
    "selection-tokens": 320,
    "held-out-tokens": 640,
}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
TINY += ["--variant=relu", "--variant=swiglu"]


def gatedffn(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gatedffn", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("command", [function.__name__ for function in COMMANDS])
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output


def test_the_table_as_json() -> None:
    result = CliRunner().invoke(app, ["variants", "--json"])
    rows = json.loads(result.output)
    assert [row["name"] for row in rows] == list(VARIANTS)
    assert {row["name"]: row["gated"] for row in rows}["swiglu"] is True


def test_one_row_in_full() -> None:
    result = CliRunner().invoke(app, ["variants", "SwiGLU"])
    assert result.exit_code == 0
    assert "sharpness of the sigmoid" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("variants", "swigul"), "did you mean swiglu"),
        (("compare", "--preset", "fast"), "no preset is called 'fast'"),
        (("compare", "--data", "missing.txt"), "there is no such file or folder"),
        (("compare", "--data", "~nosuchuser/x"), "there is no such file or folder"),
        (("compare", "--d-model", "32", "--multiple-of", "64"), "use --multiple-of 1"),
        (("compare", "--steps", "9", "--steps", "9"), "give each value once"),
        (("compare", "--config", "missing.json"), "there is no file missing.json"),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    ended = gatedffn(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.startswith("gatedffn: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--workers=0", "workers is 0"),
        ("--shard=", "shard is ''"),
        ("--shard=2", "shard is '2'"),
        ("--shard=3/2", "shard 3/2"),
        ("--shard=3/3", "shard 3/3 has nothing to do"),
        ("--on=", "on is empty"),
        ("--minutes=0", "minutes is 0"),
        ("--until=nan", "until is nan"),
        ("--multiple-of=64", "use --multiple-of 1"),
        ("--encoding=none", "encoding is 'none'"),
        (f"--out={__file__}/out", "is a file; choose another with --out"),
    ],
)
def test_what_needs_no_data_is_refused_before_it_is_read(option: str, message: str) -> None:
    with pytest.raises(GatedFFNError, match=message):
        CliRunner().invoke(
            app, ["compare", *TINY, "--data=missing.txt", option], catch_exceptions=False
        )


def test_the_plan_says_what_is_left_out(prose_file: Path) -> None:
    rows = prose_file.with_name("rows.jsonl")
    rows.write_text('{"body": "some"}\n{"body": null}\n')
    given = ["--data", str(prose_file), str(rows), "--field=body", "--dry-run"]
    result = CliRunner().invoke(app, ["compare", *TINY, *given])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "read: 1 of text, 1 of JSON lines; left out: 1 null or without the field" in told


def test_dry_run_trains_nothing(prose_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*TINY, "--data", str(prose_file), "--out", str(out), "--dry-run", "--json"]
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["runs"], plan["workers"]) == (4, 1)
    assert plan["variants"]["swiglu"]["width"] == 85
    assert plan["estimated_seconds"] > 0
    assert not out.exists()


def test_what_a_preset_is_made_for_is_said_of_the_preset_alone(prose_file: Path) -> None:
    asked = ["compare", "--data", str(prose_file), "--dry-run", "--workers=1"]
    for more, there in (([], True), (["--steps=449"], False)):
        shown = CliRunner().invoke(app, [*asked, *more]).output
        assert ("the preset is made for: two cores" in shown) is there
        assert "estimated time here, in one process: about" in shown


def test_several_paths_after_one_option(prose_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 50)
    paths = ["--data", str(prose_file), str(other)]
    result = CliRunner().invoke(app, ["compare", *TINY, *paths, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert "2 documents" in json.loads(result.stdout)["data"]


def test_compare_from_the_command_line(prose_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out[b]"
    arguments = ["compare", *TINY, "--data", str(prose_file), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "run 4 of 4: SwiGLU, seed 1" in result.output
    assert "1 layer, context 32" in result.output.replace("\n", " ")
    assert "SwiGLU" in result.output
    assert (out / "report.md").exists()
    assert f"wrote {out / 'report.md'}, " in result.output
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert again.exit_code == 0
    assert {row["variant"] for row in json.loads(again.stdout)["rows"]} == {"relu", "swiglu"}
    assert "found in the folder" in again.stderr


def test_the_bar_of_all_runs_counts_steps_of_runs_side_by_side() -> None:
    from gatedffn.compare.settings import Run, make_setting

    setting = make_setting("quick", "decoder", steps=10, seeds=2, variants=("relu", "swiglu"))
    table = LiveTable(Console(file=io.StringIO()), setting)

    def all_runs() -> tuple[float, float | None]:
        return table.bars.tasks[0].completed, table.bars.tasks[0].total

    def record(run: Run) -> dict[str, object]:
        return {"run": asdict(run), "result": {"held_out": 1.0, "diverged": False}}

    one, two, three = (
        Run(variant=arm, seed=seed, learning_rate=0.1)
        for arm, seed in (("relu", 0), ("swiglu", 0), ("relu", 1))
    )
    table.plan(4)
    table.begin(one)
    table.begin(two)
    table.step(one, 6, None)
    table.step(two, 3, 2.0)
    assert all_runs() == (9, 40)
    table.step(one, 5, None)  # its worker died, and it went on from a checkpoint
    assert all_runs() == (8, 40)
    table.finish(record(two), reused=False)  # on a cluster nobody tells the steps
    table.finish(record(three), reused=True)
    assert all_runs() == (15, 30)
    table.plan(6)
    assert all_runs() == (15, 50)
    assert list(table.running) == [one]


def test_results_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 500)
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--out", str(tmp_path / "deep" / "out"))):
        with pytest.raises(SettingError, match="results would be read as data"):
            CliRunner().invoke(
                app, ["compare", *TINY, "--data", ".", *more], catch_exceptions=False
            )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_brackets_in_what_is_told_are_no_markup() -> None:
    from gatedffn.compare.settings import make_setting

    told = io.StringIO()
    LiveTable(Console(file=told), make_setting("quick", "decoder")).note("ended [red] (exit [/x])")
    assert told.getvalue() == "ended [red] (exit [/x])\n"


def test_several_steps_are_a_study_each_and_one_table(prose_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", *TINY, "--steps=2", "--data", str(prose_file), f"--out={out}", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    [line] = answer["differences"]
    assert list(line) == ["difference to ReLU", "steps 4", "steps 2", "shown at 95%"]
    assert [s["setting"]["steps"] for s in answer["scales"]] == [4, 2]
    for name in ("steps-4", "steps-2"):
        assert (out / name / "report.md").exists()
    plan = CliRunner().invoke(app, [*arguments, "--d-model=64", "--dry-run"])
    assert [one["setting"]["d_model"] for one in json.loads(plan.stdout)] == [32, 32, 64, 64]
    again = CliRunner().invoke(app, arguments)
    assert again.stderr.count("found in the folder") == 8


def test_a_config_says_the_sizes(prose_file: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "intermediate_size": 64, **sizes}))
    asked = ["compare", "--config", str(path), "--data", str(prose_file), "--dry-run", "--json"]
    small = ["--context", "32", "--batch", "4", "--variant", "relu", "--variant", "swiglu"]
    result = CliRunner().invoke(app, [*asked, *small])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["setting"]["d_model"], plan["setting"]["layers"]) == (32, 1)
    assert {arm: v["width"] for arm, v in plan["variants"].items()} == {"relu": 96, "swiglu": 64}
    with pytest.raises(SettingError, match="d_model is in the config"):
        CliRunner().invoke(app, [*asked, "--d-model", "64"], catch_exceptions=False)


@pytest.fixture
def prose_file(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("".join(f"line {i} says {i * i % 89}\n" for i in range(2000)))
    return path


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No typer', name='typer')")
    ended = subprocess.run(
        [sys.executable, "-m", "gatedffn", "variants"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert ended.stderr == "gatedffn: no typer here: pip install 'gatedffn[cli]'\n"
