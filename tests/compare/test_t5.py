"""The encoder-decoder: what it is made of, how it starts, what it costs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compare.conftest import TINY, Log
from gatedffn.compare.corruption import Corruption
from gatedffn.compare.models import blank, build, cost, initialise, mismatches
from gatedffn.compare.report import write_report
from gatedffn.compare.settings import Setting, make_setting
from gatedffn.compare.store import read_runs
from gatedffn.compare.study import prepare, study
from gatedffn.compare.task import task_of
from gatedffn.errors import SettingError
from gatedffn.layers import FeedForward
from gatedffn.variants import PAPER


@pytest.fixture
def small(tiny: Setting) -> Setting:
    return replace(tiny, model="t5", layers=2)


def test_every_feed_forward_is_ours_and_of_the_papers_width(small: Setting) -> None:
    wide = replace(small, d_model=96, variants=PAPER)
    costs = {arm: cost(wide, arm, 256) for arm in PAPER}
    assert {arm: c.width for arm, c in costs.items() if c.width != 256} == {
        "relu": 384,
        "gelu": 384,
        "swish": 384,
    }
    assert max(mismatches(wide, costs).values()) == 0
    model = build(wide, "geglu", 256)
    blocks = [m for m in model.modules() if isinstance(m, FeedForward)]
    assert [block.variant for block in blocks] == ["geglu"] * 4
    assert not any("DenseActDense" in type(m).__name__ for m in model.modules())
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_it_starts_as_t5_does(small: Setting) -> None:
    wide = replace(small, d_model=64, heads=4)
    model = build(wide, "relu", 256)
    initialise(model, "fan_in", seed=0)
    for name, spread in {
        "shared.weight": 1.0,
        "encoder.block.0.layer.0.SelfAttention.q.weight": (64 * 16) ** -0.5,
        "decoder.block.1.layer.1.EncDecAttention.q.weight": (64 * 16) ** -0.5,
        "decoder.block.1.layer.0.SelfAttention.k.weight": 64**-0.5,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 64**-0.5,
        "encoder.block.0.layer.1.DenseReluDense.down_proj.weight": 256**-0.5,
    }.items():
        weight = model.get_parameter(name).detach()
        # Of n values the standard deviation is known to 1 / sqrt(2 n); five of that is plenty.
        assert abs(float(weight.std()) / spread - 1) < 5 / (2 * weight.numel()) ** 0.5, name


def test_arms_share_all_but_the_feed_forward(small: Setting) -> None:
    states = []
    for arm in ("relu", "swiglu"):
        model = build(small, arm, 256)
        initialise(model, "fan_in", seed=1)
        states.append(model.state_dict())
    shared = [name for name in states[0] if "DenseReluDense" not in name]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(states[0][name], states[1][name]), name


def test_a_target_sees_its_past_and_all_of_the_input(small: Setting) -> None:
    model = build(small, "swiglu", 256).eval()
    inputs = blank(small, 1, "cpu")
    before = model(**inputs).logits
    later = {**inputs, "labels": inputs["labels"].clone()}
    later["labels"][0, 4] = 7
    after = model(**later).logits
    # The label at 4 is what the decoder is given at 5.
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    given = {**inputs, "input_ids": inputs["input_ids"].clone()}
    given["input_ids"][0, -1] = 7
    assert not torch.equal(before[:, 0], model(**given).logits[:, 0])


def test_its_arithmetic_is_that_of_its_products(small: Setting) -> None:
    """Counted by PyTorch's own counter, in a step of two windows."""
    from torch.utils.flop_counter import FlopCounterMode

    model: Any = build(small, "swiglu", 256)
    model.set_attn_implementation("eager")  # the counter does not know the fused one
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.backend = "definition"
    with FlopCounterMode(display=False) as counter:
        model(**blank(small, 2, "cpu"))["loss"].backward()
    counted = counter.get_total_flops() / (2 * small.context)
    assert cost(small, "swiglu", 256).flops == pytest.approx(counted, rel=0.01)


def test_seeds_and_arms_have_the_data_that_they_should(small: Setting, prose: Path) -> None:
    tokens = prepare(small, [str(prose)]).tokens
    one, same, other = (task_of(small, tokens, seed) for seed in (0, 0, 1))
    for i in range(4):
        for name in ("input_ids", "labels"):
            assert torch.equal(one.train[i][name], same.train[i][name])
            assert torch.equal(one.held_out[i][name], other.held_out[i][name])
            assert torch.equal(one.selection[i][name], other.selection[i][name])
    assert not torch.equal(one.train[0]["labels"], other.train[0]["labels"])
    sizes = Corruption(small.context, tokens.vocabulary)
    assert one.train[0]["input_ids"].shape == (sizes.input_length,)
    assert one.train[0]["labels"].shape == (sizes.target_length,)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_study_of_it(small: Setting, prose: Path, tmp_path: Path, optimizer: str) -> None:
    setting = replace(small, optimizer=optimizer, seeds=1, steps=12)
    result = study(prepare(setting, [str(prose)]), tmp_path, Log())
    assert result is not None
    for row in result.rows:
        assert row.bits_per_byte is None
        curve = result.runs[row.variant][0]["result"]["curve"]
        assert curve[-1][1] < curve[0][1]
    write_report(result, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert {"adamw": "AdamW", "adafactor": "Adafactor"}[optimizer] + ", cosine" in report
    assert "nats a token of the target" in report
    assert "Shazeer, 65,536 steps" in report


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingError, match="must be a multiple of the heads"):
        make_setting("quick", "t5", d_model=30)
    assert make_setting("quick", "t5", d_model=36).d_model == 36
    with pytest.raises(SettingError, match="no optimizer is called 'sgd': choose from adamw, ada"):
        make_setting("quick", "t5", optimizer="sgd")


def test_no_dropout(small: Setting) -> None:
    model = build(small, "relu", 256)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}


@pytest.mark.slow
def test_two_processes_train_as_one(prose: Path, tmp_path: Path) -> None:
    setting = make_setting("quick", "t5", **{**TINY, "variants": ("relu",), "seeds": 1})
    result = study(prepare(setting, [str(prose)]), tmp_path / "one", Log())
    assert result is not None
    folder = tmp_path / "two"
    arguments = ["-m", "gatedffn", "compare", str(prose), "--model=t5", "--variant=relu"]
    arguments += [f"--out={folder}", "--seeds=1"]
    for name, value in TINY.items():
        if name not in ("variants", "evaluations", "seeds"):
            arguments.append(f"--{name.replace('_', '-')}={value}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    [record] = read_runs(folder).values()
    one = result.runs["relu"][0]["result"]
    assert record["result"]["held_out"] == pytest.approx(one["held_out"], rel=1e-4)
    ours, theirs = (r["training_curve"] for r in (record["result"], one))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-3)
