"""From Python: what is of a wrong kind is told by its name, before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedffn as gf
from gatedffn.errors import GatedFFNError
from gatedffn.interop.checkpoints.convert import convert

CALLS: dict[str, Callable[..., Any]] = {
    "convert": convert,
    "load": gf.layouts.load_feed_forward,
    "unpack": gf.layouts.unpack,
    "pack": gf.layouts.pack,
}
WRONG: dict[str, dict[str, list[object]]] = {
    "convert": {
        "source": [None, 5, b"x", "a\0b", "\ud800"],
        "target": [None, 5, b"x", "a\0b.safetensors", "\ud800.safetensors"],
        "tp": ["2", True, 0, 1.0, None, [2]],
        "from_tp": ["1", True, 0],
        "at": [5, ["layers.{layer}.mlp"]],
        "experts": ["3", True, 0],
        "any_width": [1, "no", None],
        "verify": [1, "no", None],
        "progress": [5, "bar"],
        "to": [None, 5, ["phi3"], {}],
        "layout": [5, ["llama"]],
        "variant": [5, ["swiglu"]],
    },
    "load": {
        "path": [None, 5, "a\0b", "x" * 300],
        "layer": [None, True, 1.0, [0]],
        "expert": ["0", True],
        "tp": ["1", True],
        "at": [5],
        "experts": ["3"],
        "d_hidden": ["64", True],
        "any_width": [1],
        "layout": [5, ["llama"]],
        "variant": [5],
    },
    "unpack": {
        "tensors": [None, [torch.zeros(1)], {"a": 1}, {3: torch.zeros(1)}],
        "layer": [True, 1.0, [0]],
        "expert": ["0", True],
        "tp": ["1", True, None],
        "experts": ["3"],
        "d_hidden": ["64"],
        "layout": [None, ["llama"]],
    },
    "pack": {
        "weights": [None, {"up_proj.weight": [1.0]}],
        "tp": ["1", True, None],
        "path": [5],
        "layout": [None, ["llama"]],
    },
}


@pytest.fixture
def usual(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Arguments with which each call works."""
    path = tmp_path / "llama.safetensors"
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    block = dict(zip(names, torch.ones(3, 4, 4), strict=True))
    save_file({f"layers.0.mlp.{name}": tensor.clone() for name, tensor in block.items()}, path)
    return {
        "convert": {
            **{"source": path, "target": tmp_path / "x.safetensors"},
            **{"layout": "llama", "to": "phi3"},
        },
        "load": {"path": path, "layout": "llama", "variant": "swiglu"},
        "unpack": {"tensors": load_file(path), "layout": "llama", "layer": 0},
        "pack": {"weights": block, "layout": "phi3"},
    }


@pytest.mark.parametrize("call", list(CALLS))
def test_arguments_of_a_wrong_kind_are_told(
    call: str, usual: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    for name, values in WRONG[call].items():
        for value in values:
            with pytest.raises(GatedFFNError) as caught:
                CALLS[call](**{**usual[call], name: value})
            assert "\n" not in str(caught.value), name
            assert [path.name for path in tmp_path.iterdir()] == ["llama.safetensors"], name
    CALLS[call](**usual[call])
