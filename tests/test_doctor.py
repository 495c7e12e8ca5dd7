"""`gatedffn doctor`: what it says of this machine, and of one that lacks something."""

import json
import pathlib

import pytest
import torch
from support.levels import needs_kernels
from typer.testing import CliRunner

from gatedffn import native
from gatedffn.cli import doctor
from gatedffn.cli.app import app
from gatedffn.ops import gpu, kernels, measure


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SIZE", 32)


def run(*options: str) -> str:
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exit_code == 0, done.output
    return done.output


@needs_kernels
def test_where_nothing_is_missing() -> None:
    found = json.loads(run("--json"))
    assert any(version.startswith("torch 2.") for version in found["versions"])
    assert found["gpu"]
    assert found["kernels"] == f"compiled here for {native.levels()[0]}"
    assert found["without_kernels"] == "nothing is missing"
    rates = {rate.rsplit(maxsplit=2)[0] for rate in found["products"]}
    assert {"torch float32", "torch bfloat16", "blocks float32", "blocks bfloat16"} <= rates
    assert "instruction sets" in run()


def test_without_kernels_it_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "no C++ compiler is found")
    found = json.loads(run("--json"))
    assert found["kernels"] == "no C++ compiler is found"
    for dtype in ("float32", "bfloat16"):
        assert f"one token of (64, 176) {dtype} takes " in found["without_kernels"]
    assert found["without_kernels"].count("its weights are read in ") == 2
    assert not any(rate.startswith("blocks") for rate in found["products"])


def test_a_gpu_and_why_it_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "AB"[index])
    monkeypatch.setattr(gpu, "missing", lambda device: [None, "it is too old"][device.index])
    assert doctor._gpu() == "A: kernels by Triton; B: PyTorch's own operators, as it is too old"


def test_of_many_choices_the_last_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"layer{i}": {"chosen": "torch", "milliseconds": {"torch": 1.0}} for i in range(40)}
    monkeypatch.setattr(measure, "stored", lambda: many)
    said = run()
    assert "layer39" in said
    assert "layer27" not in said
    assert "doubtful" not in said
    assert json.loads(run("--json"))["choices"] == many


def test_it_says_which_choices_are_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"chosen": "torch", "milliseconds": {"torch": 1.0}}
    some = {"a": entry | {"doubts": 0}, "b": entry | {"doubts": 2}, "older": entry}
    monkeypatch.setattr(measure, "stored", lambda: some)
    said = run()
    assert "choices measured so far: 3, 1 doubtful" in said
    assert said.count("torch, doubtful") == 1


def test_choices_are_deleted_when_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "choices-0.json"
    file.write_text('{"a layer": {"chosen": "torch", "milliseconds": {"torch": 1.0}}}')
    monkeypatch.setattr(measure, "_file", lambda: file)
    assert "a layer" in run()
    assert "choices deleted: 1" in run("--forget")
    assert not file.exists()
    assert "choices deleted: 0" in run("--forget")
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json", "--forget"]).stdout)
