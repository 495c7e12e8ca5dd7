"""The decoder with experts: what it is made of, how it starts and learns, what is said of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from compare.conftest import Log, made_up, numbers
from gatedffn.compare.join import joined
from gatedffn.compare.loads import loads
from gatedffn.compare.models import build, cost, initialise, mismatches
from gatedffn.compare.page import page
from gatedffn.compare.report import summary_of, write_report
from gatedffn.compare.settings import Run, Setting, make_setting, run_key
from gatedffn.compare.study import prepare, study
from gatedffn.errors import SettingError
from gatedffn.mixture import MixtureFeedForward
from gatedffn.variants import PAPER


@pytest.fixture
def small(tiny: Setting) -> Setting:
    return replace(tiny, model="moe", layers=2, experts=4, top_k=2)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 3), (4, 1)])
def test_parameters_and_active_ones_are_equal(experts: int, top_k: int) -> None:
    setting = make_setting("quick", "moe", experts=experts, top_k=top_k)
    costs = {arm: cost(setting, arm, 256) for arm in PAPER}
    off = mismatches(setting, costs)
    assert max(map(abs, off.values())) < 0.01
    dense = cost(make_setting("quick", "decoder"), "relu", 256)
    routers = setting.layers * experts * setting.d_model
    for arm, counted in costs.items():
        mixtures = [
            m for m in build(setting, arm, 256).modules() if isinstance(m, MixtureFeedForward)
        ]
        assert [m.variant for m in mixtures] == [arm] * setting.layers
        of_experts = sum(p.numel() for m in mixtures for p in m.experts.parameters())
        assert counted.compared == of_experts
        assert counted.parameters - counted.active == of_experts * (experts - top_k) // experts
        active = counted.compared * top_k / experts
        assert active / dense.compared - 1 == pytest.approx(off[arm], abs=2e-3)
        assert counted.active - active == dense.parameters - dense.compared + routers


def test_a_token_costs_what_it_costs_in_the_decoder_and_the_router(small: Setting) -> None:
    dense = replace(small, model="decoder")
    more = small.layers * small.experts * small.d_model
    mixture, alone = cost(small, "relu", 256), cost(dense, "relu", 256)
    assert mixture.active - alone.active == more
    assert mixture.flops - alone.flops == 6 * more


def test_arms_share_all_but_the_experts_and_their_units_start_alike(small: Setting) -> None:
    wide = replace(small, d_model=64)
    states = []
    for arm in ("relu", "swiglu"):
        model = build(wide, arm, 256)
        initialise(model, "fan_in", seed=1)
        states.append(model.state_dict())
    ungated, gated = states
    shared = [name for name in ungated if ".experts." not in name]
    assert sum(name.endswith("mlp.gate.weight") for name in shared) == small.layers
    for name in shared:
        assert torch.equal(ungated[name], gated[name]), name
    experts = "decoder.model.layers.1.mlp.experts."
    gates, ups = gated[experts + "gate_up_proj"].chunk(2, dim=1)
    downs, wide_downs = (state[experts + "down_proj"] for state in (gated, ungated))
    units = ups.shape[1] - 1  # the last numbers of a draw are drawn together
    torch.testing.assert_close(ups[:, :units], ungated[experts + "up_proj"][:, :units])
    scaled, wide_scaled = (d * d.shape[2] ** 0.5 for d in (downs, wide_downs))
    torch.testing.assert_close(scaled[..., :units], wide_scaled[..., :units])
    matrices = [m for stack in (gates, ups) for m in stack]
    assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])
    # Of n values the standard deviation is known to 1 / sqrt(2 n); five of that is plenty.
    for stack, fan_in in ((ups, 64), (downs, 2 * small.layers * downs.shape[2])):
        off = float(stack.std()) * fan_in**0.5 - 1
        assert abs(off) < 5 / (2 * stack.numel()) ** 0.5


def test_the_balance_is_in_the_loss_of_training_alone(small: Setting) -> None:
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(256, (2, 32))}
    batch["labels"] = batch["input_ids"]
    model = build(replace(small, balance=0.25), "swiglu", 256)
    x: list[torch.Tensor] = []
    mixtures = [m for m in model.modules() if isinstance(m, MixtureFeedForward)]
    for mixture in mixtures:
        mixture.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0]))
    more = model(**batch)["loss"] - model.eval()(**batch)["loss"]
    balance = sum(m.gate(of).balance_loss() for m, of in zip(mixtures, x, strict=False))
    torch.testing.assert_close(more, 0.25 * balance)
    more.backward()
    assert all(m.gate.weight.grad is not None for m in mixtures)


class _Stopped(Log):
    def step(self, run: Run, step: int, loss: float | None) -> None:
        super().step(run, step, loss)
        if len(self.steps) == 12 + 8:
            raise KeyboardInterrupt


def test_a_study_of_it_and_the_same_after_a_stop(
    small: Setting, prose: Path, tmp_path: Path
) -> None:
    setting = replace(small, variants=("swiglu",), baseline="swiglu", checkpoint_every=5)
    prepared = prepare(setting, [str(prose)])
    result = study(prepared, tmp_path / "whole", Log())
    assert result is not None
    for runs in result.runs.values():
        for run in runs:
            curve = run["result"]["curve"]
            assert curve[-1][1] < curve[0][1]
            tokens = {sum(layer) / small.top_k for layer in run["result"]["load"]}
            assert len(run["result"]["load"]) == small.layers
            assert len(tokens) == 1
            assert tokens.pop() in range(small.held_out_tokens // 2, small.held_out_tokens + 1)
    with pytest.raises(KeyboardInterrupt):
        study(prepared, tmp_path / "stopped", _Stopped())
    log = Log()
    study(prepared, tmp_path / "stopped", log)
    assert (log.reused, log.steps[0]) == (1, 6)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    write_report(result, tmp_path)
    report = (tmp_path / "report.md").read_text()
    for phrase in ("## Load of the experts", "4 experts, and a token goes through 2", "| active |"):
        assert phrase in report
    assert f"{result.rows[0].active:,}" in report


def test_loads_are_told(small: Setting) -> None:
    changes = {"relu": {"load": [[30, 30, 30, 30], [0, 20, 40, 60]]}}
    changes["swiglu"] = {"load": [[30, 30, 30, 30]] * 2}
    result = made_up(changes, variants=("relu", "swiglu"), seeds=2)
    assert loads(result) == []
    assert "Load of the experts" not in page(result)
    assert "loads" not in summary_of(result)
    result = replace(result, setting=replace(small, seeds=2))
    for runs in result.runs.values():
        for run in runs:
            run["setting"] = asdict(result.setting)
    by_arm = {load.variant: load for load in loads(result)}
    even, uneven = by_arm["swiglu"], by_arm["relu"]
    assert (even.least, even.most, even.evenness, even.unused) == (0.5, 0.5, 1.0, 0)
    assert (uneven.least, uneven.most, uneven.unused, uneven.experts) == (0.0, 1.0, 2, 16)
    shares = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
    entropy = -float((shares * shares.log()).sum()) / torch.tensor(4.0).log().item()
    assert uneven.evenness == pytest.approx((1 + entropy) / 2)
    assert "<td>0.0%</td><td>100.0%</td>" in page(result)
    assert [load["variant"] for load in summary_of(result)["loads"]] == ["swiglu", "relu"]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("moe", {"top_k": 9}, "top_k is 9 and experts 8"),
        ("moe", {"experts": 0}, "experts is 0: it must be at least 1"),
        ("moe", {"balance": -0.1}, "balance is -0.1"),
        ("moe", {"heads": 5}, "must be a multiple of 10"),
        ("decoder", {"experts": 4, "top_k": 1}, "experts and top_k: the decoder model has no such"),
        ("t5", {"balance": 0.0}, "balance: the t5 model has no such thing"),
        ("gated-conv", {"experts": 4}, "experts: the gated-conv model has no such thing"),
    ],
)
def test_what_does_not_fit_is_refused(model: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_setting("quick", model, **changes)


def test_runs_without_experts_are_what_they_were(
    tiny: Setting, small: Setting, prose: Path, tmp_path: Path
) -> None:
    run = Run(variant="relu", seed=0, learning_rate=1e-3)
    for model, same in ((tiny, True), (small, False)):
        for changes in ({"experts": 16}, {"top_k": 1}, {"balance": 0.0}):
            key = run_key(replace(model, **changes), run, {})
            assert (key == run_key(model, run, {})) == same
    study(prepare(replace(tiny, seeds=1, steps=2), [str(prose)]), tmp_path, Log())
    first, *_ = (tmp_path / "runs").iterdir()
    record = json.loads(first.read_text())
    for name in ("experts", "top_k", "balance"):
        del record["setting"][name]
    del record["cost"]["active"], record["result"]["load"]
    first.write_text(json.dumps(record))
    [result] = joined([tmp_path], {})
    assert all(row.active == row.parameters for row in result.rows)
