from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gatedffn import native
from gatedffn.compare.machine import step_memory
from gatedffn.compare.models import build, cost, initialise, mismatches
from gatedffn.compare.settings import CONVOLUTION_ARMS, Setting, make_setting
from gatedffn.errors import BuildError, SettingError
from gatedffn.layers import FeedForward
from gatedffn.ops import measure
from gatedffn.ops.operator import forget_plans


def test_every_feed_forward_is_ours(tiny: Setting) -> None:
    model = build(replace(tiny, layers=3), "geglu", 256)
    blocks = [m for m in model.modules() if isinstance(m, FeedForward)]
    assert [block.variant for block in blocks] == ["geglu"] * 3
    assert not any("LlamaMLP" in type(m).__name__ for m in model.modules())


def test_arms_share_all_but_the_feed_forward(tiny: Setting) -> None:
    states = []
    for arm in ("relu", "swiglu"):
        model = build(tiny, arm, 256)
        initialise(model, "fan_in", seed=1)
        states.append(model.state_dict())
    shared = [name for name in states[0] if ".mlp." not in name]
    assert len(shared) >= 8
    for name in shared:
        assert torch.equal(states[0][name], states[1][name]), name


def test_seeds_and_matrices_differ(tiny: Setting) -> None:
    model = build(tiny, "swiglu", 256)
    initialise(model, "fan_in", seed=0)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    initialise(model, "fan_in", seed=1)
    layer = "model.layers.0.mlp."
    assert not torch.equal(first[layer + "gate_proj.weight"], first[layer + "up_proj.weight"])
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], parameter) == (parameter.dim() < 2), name


@pytest.mark.parametrize(("init", "spread"), [("fan_in", 64**-0.5), ("0.02", 0.02)])
def test_init_is_what_it_says(tiny: Setting, init: str, spread: float) -> None:
    model = build(replace(tiny, d_model=64), "relu", 256)
    initialise(model, init, seed=0)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    # Of n values the standard deviation is known to 1 / sqrt(2 n); five of that is plenty.
    assert abs(float(weight.detach().std()) / spread - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_hidden_units_of_two_widths_start_alike(tiny: Setting) -> None:
    found = []
    for arm in ("relu", "swiglu"):
        model = build(replace(tiny, d_model=64), arm, 256)
        initialise(model, "fan_in", seed=1)
        mlp = model.get_submodule("model.layers.0.mlp")
        up, down = (getattr(mlp, name).weight.detach() for name in ("up_proj", "down_proj"))
        found.append((up, down * down.shape[1] ** 0.5))
    (wide_up, wide_down), (up, down) = found
    units = len(up) - 1  # the last numbers of a draw are drawn together
    assert len(wide_up) > len(up)
    torch.testing.assert_close(up[:units], wide_up[:units])
    torch.testing.assert_close(down[:, :units], wide_down[:, :units])


def test_what_branches_add_has_the_scale_of_a_part_of_their_sum(tiny: Setting) -> None:
    model = build(replace(tiny, d_model=64, layers=3), "relu", 256)
    initialise(model, "fan_in", seed=0)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weight = model.get_parameter(f"model.layers.1.{name}.weight").detach()
        spread = (6 * weight.shape[1]) ** -0.5
        assert abs(float(weight.std()) / spread - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_costs_are_those_of_the_model(tiny: Setting) -> None:
    model = build(tiny, "swiglu", 256)
    counted = cost(tiny, "swiglu", 256)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    attention = 12 * tiny.layers * tiny.context * tiny.d_model
    assert counted.flops == 6 * sum(p.numel() for p in matrices) + attention


@pytest.mark.parametrize("arm", CONVOLUTION_ARMS)
def test_convolutions_and_the_lstm_have_equal_parameters(arm: str) -> None:
    setting = make_setting("quick", "gated-conv")
    costs = {name: cost(setting, name, 256) for name in {arm, "glu", setting.baseline}}
    ratio = costs[arm].parameters / costs["glu"].parameters
    assert abs(ratio - 1) < 0.01
    assert costs["glu"].width == setting.d_model
    mismatches(setting, costs)


def test_convolutions_do_not_see_the_future() -> None:
    setting = make_setting("quick", "gated-conv", d_model=16, layers=2)
    for arm in CONVOLUTION_ARMS:
        model = build(setting, arm, 256)
        ids = torch.randint(0, 256, (1, 20))
        changed = ids.clone()
        changed[0, 12] += 1 if changed[0, 12] < 255 else -1
        before, after = (model(input_ids=x)["logits"] for x in (ids, changed))
        assert torch.equal(before[:, :12], after[:, :12]), arm
        assert not torch.equal(before[:, 12:], after[:, 12:]), arm


def test_unequal_sizes_are_refused_unless_one_insists(tiny: Setting) -> None:
    uneven = replace(tiny, multiple_of=64)
    costs = {arm: cost(uneven, arm, 256) for arm in uneven.variants}
    with pytest.raises(SettingError, match=r"swiglu has 50\.0% more parameters than relu"):
        mismatches(uneven, costs)
    allowed = mismatches(replace(uneven, allow_mismatch=True), costs)
    assert allowed == {"relu": 0.0, "swiglu": 0.5}


def test_memory_counts_weights_gradients_and_moments(tiny: Setting) -> None:
    memory = step_memory(tiny, "swiglu", 256)
    parameters = cost(tiny, "swiglu", 256).parameters
    assert memory == step_memory(tiny, "swiglu", 256)
    assert memory > 16 * parameters
    # One token has next to nothing to keep.
    least = step_memory(replace(tiny, batch=1, context=2), "swiglu", 256)
    assert 16 * parameters < least < 1.1 * 16 * parameters
    factored = step_memory(replace(tiny, optimizer="adafactor"), "swiglu", 256)
    assert memory - factored == 2 * 4 * cost(tiny, "swiglu", 256).parameters, "no moments"
    longer = step_memory(replace(tiny, batch=2 * tiny.batch), "swiglu", 256)
    logits = 4 * tiny.tokens_per_step * 256
    assert longer > memory + logits


def test_memory_does_not_depend_on_what_came_before(
    tiny: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise BuildError("no cache folder")

    arms = ("relu", "swiglu", "geglu")
    found = [{arm: step_memory(tiny, arm, 256) for arm in arms}]
    # From here on no choice is on the disk: the first forward of each size measures its ways.
    monkeypatch.setattr(native, "cache_folder", none)
    for order in (arms, arms[::-1]):
        forget_plans()
        measure.forget()
        found.append({arm: step_memory(tiny, arm, 256) for arm in order})
        assert measure.made()
    assert found[0] == found[1] == found[2]
    assert found[0]["swiglu"] == found[0]["geglu"] > found[0]["relu"]
