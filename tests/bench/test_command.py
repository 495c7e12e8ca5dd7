"""`gatedffn bench` as a user types it."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gatedffn.bench.protocol import Protocol
from gatedffn.cli.app import app
from gatedffn.errors import GatedFFNError

TINY = ["--tokens", "4", "--d-model", "16", "--d-hidden", "48", "--contestants", "gatedffn"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = Protocol(rounds=2, turn=0.002, fewest=1, most=3)
    monkeypatch.setenv("GATEDFFN_TUNE", "off")
    monkeypatch.setattr("gatedffn.bench.protocol.QUICK", protocol)
    monkeypatch.setattr("gatedffn.bench.memory.modes", lambda _: ["eager", "gatedffn"])
    monkeypatch.setattr("gatedffn.machine.busy", lambda: 0.0)


def test_a_row_of_ones_own(tmp_path: Path) -> None:
    options = [*TINY, "--training", "--quick", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    times = [record for record in found["records"] if record["kind"] == "time"]
    assert [record["contestant"] for record in times] == ["gatedffn"]
    assert all(record["figures"]["milliseconds"] > 0 for record in times)
    memory = {r["mode"]: r["extra"] for r in found["records"] if r["kind"] == "memory"}
    assert {"eager", "gatedffn"} <= memory.keys()
    assert all(Path(path).exists() for path in found["files"])
    lines = (tmp_path / "bench.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found["records"]
    machine = times[0]["machine"]
    assert machine["processor"]
    assert machine["torch"]


def test_a_suite_ends_with_a_summary(tmp_path: Path) -> None:
    options = ["--suite=gating", "--quick", "--contestants=gatedffn,eager", f"--out={tmp_path}"]
    options += ["--workload=packed-1x172", "--json"]
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = {"packed-1x172-float32", "packed-1x172-bfloat16"}
    assert {record["row"]["name"] for record in found["records"]} == names
    (summary,) = found["summary"]
    assert (summary["contestant"], summary["against"]) == ("gatedffn", "eager")
    assert summary["workloads"] == 2
    assert summary["worst_workload"] in names
    speeds = [
        record["figures"]["to_eager"]
        for record in found["records"]
        if record["contestant"] == "gatedffn"
    ]
    assert summary["worst"] == min(speeds)
    assert summary["geometric_mean"] == pytest.approx(math.prod(speeds) ** 0.5)
    assert "geometric mean" in result.stderr


def test_the_small_suite_counts_no_memory(tmp_path: Path) -> None:
    options = ["--suite=small", "--quick", "--contestants=gatedffn", f"--out={tmp_path}"]
    options += ["--workload=training-1x64x172-float32", "--json"]
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert {record["kind"] for record in json.loads(result.stdout)["records"]} == {"time"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contestants", "eager,tensorflow"], "no contestant is called 'tensorflow'"),
        (["--workload", "3x3"], "no workload has '3x3' in its name"),
        (["--dtype", "bfloat16"], "describe a workload of your own"),
        (["--tokens", "4"], "takes --tokens and --d-model"),
        (["--tokens", "4", "--d-model", "4", "--suite", "small"], "no --workload or --suite"),
        (["--suite", "large"], "cpu has no suite 'large': it must be one of main, small, gating"),
        (["--variant", "swigul"], "did you mean swiglu"),
    ],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", *options, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, GatedFFNError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
