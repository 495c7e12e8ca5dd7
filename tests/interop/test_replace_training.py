"""A replaced model trains as before: with dropout, checkpointing, autocast, LoRA, the Trainer."""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.architectures import ARCHITECTURES, TEXT, TOKENS, results, spread
from torch import Tensor, nn

import gatedffn as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
GATED = ["llama", "gemma", "phi3", "t5-v1.1"]
PLAIN = ["gpt2", "nemotron", "opt", "bloom", "bert", "apertus"]


def language_model(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **settings}))


def train(model: Any, steps: int = 20, **options: Any) -> list[float]:
    """The losses of a few steps on the same random text, which they learn."""
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    model.train()
    ids = torch.randint(3, TOKENS, (4, 12))
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, **options).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_steps_end_at_the_same_loss(dtype: torch.dtype) -> None:
    model = language_model().to(dtype)
    other = copy.deepcopy(model)
    gf.replace(model, strict=True)
    mine, theirs = train(model), train(other)
    assert theirs[-1] < theirs[0] - 0.1
    assert mine == pytest.approx(theirs, rel=1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("rounding", ["model", "float32"])
def test_twenty_steps_in_bfloat16(rounding: Any) -> None:
    model = language_model().bfloat16()
    other = copy.deepcopy(model)
    gf.replace(model, rounding=rounding, strict=True)
    mine, theirs = train(model), train(other)
    if rounding == "model":
        assert mine == theirs
    else:
        assert mine == pytest.approx(theirs, rel=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rounding", ["model", "float32"])
def test_gradient_checkpointing_and_autocast(reentrant: bool, rounding: Any) -> None:
    models = [language_model() for _ in range(3)]
    checkpointed, plain, original = models
    for model in (checkpointed, plain):
        gf.replace(model, strict=True, rounding=rounding)
    for model in (checkpointed, original):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in models:
        model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [train(model, 5, use_cache=False) for model in models]
    assert losses[0] == losses[1]
    if rounding == "model":
        assert losses[0] == losses[2]
    else:
        assert losses[0] == pytest.approx(losses[2], rel=5e-2)


@pytest.mark.parametrize("name", ["t5-v1.1", "gpt2", "bert", "modernbert", "opt", "bloom", "vit"])
def test_dropout_draws_the_same_numbers(name: str) -> None:
    settings: dict[str, Any] = {
        "t5-v1.1": {"dropout_rate": 0.3},
        "gpt2": {"resid_pdrop": 0.3},
        "modernbert": {"mlp_dropout": 0.3},
        "opt": {"dropout": 0.3},
        "bloom": {"hidden_dropout": 0.3},
    }.get(name, {"hidden_dropout_prob": 0.3})
    architecture = ARCHITECTURES[name]
    from dataclasses import replace

    architecture = replace(architecture, settings={**architecture.settings, **settings})
    model, inputs = architecture.build().train(), architecture.inputs()
    other = copy.deepcopy(model)
    gf.replace(model, strict=True)
    made = []
    for m in (model, other):
        torch.manual_seed(5)
        made.append(results(m, inputs))
    for key, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][key], rtol=1e-3, atol=1e-3, msg=key)
    assert not torch.allclose(made[0]["output"], results(model, inputs)["output"])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_functional_dropout_is_left_to_the_forward_that_has_it(p: float) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.dropout(F.gelu(self.up(x)), p, self.training)
            result: Tensor = self.down(hidden)
            return result

    mlp: Any = Mlp()
    other = copy.deepcopy(mlp)
    report = gf.replace(mlp, strict=True)
    assert report.replaced[0].notes == (
        ("in training by its own forward, which does more then",) if p else ()
    )
    x = torch.randn(64, 8)
    for training in (False, True):
        mlp.train(training)
        other.train(training)
        torch.manual_seed(3)
        y = mlp(x)
        torch.manual_seed(3)
        torch.testing.assert_close(y, other(x))
        own = "its own forward does something in training that none of its modules does"
        assert mlp.why_modules() == (own if p and training else None)


# Rounding.


def one_rounding(block: Any, x: Tensor) -> Tensor:
    """The block with gate and up rounded by their projections and the product rounded once."""
    gate, up = block.gate_proj(x), block.up_proj(x)
    hidden = (F.silu(gate.float()) * up.float()).to(gate.dtype)
    result: Tensor = block.down_proj(hidden)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_two_roundings_bit_for_bit(dtype: torch.dtype) -> None:
    model = ARCHITECTURES["llama"].build().to(dtype)
    block = model.layers[0].mlp
    x = torch.randn(64, 32, dtype=dtype)
    theirs, once = block(x), one_rounding(block, x)
    assert not torch.equal(theirs, once)
    report = gf.replace(model, rounding="model", strict=True)
    assert torch.equal(block(x), theirs)
    report.undo()
    gf.replace(model, rounding="float32", backend="definition", strict=True)
    assert torch.equal(block(x), once)


@pytest.mark.parametrize("name", GATED + PLAIN)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_rounding_of_the_model_bit_for_bit(name: str, autocast: bool) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = results(model, inputs)
        gf.replace(model, rounding="model", strict=True)
        after = results(model, inputs)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", GATED)
def test_in_bfloat16_one_rounding_is_no_further_from_the_truth(name: str) -> None:
    model = ARCHITECTURES[name].build().bfloat16()
    report = gf.replace(model, strict=True)
    block = model.get_submodule(report.replaced[0].name)
    x = torch.randn(512, 32, dtype=torch.bfloat16)
    made = block(x)
    report.undo()
    truth = copy.deepcopy(block).double()(x.double())
    errors = [float((y.double() - truth).norm() / truth.norm()) for y in (made, block(x))]
    assert errors[0] <= errors[1]


def test_mixed_dtypes_are_computed_as_before() -> None:
    model = ARCHITECTURES["t5-v1.1"].build().bfloat16()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()  # as transformers keeps it
    inputs = ARCHITECTURES["t5-v1.1"].inputs()
    before = results(model, inputs)
    gf.replace(model, strict=True)
    after = results(model, inputs)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# Other people's trainers.


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["gate_proj"]),
        ("llama", ["up_proj"]),
        ("llama", ["down_proj"]),
        ("llama", ["gate_proj", "up_proj", "down_proj"]),
        ("phi3", ["gate_up_proj", "down_proj"]),
        ("t5-v1.1", ["wi_0", "wo"]),
        ("gpt2", ["c_fc", "mlp.c_proj"]),
        ("opt", ["fc1"]),
        ("bloom", ["dense_4h_to_h"]),
        ("bert", ["intermediate.dense"]),
        ("apertus", ["up_proj"]),
        ("falcon-h1", ["gate_proj", "down_proj"]),
    ],
)
def test_lora(name: str, targets: list[str]) -> None:
    peft: Any = import_module("peft")
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    plain = copy.deepcopy(model)
    gf.replace(model, strict=True)
    made = []
    for m in (model, plain):
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
        torch.manual_seed(7)
        adapted = peft.get_peft_model(m, config).eval()
        named = results(adapted, inputs)
        assert any("lora_" in key for key in named)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs)[0], named["output"], rtol=2e-3, atol=2e-3)
        made.append(named)
    assert made[0].keys() == made[1].keys()
    for key, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][key], rtol=2e-3, atol=2e-3, msg=key)
    wanted = None if name != "falcon-h1" else "it has multipliers"
    block = next(m for m in model.modules() if isinstance(m, gf.FeedForward))
    assert block.why_modules() == wanted


def test_adapters_before_replace_are_left() -> None:
    peft: Any = import_module("peft")
    model = ARCHITECTURES["llama"].build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))
    report = gf.replace(adapted)
    assert not report.replaced
    assert "up_proj is a peft" in str(report)
    assert "replace the model before adding adapters" in str(report)


def test_the_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    texts = [
        {"input_ids": ids, "labels": ids} for ids in torch.randint(3, TOKENS, (32, 12)).unbind(0)
    ]
    losses = []
    for replaced in (True, False):
        model = language_model()
        if replaced:
            gf.replace(model, strict=True)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(replaced)),
            use_cpu=True,
            bf16=True,
            gradient_checkpointing=True,
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_steps=6,
            report_to=[],
            disable_tqdm=True,
            seed=3,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=texts)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        saved = tmp_path / str(replaced) / "checkpoint-6"
        loaded = type(model).from_pretrained(saved)
        assert list(loaded.state_dict()) == list(model.state_dict())
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_fresh_draw_of_the_weights() -> None:
    mlp: Any = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    gf.replace(mlp)
    spread(mlp)
    before = mlp[0].weight.clone()
    mlp.reset_parameters()
    assert not torch.equal(mlp[0].weight, before)


def test_a_fresh_draw_returns_a_learned_activation_to_its_start() -> None:
    model = ARCHITECTURES["apertus"].build()
    gf.replace(model)
    block = next(m for m in model.modules() if isinstance(m, gf.FeedForward))
    block.reset_parameters()
    learned = {n: v for n, v in block.activation_parameters().items() if isinstance(v, Tensor)}
    assert set(learned) == {"alpha_p", "alpha_n"}
    for name, value in learned.items():
        assert float(value) == pytest.approx(gf.VARIANTS["xielu"].defaults[name], rel=1e-6)
