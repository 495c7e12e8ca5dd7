"""What transformers and PEFT ask of a model of theirs, asked of one whose blocks were replaced.

Each type of model is built small; a copy of it that nobody has touched says what is right.
"""

import copy
import inspect
import io
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.zoo import SINGLE, TYPES, inputs_of, tiny
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import gatedffn as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
types = pytest.mark.parametrize("kind", TYPES)


@cache
def built(kind: str) -> Any:
    return tiny(kind)


def pair(kind: str) -> tuple[Any, Any]:
    """A model and its copy, of which the blocks are replaced."""
    plain = copy.deepcopy(built(kind))
    model = copy.deepcopy(plain)
    assert gf.replace(model).replaced
    return plain, model


def close(kind: str, mine: Tensor, theirs: Tensor) -> None:
    all_close(kind, {"output": mine}, {"output": theirs})


def all_close(kind: str, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Relative to the norm, and to the largest for what is 0 but for rounding.

    transformers rounds to float32 in places.
    """
    assert mine.keys() == theirs.keys()
    largest = max(float(tensor.norm()) for tensor in theirs.values())
    assert largest > 1e-3, "nothing to compare"
    limit = 1e-4 if kind in SINGLE else 1e-6
    for name, tensor in theirs.items():
        off = float((mine[name] - tensor).norm())
        assert off <= limit * (float(tensor.norm()) + 1e-2 * largest), f"{name} is off by {off:.1e}"


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(**inputs)[0]
    return made


def step(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Gives every parameter its gradient in training; how many numbers were kept for that."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        whole = tensor if tensor._base is None else tensor._base
        kept += 0 if isinstance(whole, nn.Parameter) else tensor.numel()
        return tensor

    model.train()
    torch.manual_seed(3)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = model(**inputs)[0]
    backward(made)
    return kept


def backward(made: Tensor) -> None:
    """The same gradient comes in every time; that of a square is 0 after a norm."""
    grad = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).to(made)
    torch.autograd.backward(made, grad)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@types
def test_masks_embeddings_and_hidden_states(kind: str) -> None:
    plain, model = pair(kind)
    inputs = inputs_of(plain)
    close(kind, output(model, inputs), output(plain, inputs))
    if "inputs_embeds" in inspect.signature(plain.forward).parameters and "input_ids" in inputs:
        embeds = plain.get_input_embeddings()(inputs["input_ids"]).detach()
        rest = {name: t for name, t in inputs.items() if name != "input_ids"}
        given = {**rest, "inputs_embeds": embeds}
        close(kind, output(model, given), output(plain, given))
    grads = []
    for each in (model, plain):
        made = each(**inputs, output_hidden_states=True)
        hidden = made.get("hidden_states") or (
            made["encoder_hidden_states"] + made["decoder_hidden_states"]
        )
        for states in hidden:
            states.retain_grad()
        backward(made[0])
        of_each = ((str(i), states.grad) for i, states in enumerate(hidden))
        grads.append({name: grad for name, grad in of_each if grad is not None})
    if kind in ("cpmant", "xlnet"):  # whose hidden states are copies
        assert grads == [{}, {}]
    else:
        all_close(kind, *grads)


@types
def test_a_step_of_training_and_gradient_checkpointing(kind: str) -> None:
    plain, model = pair(kind)
    inputs = inputs_of(plain)
    assert step(model, inputs) <= step(plain, inputs)
    all_close(kind, gradients(model), gradients(plain))
    if not plain.supports_gradient_checkpointing:
        return
    kept = []
    for each in (model, plain):
        each.zero_grad()
        each.gradient_checkpointing_enable()
        kept.append(step(each, inputs))
    assert kept[0] == kept[1]
    all_close(kind, gradients(model), gradients(plain))


@types
def test_saved_copied_and_resized(kind: str, tmp_path: Path) -> None:
    plain, model = pair(kind)
    inputs = inputs_of(plain)
    wanted = output(plain, inputs)
    close(kind, output(copy.deepcopy(model), inputs), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    close(kind, output(torch.load(buffer, weights_only=False), inputs), wanted)
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path, attn_implementation="eager", dtype=plain.dtype)
    close(kind, output(loaded.eval(), inputs), wanted)
    if "input_ids" in inputs and kind != "cpmant":  # which counts its words by itself
        count = plain.get_input_embeddings().num_embeddings
        for each in (model, plain):
            torch.manual_seed(4)
            each.resize_token_embeddings(count + 8, mean_resizing=False)
        inputs["input_ids"][0, -1] = count + 5
        close(kind, output(model, inputs), output(plain, inputs))


@types
def test_lora_is_added_merged_and_taken_away(kind: str) -> None:
    peft: Any = import_module("peft")
    plain = copy.deepcopy(built(kind))
    model = copy.deepcopy(plain)
    targets = [
        ".".join(filter(None, (block.name, name)))
        for block in gf.replace(model).replaced
        for name in (block.projections or {}).values()
    ]
    inputs = inputs_of(plain)
    before = output(plain, inputs)
    adapted = []
    for each in (model, plain):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
        adapted.append(peft.get_peft_model(each, config).eval())
    wanted = output(adapted[1], inputs)
    assert float((wanted - before).norm()) > 1e-3 * float(before.norm())
    close(kind, output(adapted[0], inputs), wanted)
    adapted[0].merge_adapter()
    close(kind, output(adapted[0], inputs), wanted)
    adapted[0].unmerge_adapter()
    close(kind, output(adapted[0].unload(), inputs), before)
