"""`explain`: the decision that a call makes, and what it refuses."""

import json

import pytest
import torch
from torch import nn

import gatedffn as gf
from gatedffn import native
from gatedffn.errors import SettingError, ShapeError
from gatedffn.ops import choice, kernels


def test_it_says_what_a_call_takes() -> None:
    layer = gf.FeedForward(48, 80)
    x = torch.randn(3, 48)
    found = gf.explain(layer, x)[0]
    assert found.path == "operator"
    assert list(found.decisions) == ["inference", "training, forward", "training, backward"]
    with torch.no_grad():
        layer(x)
    if choice.tuning():
        keys = [str(key) for key in choice._made if "forward, float32, up to 4" in str(key)]
        assert keys
    assert found.decisions["inference"].chosen in str(found)
    assert f"  kernels: {native.state(kernels.SOURCE)}" in str(found)
    assert json.loads(found.to_json())["path"] == "operator"


def test_every_layer_of_a_model() -> None:
    model = nn.Sequential(gf.FeedForward(8), nn.ReLU(), gf.FeedForward(8, variant="relu"))
    found = gf.explain(model)
    assert [each.name for each in found] == ["0", "2"]
    assert str(found).count("\n") > 4
    assert [each["name"] for each in json.loads(found.to_json())] == ["0", "2"]


def test_layers_that_are_alike_are_told_once() -> None:
    model = nn.Sequential(*(gf.FeedForward(8) for _ in range(5)), gf.FeedForward(8, variant="relu"))
    said = str(gf.explain(model))
    assert said.startswith("0 ... 4, 5 alike (SwiGLU, 8 -> ")
    assert said.count("inference") == 2


def test_frozen_weights_have_a_decision_of_their_own() -> None:
    layer, x = gf.FeedForward(40, 56).requires_grad_(False), torch.randn(5, 40, requires_grad=True)
    gf.explain(layer, x)
    made = set(choice._made)
    if choice.tuning():
        assert any(str(key).startswith("backward to x, float32, up to 8") for key in made)
    layer(x).sum().backward()
    assert set(choice._made) == made


def test_the_definition_and_a_named_way() -> None:
    plain = gf.explain(gf.FeedForward(8, backend="definition"))[0]
    assert {d.chosen for d in plain.decisions.values()} == {"definition"}
    named = gf.explain(gf.FeedForward(8, backend="torch"), tokens=64)[0]
    assert {d.chosen for d in named.decisions.values()} == {"torch"}


def test_children_that_are_called() -> None:
    layer = gf.FeedForward(8)
    layer.up_proj.register_forward_hook(lambda *_: None)
    found = gf.explain(layer)[0]
    assert found.path == "modules"
    assert "up_proj" in str(found)


def test_what_cannot_be_explained() -> None:
    with pytest.raises(SettingError, match="holds no FeedForward"):
        gf.explain(nn.Linear(2, 2))
    with pytest.raises(SettingError, match="at least 1"):
        gf.explain(gf.FeedForward(8), tokens=0)
    for x in (torch.randn(1, 9), torch.tensor(1.0), torch.empty(0, 8)):
        with pytest.raises(ShapeError, match="d_model, 8"):
            gf.explain(gf.FeedForward(8), x)


def test_scratch_made_in_inference_mode_serves_training() -> None:
    from gatedffn.ops import scratch

    layer, x = gf.FeedForward(64, 96, backend="torch"), torch.randn(40, 64)
    vars(scratch._held).clear()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()


def test_no_tokens_make_no_choice() -> None:
    before = set(choice._made)
    gf.FeedForward(24, 40)(torch.empty(0, 24, requires_grad=True)).sum().backward()
    assert set(choice._made) == before


def test_autocast_is_seen() -> None:
    """As by the call, whose weights it casts: they are in x's dtype then."""
    layer = gf.FeedForward(8, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = gf.explain(layer, torch.randn(4, 8, dtype=torch.bfloat16))
    assert {decision.chosen for decision in found.decisions.values()}.isdisjoint({"definition"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = gf.explain(layer, torch.randn(4, 8))
    assert "not onednn: for torch.bfloat16" in str(found)
