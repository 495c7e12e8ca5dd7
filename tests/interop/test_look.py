"""`gatedffn convert SOURCE` alone: what is told of a checkpoint, and nothing is written."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gatedffn.cli.app import app
from gatedffn.errors import CheckpointError, LayoutError, SettingError
from gatedffn.interop.checkpoints.look import look

SPLIT = {"gate_proj.weight": (6, 4), "up_proj.weight": (6, 4), "down_proj.weight": (4, 6)}
PACKED = {"gate_up_proj.weight": (12, 4), "down_proj.weight": (4, 6)}


def write(
    folder: Path,
    tensors: Mapping[str, tuple[int, ...]],
    layers: int = 3,
    config: dict[str, object] | None = None,
) -> Path:
    weights = {
        f"model.layers.{layer}.mlp.{name}": torch.zeros(shape)
        for layer in range(layers)
        for name, shape in tensors.items()
    }
    torch.save({"model.embed.weight": torch.zeros(2, 4), **weights}, folder / "model.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "model.pt"


def test_without_a_config_it_tells_every_layout_that_fits(tmp_path: Path) -> None:
    found = look(write(tmp_path, SPLIT))
    fit = next(fit for fit in found.fits if fit.layout == "llama")
    assert (fit.blocks, fit.first, fit.last) == (3, "model.layers.0.mlp", "model.layers.2.mlp")
    assert fit.sizes == "4 -> 6 -> 4"
    assert found.said is None
    assert found.provable
    assert "told by their names" in found.why
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_of_a_packed_matrix_the_order_must_be_named(tmp_path: Path) -> None:
    found = look(write(tmp_path, PACKED))
    assert {fit.layout for fit in found.fits} >= {"phi3"}
    assert not found.provable
    assert "name" in found.why
    assert "--from" in found.why
    named = look(tmp_path / "model.pt", "phi3")
    assert named.fits[0].held[0] == "gate_up_proj.weight: gate and up, gate first"
    assert not named.provable


def test_the_configuration_proves_it(tmp_path: Path) -> None:
    config: dict[str, object] = {"architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"}
    found = look(write(tmp_path, PACKED, config=config))
    (fit,) = found.fits
    assert (fit.layout, fit.variant) == ("phi3", "swiglu")
    assert found.provable
    assert "config.json, by its architecture Phi3ForCausalLM" in found.why


def test_what_fits_nothing_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"no layout fits the tensors of .*--at names another"):
        look(write(tmp_path, {"first.weight": (2, 2)}))
    torch.save({"first.weight": tmp_path}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError) as refused:
        look(tmp_path / "other.pt")
    said = str(refused.value)
    assert "weights_only=True: Unsupported global: GLOBAL pathlib" in said
    assert "\x1b" not in said
    assert "you have two options" not in said
    with pytest.raises(CheckpointError, match="no such file"):
        look(tmp_path / "missing.pt")
    with pytest.raises(LayoutError, match="no block of layout 'phi3' is here"):
        look(tmp_path / "model.pt", "phi3")


def test_the_command_shows_it_in_80_columns(tmp_path: Path) -> None:
    path = write(tmp_path, PACKED)
    shown = CliRunner().invoke(app, ["convert", str(path)], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    table = shown.output.partition("└")[0]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
    assert "--from" in shown.output
    found = json.loads(CliRunner().invoke(app, ["convert", str(path), "--json"]).output)
    assert found["tensors"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_the_list_is_filtered_by_a_word() -> None:
    all_rows = json.loads(CliRunner().invoke(app, ["convert", "--list", "--json"]).output)
    some = json.loads(CliRunner().invoke(app, ["convert", "--list", "GPT-oss", "--json"]).output)
    assert 0 < len(some) < len(all_rows)
    assert all(re.search("gpt-?oss", json.dumps(row), re.I) for row in some)
    with pytest.raises(SettingError, match="no layout has 'nothing' in its name"):
        CliRunner().invoke(app, ["convert", "--list", "nothing"], catch_exceptions=False)
