"""`explain`: the decision that a call makes, and what it refuses."""

import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.layers import needs
from torch import nn
from typer.testing import CliRunner

import gatedffn as gf
from gatedffn import native
from gatedffn.cli.app import app
from gatedffn.errors import SettingError, ShapeError
from gatedffn.gain import Gain, plain_forward
from gatedffn.ops import kernels, measure
from gatedffn.ops import plan as plan_module
from gatedffn.ops.experts import experts
from gatedffn.ops.operator import by_rule
from gatedffn.sizing import experts_touched


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of what was asked to be measured."""
    needs("blocks")
    keys: list[str] = []
    real = measure.choose

    def choose(key: str, *of: Any) -> measure.Choice:
        keys.append(key)
        return real(key, *of)

    monkeypatch.setattr(measure, "tuning", lambda: True)
    monkeypatch.setattr(measure, "choose", choose)
    return keys


def test_it_says_what_a_call_takes(measured: list[str]) -> None:
    layer = gf.FeedForward(48, 80)
    found = gf.explain(layer, torch.randn(3, 48))[0]
    assert found.path == "operator"
    assert list(found.plans) == ["inference", "training, forward", "training, backward"]
    assert measured[0].startswith("forward, float32, up to 4 tokens, 48 -> 80 -> 48, gated, ")
    said, as_data = str(found).splitlines(), json.loads(found.to_json())
    assert as_data["path"] == "operator"
    for stage, plan in found.plans.items():
        assert f"  {stage}: {plan.chosen} ({plan.reason})" in said
        assert {f"    {way}: {ms:.3f} ms" for way, ms in plan.milliseconds.items()} <= set(said)
        against: dict[str, list[str]] = {}
        for way, why in plan.against.items():
            against.setdefault(why, []).append(way)
        assert {f"    not {', '.join(ways)}: {why}" for why, ways in against.items()} <= set(said)
        names = ("chosen", "reason", "milliseconds", "against")
        assert as_data["plans"][stage] == {name: getattr(plan, name) for name in names}
        assert plan.chosen in plan.milliseconds
    assert f"  kernels: {native.state(kernels.SOURCE)}" in said


@pytest.mark.usefixtures("measured")
def test_it_says_what_is_gained_beside_plain_pytorch() -> None:
    layers = [gf.FeedForward(40, 48, variant=name) for name in ("swiglu", "xielu", "swiglu")]
    found = gf.explain(nn.Sequential(*layers), tokens=2)
    gains = [each.gain for each in found]
    assert all(gain is not None and gain.plain and gain.tokens == 2 for gain in gains)
    assert gains[0] is gains[2] is not gains[1]
    assert str(found).splitlines()[-1].startswith("Beside plain PyTorch: at 2 tokens ")
    assert json.loads(found.to_json())[0]["gain"]["other"] == gains[0].other  # type: ignore[union-attr]


@pytest.mark.parametrize("name", list(gf.VARIANTS))
def test_plain_pytorch_computes_the_same(name: str) -> None:
    layer, x = gf.FeedForward(8, variant=name, bias=True), torch.randn(5, 8)
    torch.testing.assert_close(plain_forward(layer, x), layer(x))


def test_a_gain_that_is_not_sure_is_not_told() -> None:
    assert Gain(1, 3.0, 1.0, sure=False).words == "not told apart"
    assert Gain(1, 1.04, 1.0).words == "no difference"
    assert Gain(1, 12.0, 1.0).words == "12 times as fast"


def test_a_crowded_machine_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"slow": functools.partial(time.sleep, 0.02), "fast": functools.partial(time.sleep, 0.0)}
    for load, sure in ((0.0, True), (1e6, False)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, load, load))
        times, told = measure.side_by_side(ways)
        assert times["slow"] > times["fast"]
        assert told is sure


def test_one_reason_is_told_once() -> None:
    said = str(gf.explain(gf.FeedForward(8, dtype=torch.float64)))
    assert said.count("there is no kernel for torch.float64") == said.count("not few, blocks:") == 3
    with pytest.raises(SettingError, match="module is int: give a layer"):
        gf.explain(3)  # type: ignore[arg-type]


def test_it_says_that_a_choice_is_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("blocks")
    choice = measure.Choice("torch", {"torch": 1.0}, "measured", doubts=1)
    monkeypatch.setattr(measure, "tuning", lambda: True)
    monkeypatch.setattr(measure, "choose", lambda *_: choice)
    (found,) = gf.explain(gf.FeedForward(56, 72), tokens=40)
    reason = "measured, doubtful: rounds disagreed 1 time, a later process measures again"
    assert f"  inference: torch ({reason})" in str(found).splitlines()


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


def test_frozen_weights_have_a_decision_of_their_own(measured: list[str]) -> None:
    layer, x = gf.FeedForward(40, 56).requires_grad_(False), torch.randn(5, 40, requires_grad=True)
    gf.explain(layer, x)
    backward = [key for key in measured if key.startswith("backward")]
    assert [key.partition(",")[0] for key in backward] == ["backward to x"]
    y = layer(x)
    torch.autograd.backward(y, torch.ones_like(y))
    assert [key for key in measured if key.startswith("backward")] == backward


def test_the_definition_and_a_named_way() -> None:
    plain = gf.explain(gf.FeedForward(8, backend="definition"))[0]
    assert {d.chosen for d in plain.plans.values()} == {"definition"}
    named = gf.explain(gf.FeedForward(8, backend="torch"), tokens=64)[0]
    assert {d.chosen for d in named.plans.values()} == {"torch"}


def test_children_that_are_called() -> None:
    layer = gf.FeedForward(8)
    layer.up_proj.register_forward_hook(lambda *_: None)
    found = gf.explain(layer)[0]
    assert found.path == "modules"
    assert "up_proj" in str(found)


def test_a_forward_of_its_own() -> None:
    class Doubled(gf.FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    x = torch.randn(2, 8)
    patched: tuple[nn.Module, ...] = (gf.FeedForward(8), gf.GLU(), gf.Swish())
    for layer in patched:
        layer.forward = lambda x: x
        (found,) = gf.explain(layer, x)
        assert (found.path, found.why) == ("own forward", "a forward was set on it")
        assert not found.plans
    (found,) = gf.explain(Doubled(8), x)
    assert (found.path, found.why) == ("own forward", "Doubled has its own")


def test_a_wrapper_of_forward_calls_it() -> None:
    layer = gf.FeedForward(8)
    real = layer.forward
    layer.forward = functools.wraps(real)(lambda x: real(x))  # type: ignore[method-assign]
    assert gf.explain(layer)[0].path == "operator"


def test_the_plan_of_a_gate_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    glu, swish = gf.GLU("swiglu", dim=1), gf.Swish(learnable=True, num_parameters=6, dim=1)
    model, x = nn.Sequential(glu, swish), torch.randn(2, 12, 5, requires_grad=True)
    (first,) = gf.explain(glu, x)
    (second,) = gf.explain(swish, glu(x))
    assert {plan.chosen for plan in first.plans.values()} == {"kernels"}
    # Beta for each channel lies along another dimension than a kernel's columns.
    assert {plan.chosen for plan in second.plans.values()} == {"definition"}
    assert "SwiGLU of 2 x 12 x 5" in str(first)
    monkeypatch.setattr(plan_module, "plan", lambda *_: pytest.fail("it was planned anew"))
    y = model(x)
    torch.autograd.backward(y, torch.ones_like(y))
    model.requires_grad_(False)(x.detach())


def test_what_cannot_be_explained() -> None:
    for gate in (gf.GLU(), gf.Swish()):
        with pytest.raises(SettingError, match="give one as x"):
            gf.explain(gate)
    with pytest.raises(ShapeError, match="is odd"):
        gf.explain(gf.GLU(), torch.ones(3))
    with pytest.raises(SettingError, match="holds no FeedForward"):
        gf.explain(nn.Linear(2, 2))
    with pytest.raises(SettingError, match="at least 1"):
        gf.explain(gf.FeedForward(8), tokens=0)
    with pytest.raises(SettingError, match=r"slots is 1\.5: it must be a whole number"):
        gf.explain(gf.Experts(8, 8, 4), slots=1.5)  # type: ignore[arg-type]
    for x in (torch.randn(1, 9), torch.tensor(1.0), torch.empty(0, 8)):
        with pytest.raises(ShapeError, match="d_model, 8"):
            gf.explain(gf.FeedForward(8), x)


def test_scratch_made_in_inference_mode_serves_training() -> None:
    layer, x = gf.FeedForward(64, 96, backend="torch"), torch.randn(40, 64)

    def in_turn() -> None:
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()

    with ThreadPoolExecutor(1) as fresh:  # a thread has its own
        fresh.submit(in_turn).result()
    assert layer.up_proj.weight.grad is not None


def test_no_tokens_make_no_choice(measured: list[str]) -> None:
    gf.FeedForward(24, 40)(torch.empty(0, 24, requires_grad=True)).sum().backward()
    assert not measured


def test_autocast_is_seen() -> None:
    """As by the call, whose weights it casts: they are in x's dtype then."""
    layer = gf.FeedForward(8, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = gf.explain(layer, torch.randn(4, 8, dtype=torch.bfloat16))
    assert {decision.chosen for decision in found.plans.values()}.isdisjoint({"definition"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = gf.explain(layer, torch.randn(4, 8))
    assert "not onednn: for torch.bfloat16" in str(found)


def test_by_rule_nothing_that_was_chosen_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("blocks")
    before = measure.tuning()  # which the environment may have switched off
    layer, x = gf.FeedForward(16, 24), torch.randn(40, 16)
    layer(x)
    made: list[str] = []
    monkeypatch.setattr(measure, "choose", lambda key, *_: made.append(key))
    with by_rule():
        for each in (layer, gf.FeedForward(16, 40)):
            each(x).sum().backward()
            plans = gf.explain(each, x)[0].plans.values()
            assert {plan.reason for plan in plans} == {"the rule without measuring"}
    assert not made
    assert measure.tuning() == before


def test_experts_are_told_with_what_a_batch_touches() -> None:
    model = nn.Sequential(gf.Experts(16, 24, 8, variant="geglu"), gf.FeedForward(16))
    found = gf.explain(model, tokens=4, slots=3)
    assert [each.name for each in found] == ["0", "1"]
    first, second = found
    assert first.touched is not None
    assert first.touched.mean == pytest.approx(8 * (1 - (5 / 8) ** 4))
    assert second.touched is None
    said = str(found)
    assert "0 (GEGLU, 8 experts of 16 -> 24 -> 16): operator" in said
    assert "  4 tokens of 3 experts each go through 6.8 of 8 on average, if all are alike" in said
    data = json.loads(found.to_json())
    assert data[0]["touched"]["experts"] == 8
    assert data[1]["touched"] is None
    assert gf.explain(gf.Experts(4, 4, 1))[0].touched.slots == 1  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="slots is 9: there are 8 experts"):
        gf.explain(model, slots=9)


def test_a_batch_touches_what_is_said() -> None:
    """Over many draws, within what they spread."""
    drawn = [torch.rand(5, 16).topk(2).indices for _ in range(2000)]
    touched = [len({*index.flatten().tolist()}) for index in drawn]
    assert sum(touched) / 2000 == pytest.approx(experts_touched(16, 2, 5), abs=0.1)


def test_the_plan_of_experts_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = gf.Experts(16, 24, 8), torch.randn(4, 16, requires_grad=True)
    (found,) = gf.explain(layer, tokens=4)
    assert list(found.plans) == ["inference", "training, forward", "training, backward"]
    assert {plan.stage for plan in found.plans.values()} == {"inference", "forward", "backward"}
    real = plan_module.plan

    def plan(table: Any, *of: Any) -> Any:
        assert table is not experts.table, "it was planned anew"
        return real(table, *of)

    monkeypatch.setattr(plan_module, "plan", plan)
    index, weights = torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2, requires_grad=True)
    y = layer(x, index, weights)
    torch.autograd.backward(y, torch.ones_like(y))
    with torch.no_grad():
        layer(x, index, weights)


def test_the_command_tells_experts() -> None:
    options = ["--d-model", "16", "--d-hidden", "24", "--tokens", "4", "--json"]
    result = CliRunner().invoke(app, ["explain", *options, "--experts", "8", "--slots", "3"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["layer"] == "SwiGLU, 8 experts of 16 -> 24 -> 16"
    assert found["touched"]["slots"] == 3
    result = CliRunner().invoke(app, ["explain", *options, "--slots", "3"])
    assert "give --experts too" in str(result.exception)
