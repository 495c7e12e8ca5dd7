"""Conversion of files and folders: every byte, there and back, and nothing half done."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import gatedffn as gf
from gatedffn.cli.app import app
from gatedffn.errors import CheckpointError, LayoutError, StorageError
from gatedffn.interop.checkpoints import convert as module
from gatedffn.interop.checkpoints import plan
from gatedffn.interop.checkpoints.configuration import variant_of
from gatedffn.interop.checkpoints.convert import convert
from gatedffn.interop.checkpoints.left import blocks_left
from gatedffn.layouts import LAYOUTS, pack
from gatedffn.storage import arithmetic
from gatedffn.storage.arithmetic import Placed
from gatedffn.storage.blocks import find_blocks

D_MODEL, D_HIDDEN, EXPERTS = 6, 64, 3
Named = dict[str, Tensor]


def weights(name: str, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> Named:
    """A random block with what the layout always has."""
    row = LAYOUTS[name]
    front = (EXPERTS,) if row.has_experts else ()
    found = {}
    for stored in row.stored:
        for role in stored.roles:
            out, inner = (D_MODEL, D_HIDDEN) if role == "down" else (D_HIDDEN, D_MODEL)
            found[f"{role}_proj.weight"] = torch.randn(*front, out, inner).to(dtype)
            if stored.needs_bias or (bias and stored.bias):
                found[f"{role}_proj.bias"] = torch.randn(*front, out).to(dtype)
    return found


def place(name: str, layer: int) -> str:
    ready = LAYOUTS[name].places[0].replace("{layer}", str(layer)).replace("{n}", "1")
    return f"model.{ready}"


def model(name: str, layers: int = 2, **settings: Any) -> Named:
    """A model's tensors: blocks in a layout, and others of several dtypes."""
    found: Named = {
        "model.embed.weight": torch.randn(5, D_MODEL),
        "model.flags": torch.tensor([True, False, True]),
        "lm_head.weight": torch.randn(7, D_MODEL).half(),
    }
    for layer in range(layers):
        own = weights(name, **settings)
        found |= pack(own, name, path=place(name, layer))
        found[f"model.layers.{layer}.norm.weight"] = torch.randn(D_MODEL)
    return found


def same(one: Named, other: Named) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def config(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


def header(path: Path) -> list[dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        stated: list[dict[str, Any]] = json.loads((file.metadata() or {}).get("gatedffn", "[]"))
    return stated


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama.safetensors"
    save_file(model("llama"), path, metadata={"format": "pt", "note": "mine"})
    return path


# Files


def test_packing_a_llama(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed.safetensors"
    done = convert(llama, target, layout="llama", to="phi3", verify=True)
    before, after = load_file(llama), load_file(target)
    for layer in range(2):
        path = f"model.layers.{layer}.mlp"
        gate, up = (before.pop(f"{path}.{n}_proj.weight") for n in ("gate", "up"))
        assert torch.equal(after.pop(f"{path}.gate_up_proj.weight"), torch.cat([gate, up]))
    same(before, after)
    assert done.blocks == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert done.passed == 5
    assert done.variant is None
    assert done.errors is not None
    assert all(error.largest < 1e-6 for error in done.errors)
    with safe_open(target, framework="pt") as file:
        assert file.metadata()["note"] == "mine"
    places = ["layers.{layer}.mlp"]
    assert header(target) == [{"layout": "phi3", "tp": 1, "at": places, "origin": "llama"}]


GATED = [n for n, r in LAYOUTS.items() if r.gated and not r.has_experts and not r.fused]
UNGATED = [n for n, r in LAYOUTS.items() if not r.gated and not r.has_experts and not r.fused]
MIXTURES = [n for n, r in LAYOUTS.items() if r.gated and r.has_experts]
PAIRS = [(n, "llama") for n in GATED] + [(n, "fc") for n in UNGATED]
PAIRS += [(n, "mixtral") for n in MIXTURES] + [("gemma-original", "t5x-fused"), ("dbrx", "llama4")]
PAIRS += [("nemotron-h-separate", "nemotron-h"), ("mixtral", "megatron-experts-flat")]


@pytest.mark.parametrize(("name", "to"), PAIRS)
def test_every_layout_there_and_back(
    name: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 100)  # tensors pass in many parts
    one, two, three = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "three"))
    experts = EXPERTS if LAYOUTS[name].has_experts else None
    tensors = model(name)
    save_file(tensors, one)
    # Whose code computes what is no matter of the order.
    monkeypatch.setattr(plan, "_check_variant", lambda *_: None)
    if any(s.needs_bias for s in LAYOUTS[name].stored):
        with pytest.raises(LayoutError, match="no place for it"):
            convert(one, two, layout=name, to=to, experts=experts)
        to = "torchtitan-gpt-oss"
    convert(one, two, layout=name, to=to, experts=experts, verify=True)
    back = name if name == to else None  # nothing was to be said
    convert(two, three, layout=back, to=name, experts=experts, verify=True)
    same(load_file(three), tensors)
    assert three.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_biases_and_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "three"))
    tensors = model("xformers", bias=True, dtype=dtype)
    save_file(tensors, one)
    convert(one, two, layout="xformers", to="quack", verify=True)
    after = load_file(two)
    gate, up = tensors["model.blocks.0.mlp.w12.bias"].chunk(2)
    assert torch.equal(after["model.blocks.0.mlp.fc1.bias"], torch.stack([gate, up], 1).flatten())
    convert(two, three, to="xformers", verify=True)
    same(load_file(three), tensors)


def test_dtypes_that_nothing_computes_in_are_moved_too(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in model("llama").items() if "mlp" in n}
    save_file(tensors, one)
    convert(one, two, layout="llama", to="phi3")
    gate = load_file(two)["model.layers.1.mlp.gate_up_proj.weight"][:D_HIDDEN]
    wanted = tensors["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(gate.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "to"), [("llama", "phi3"), ("jais", "quack"), ("gpt-oss", "vllm-gpt-oss")]
)
@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"z": "1", "format": "pt", "a": "\u00e9", "b": "x"}]
)
def test_there_and_back_is_the_very_file(
    name: str, to: str, metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    one, two, three, four = (tmp_path / f"{n}.safetensors" for n in "abcd")
    save_file(model(name), one, metadata=metadata)
    convert(one, two, layout=name, to=to)
    assert header(two)[0]["origin"] == name
    convert(two, three, to=to, tp=1)
    convert(three, four, to=name)
    assert four.read_bytes() == one.read_bytes()


def test_numbers_are_ascii_digits() -> None:
    tensors = {n.replace("layers.1", "layers.\u0663"): t for n, t in model("llama").items()}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    assert [block.layer for block in find_blocks(LAYOUTS["llama"], shapes)] == [0]


def test_a_pytorch_file(tmp_path: Path) -> None:
    one, two = tmp_path / "model.pt", tmp_path / "two.safetensors"
    tensors = model("jais")
    tensors["model.turned"] = torch.arange(6).view(2, 3).T
    torch.save(tensors, one)
    convert(one, two, layout="jais", to="llama", verify=True)
    after = load_file(two)
    assert torch.equal(after["model.turned"], tensors["model.turned"])
    gate = tensors["model.h.0.mlp.c_fc2.weight"].T
    assert torch.equal(after["model.h.0.mlp.gate_proj.weight"], gate)


def test_experts_of_their_own_become_one_tensor(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = model("mixtral")
    save_file(tensors, one)
    convert(one, two, layout="mixtral", to="llama4", verify=True)
    path = "model.layers.1.block_sparse_moe.experts"
    packed = load_file(two)[f"{path}.gate_up_proj"]
    for expert in range(EXPERTS):
        gate, up = (tensors[f"{path}.{expert}.{name}.weight"] for name in ("w1", "w3"))
        assert torch.equal(packed[expert], torch.cat([gate.T, up.T], 1))


def test_ranks(llama: Path, tmp_path: Path) -> None:
    two, four, back = (tmp_path / f"{n}.safetensors" for n in ("two", "four", "back"))
    convert(llama, two, layout="llama", to="megatron", tp=2, verify=True)
    convert(two, four, to="megatron", tp=4, verify=True)
    tensors = load_file(llama)
    gate, up = (tensors[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    packed = load_file(four)["model.layers.0.mlp.linear_fc1.weight"]
    for rank, part in enumerate(packed.chunk(4)):
        assert torch.equal(part, torch.cat([gate.chunk(4)[rank], up.chunk(4)[rank]]))
    assert header(four)[0]["tp"] == 4
    convert(four, back, to="llama", verify=True)
    same(load_file(back), tensors)
    with pytest.raises(LayoutError, match="the header says 4 ranks, and 2 were named"):
        convert(four, tmp_path / "x.safetensors", to="llama", from_tp=2)
    with pytest.raises(LayoutError, match="would give the first ranks rows of gate only"):
        convert(llama, tmp_path / "x.safetensors", layout="llama", to="phi3", tp=2)


def test_another_place_is_named(tmp_path: Path) -> None:
    moved = model("llama").items()
    tensors = {n.replace("layers.", "stack.").replace("mlp", "ff"): t for n, t in moved}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(tensors, one)
    with pytest.raises(LayoutError, match="names another place"):
        convert(one, two, layout="llama", to="phi3")
    convert(one, two, layout="llama", to="phi3", at="stack.{layer}.ff")
    for wrong in ("{layer}.{layer}", "{n}{n}.{layer}", "{n}1{n}", "{layer}1", "a\x1b", "x" * 500):
        with pytest.raises(LayoutError, match="is no place"):
            convert(one, tmp_path / "x.safetensors", layout="llama", to="phi3", at=wrong)
    # The result says where its blocks are.
    three = tmp_path / "three.safetensors"
    convert(two, three, to="llama")
    same(load_file(three), tensors)


# Which layout it is


def test_another_layout_than_the_header_says_is_refused(llama: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    convert(llama, packed, layout="llama", to="phi3")
    with pytest.raises(
        LayoutError, match=r"is stored as 'phi3' at .*, as its header says, not as 'vllm'"
    ):
        convert(packed, tmp_path / "x.safetensors", layout="vllm", to="llama")
    with pytest.raises(LayoutError, match="is stored as 'phi3'"):
        gf.layouts.load_feed_forward(packed, "clvp", variant="swiglu")
    layer = gf.layouts.load_feed_forward(packed, layer=1, variant="swiglu")
    original = gf.layouts.load_feed_forward(llama, "llama", layer=1, variant="swiglu")
    same(dict(layer.state_dict()), dict(original.state_dict()))


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A dense layer, then one with a shared block and experts."""
    tensors = {n: t for n, t in model("llama").items() if "layers.1.mlp" not in n}
    path = "model.layers.1.mlp"
    tensors |= pack(weights("llama"), "llama", path=f"{path}.shared_expert")
    tensors |= pack(weights("experts-separate"), "experts-separate", path=f"{path}.experts")
    tensors[f"{path}.gate.weight"] = torch.randn(EXPERTS, D_MODEL)
    save_file(tensors, tmp_path / "mixture.safetensors")
    return tmp_path / "mixture.safetensors"


def test_each_kind_of_block_of_a_mixture_is_converted_in_turn(
    mixture: Path, tmp_path: Path
) -> None:
    one, two, three, four = (tmp_path / f"{n}.safetensors" for n in "abcd")
    done = convert(mixture, one, layout="experts-separate", to="experts-packed", verify=True)
    assert done.notes == (
        "feed-forward blocks left as they were: "
        "model.layers.{n}.mlp (1 block; named as in llama, gemma, gemma3n, ...); "
        "model.layers.{n}.mlp.shared_expert (1 block; named as in llama)",
    )
    done = convert(one, two, layout="llama", to="phi3", verify=True)
    assert done.notes == ()
    assert done.blocks == ("model.layers.0.mlp", "model.layers.1.mlp.shared_expert")
    assert [(e["layout"], e["at"]) for e in header(two)] == [
        ("experts-packed", ["layers.{layer}.mlp.experts"]),
        ("phi3", ["layers.{layer}.mlp", "layers.{layer}.mlp.shared_expert"]),
    ]
    # The layout of a block is that of its place.
    for path, expert in (("0.mlp", None), ("1.mlp.shared_expert", None), ("1.mlp.experts", 2)):
        layout = "experts-separate" if expert else "llama"
        where: dict[str, Any] = {"layer": f"model.layers.{path}", "expert": expert}
        ours = gf.layouts.load_feed_forward(two, **where, variant="swiglu")
        theirs = gf.layouts.load_feed_forward(mixture, layout, **where, variant="swiglu")
        same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert gf.layouts.load_feed_forward(two, variant="swiglu").d_hidden == D_HIDDEN
    with pytest.raises(LayoutError, match="layer 1 is not one block: name one of"):
        gf.layouts.load_feed_forward(two, layer=1, variant="swiglu")
    with pytest.raises(LayoutError, match="at none of the places that the header"):
        gf.layouts.load_feed_forward(one, layer="model.layers.0.mlp", variant="swiglu")
    # What is named decides which are converted; nothing is read as another layout.
    refused(two, r"several layouts.*'experts-packed' at .* 'phi3' at ", to="llama")
    refused(two, "as its header says, not as 'vllm'", layout="vllm", to="llama")
    refused(two, "as its header says, not as 'deepseek-v4'", layout="deepseek-v4", to="mixtral")
    convert(two, three, layout="phi3", to="llama", verify=True)
    assert [e["layout"] for e in header(three)] == ["experts-packed"]
    convert(three, four, to="experts-separate", verify=True)
    assert four.read_bytes() == mixture.read_bytes()


def test_blocks_that_are_left_are_told(mixture: Path, tmp_path: Path) -> None:
    done = gatedffn(mixture, tmp_path / "x.safetensors", "--from", "llama", "--to", "phi3")
    assert "2 blocks from llama to phi3; 15 other tensors as they were" in done.stdout
    left = "blocks left as they were: model.layers.{n}.mlp.experts (1 block; named as in experts-"
    assert left in done.stdout


@pytest.mark.parametrize("name", [*GATED, *UNGATED, *MIXTURES])
def test_blocks_of_every_layout_are_seen(name: str) -> None:
    found = blocks_left(model(name))
    assert any(name in known for _, known in found.values()), found
    assert sum(count for count, _ in found.values()) == len({place(name, 0), place(name, 1)})


def test_names_of_strangers_cost_no_more_than_their_number() -> None:
    """Compared with each other they would take many times as long."""
    begun, many = time.process_time(), 8000
    shapes: dict[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in model("llama").items()}
    shapes |= {f"model.layers.0.mlp.x{i}": (0,) for i in range(many)}
    shapes |= {f"model.layers.{i}.mlp.x": (0,) for i in range(10, many)}
    with pytest.raises(LayoutError, match=r"x0 of model.layers.0.mlp is no tensor"):
        find_blocks(LAYOUTS["llama"], shapes)
    assert blocks_left(f"{i}{'.a' * 490}" for i in range(1000)) == {}
    assert time.process_time() - begun < 2


def test_the_configuration_waits_until_all_is_as_it_was(mixture: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c", "d", "e")]
    folders[0].mkdir()
    mixture.rename(folders[0] / "model.safetensors")
    config(folders[0], architectures=["Qwen2MoeForCausalLM"], hidden_act="silu")
    steps: list[dict[str, Any]] = [
        {"layout": "experts-separate", "to": "experts-packed"},
        {"layout": "llama", "to": "phi3"},
        {"layout": "phi3", "to": "llama"},
        {"to": "experts-separate"},
    ]
    notes = [
        " ".join(convert(one, two, **step).notes)
        for one, two, step in zip(folders, folders[1:], steps, strict=False)
    ]
    assert "does not read layout 'experts-packed' and 'phi3'" in notes[1]
    assert "does not read layout 'experts-packed': it" in notes[2]
    assert "config.json" not in notes[3]
    for name in ("model.safetensors", "config.json"):
        assert (folders[4] / name).read_bytes() == (folders[0] / name).read_bytes()


def test_one_place_of_several_is_converted(mixture: Path, tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{n}.safetensors" for n in "abc")
    convert(mixture, one, layout="llama", to="phi3")
    done = convert(one, two, at="layers.{layer}.mlp", to="quack", verify=True)
    assert done.blocks == ("model.layers.0.mlp",)
    shared = ["layers.{layer}.mlp.shared_expert"]
    assert [(e["layout"], e["at"], e["origin"]) for e in header(two)] == [
        ("phi3", shared, "llama"),
        ("quack", ["layers.{layer}.mlp"], "llama"),
    ]
    refused(two, "not as 'phi3'", layout="phi3", at="layers.{layer}.mlp", to="llama")
    convert(two, three, at="layers.{layer}.mlp", to="llama")
    convert(three, tmp_path / "d.safetensors", to="llama")
    assert (tmp_path / "d.safetensors").read_bytes() == mixture.read_bytes()


def test_of_a_layout_that_is_not_known_nothing_is_read(mixture: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    convert(mixture, one, layout="llama", to=dataclasses.replace(LAYOUTS["phi3"], name="mine"))
    refused(one, "is stored as 'mine' at .* not as 'phi3'", layout="phi3", to="llama")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{}", "in a way that is not known"),
        ("{", "in a way that is not known"),
        ("[3]", "in a way that is not known"),
        ('{"layout": "phi3", "tp": 1, "at": [], "origin": "phi3"}', "in a way that is not known"),
        ('[{"layout": "phi3", "tp": "1", "at": [], "origin": "phi3"}]', "a way that is not known"),
        ('[{"layout": "phi3", "tp": 1, "at": [3], "origin": "phi3"}]', "a way that is not known"),
        (
            json.dumps([{"layout": "phi3", "tp": 1, "at": ["a"] * 101, "origin": "phi3"}]),
            "not known",
        ),
        (json.dumps([{"layout": "phi3", "tp": 1, "at": ["a"], "origin": "p"}] * 101), "not known"),
        (
            '[{"layout": "new", "tp": 1, "at": ["layers.{layer}.mlp"], "origin": "new"}]',
            "layout 'new', which is not known here",
        ),
    ],
)
def test_a_header_that_says_nonsense(stated: str, message: str, tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    save_file(model("phi3"), one, metadata={"gatedffn": stated})
    with pytest.raises((LayoutError, CheckpointError), match=message):
        convert(one, tmp_path / "two.safetensors", to="llama")


def test_the_architecture_names_the_layout(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    with pytest.raises(LayoutError, match=r"must be named: there is no config.json"):
        convert(llama, target, to="phi3")
    config(tmp_path, architectures=["UnknownForCausalLM"])
    with pytest.raises(LayoutError, match=r"\['UnknownForCausalLM'\], which no layout knows"):
        convert(llama, target, to="phi3")
    config(tmp_path, architectures=["Qwen3MoeForCausalLM"])
    with pytest.raises(LayoutError, match=r"in more than one: 'llama' .*'experts-separate'"):
        convert(llama, target, to="phi3")
    config(tmp_path, architectures=["LlamaForCausalLM"], hidden_act="silu", intermediate_size=64)
    assert convert(llama, target, to="phi3", verify=True).variant == "swiglu"


def test_t5_says_whether_it_is_gated(tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    save_file(model("t5"), one)
    named = {"architectures": ["T5ForConditionalGeneration"]}
    config(tmp_path, **named, feed_forward_proj="gated-gelu")
    layer = gf.layouts.load_feed_forward(one, layer=1)
    assert layer.variant == "geglu_tanh"
    config(tmp_path, **named)
    with pytest.raises(LayoutError, match="must be named"):
        gf.layouts.load_feed_forward(one, layer=1)


@pytest.mark.parametrize(
    ("name", "fields", "computed"),
    [
        ("llama-original", {"hidden_act": "gelu_pytorch_tanh"}, "swiglu"),
        ("bitnet", {"hidden_act": "silu"}, "relu2_glu"),
        ("apertus", {"hidden_act": "silu"}, "xielu"),
        ("llama4", {"text_config": {"hidden_act": "gelu"}}, "swiglu"),
        ("nemotron-h", {"mlp_hidden_act": "silu"}, "relu2"),
        ("olmo-original", {"activation_type": "gelu"}, "swiglu"),
        ("gpt-oss", {"hidden_act": "gelu"}, "swiglu_oai"),
        ("chatglm", {"hidden_act": "of my own"}, "swiglu"),
    ],
)
def test_a_configuration_that_contradicts_the_layout_is_told(
    name: str, fields: dict[str, Any], computed: str
) -> None:
    with pytest.raises(LayoutError, match=f"blocks of layout '{name}' compute {computed}: name"):
        variant_of(LAYOUTS[name], fields)


@pytest.mark.parametrize(
    ("name", "fields", "computed"),
    [
        ("llama-original", {"hidden_act": "silu"}, "swiglu"),
        ("llama-original", {}, "swiglu"),
        ("bitnet", {"hidden_act": "relu2"}, "relu2_glu"),
        ("apertus", {"hidden_act": "xielu"}, "xielu"),
        ("nemotron-h", {"mlp_hidden_act": "relu2", "hidden_act": "silu"}, "relu2"),
        ("olmo-original", {"activation_type": "swiglu"}, "swiglu"),
        ("gpt-oss", {"hidden_act": "silu"}, "swiglu_oai"),
        ("minimax-m3", {"hidden_act": "swigluoai"}, "swiglu_oai"),
        ("deepseek-v4", {"hidden_act": "silu"}, "swiglu_clamp"),
        ("dinov2-hf", {"hidden_act": "gelu"}, "swiglu"),
        ("bilinear-decomposition", {"gate": "silu"}, "swiglu"),
        ("kosmos2", {"text_config": {"activation_function": "gelu"}}, "gelu"),
        ("qwen3-vl-vision", {"text_config": {"hidden_act": "silu"}}, "gelu_tanh"),
    ],
)
def test_a_configuration_that_agrees_or_is_not_about_the_block(
    name: str, fields: dict[str, Any], computed: str
) -> None:
    found = variant_of(LAYOUTS[name], fields)
    assert found is not None
    assert found[0] == computed


def test_a_named_variant_wins(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(model("llama-original"), one)
    config(tmp_path, hidden_act="gelu")
    settings: dict[str, Any] = {"layout": "llama-original", "to": "torchtitan-fused"}
    refused(one, "hidden_act = 'gelu', and .* compute swiglu: name the variant", **settings)
    refused(one, "compute geglu here", variant="geglu", **settings)
    refused(one, "'gelu' does not fit: .* has a gate", variant="gelu", **settings)
    assert convert(one, two, variant="swiglu", verify=True, **settings).variant == "swiglu"
    two.unlink()
    named = ("--from", "llama-original", "--to", "torchtitan-fused", "--variant", "swiglu")
    assert gatedffn(one, two, *named).returncode == 0


def test_a_width_that_is_not_the_configurations_is_told(tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    save_file(model("qwen1"), one)
    fields = {"architectures": ["QWenLMHeadModel"]}
    config(tmp_path, **fields, intermediate_size=D_HIDDEN)
    with pytest.raises(LayoutError, match=r"intermediate_size = 64, gate and up together"):
        convert(one, tmp_path / "x.safetensors", to="llama")
    config(tmp_path, **fields, intermediate_size=2 * D_HIDDEN)
    convert(one, tmp_path / "x.safetensors", to="llama")


def test_layers_of_several_widths_are_taken_when_asked(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = model("llama")
    for name in [name for name in tensors if "layers.1.mlp" in name]:
        pruned = tensors[name][:, :40] if "down" in name else tensors[name][:40]
        tensors[name] = pruned.contiguous()
    save_file(tensors, one)
    fields = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config(tmp_path, **fields, intermediate_size=D_HIDDEN)
    refused(
        one, "1.mlp has 40 hidden units .* any_width takes blocks as wide as they are", to="phi3"
    )
    with pytest.raises(LayoutError, match="any_width takes"):
        gf.layouts.load_feed_forward(one, layer=1)
    assert gf.layouts.load_feed_forward(one, layer=1, any_width=True).d_hidden == 40
    command = ["convert", str(one), str(two), "--to", "phi3", "--any-width", "--verify"]
    assert CliRunner().invoke(app, command).exit_code == 0
    for layer, width in enumerate((D_HIDDEN, 40)):
        packed = load_file(two)[f"model.layers.{layer}.mlp.gate_up_proj.weight"]
        path = f"model.layers.{layer}.mlp"
        parts = [tensors[f"{path}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(packed, torch.cat(parts))
        assert len(packed) == 2 * width


def test_a_layout_of_ones_own(llama: Path, tmp_path: Path) -> None:
    mine = dataclasses.replace(LAYOUTS["quack"], name="mine")
    two, three = tmp_path / "two.safetensors", tmp_path / "three.safetensors"
    convert(llama, two, layout="llama", to=mine)
    with pytest.raises(LayoutError, match="'mine', which is not known here"):
        convert(two, three, to="llama")
    convert(two, three, layout=mine, to="llama")
    same(load_file(three), load_file(llama))


# What is refused


def refused(source: Path, message: str, **settings: Any) -> None:
    target = source.parent / "refused.safetensors"
    with pytest.raises((LayoutError, CheckpointError, StorageError), match=message) as caught:
        convert(source, target, **settings)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.glob("*refused*")) == []


def test_what_a_target_cannot_express(tmp_path: Path) -> None:
    def saved(name: str, **settings: Any) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(model(name, **settings), path)
        return path

    refused(saved("gpt2"), "have no gate, those of 'phi3' one", layout="gpt2", to="phi3")
    refused(saved("phi3"), "have a gate, those of 'gpt2' none", layout="phi3", to="gpt2")
    refused(saved("phi3", bias=True), "'t5' has no place for it", layout="phi3", to="t5")
    refused(saved("mixtral"), "the block has experts", layout="mixtral", to="llama")
    refused(saved("diffusers"), "compute geglu here.*swiglu", layout="diffusers", to="xformers")
    refused(saved("llama"), "share", layout="llama", to="palm-rlhf")
    refused(saved("llama"), "something else: it multiplies", layout="llama", to="falcon-h1")
    refused(saved("xformers"), "first ranks", layout="xformers", to="quack-concat", tp=2)
    norm = model("bitnet")
    norm["model.layers.0.mlp.ffn_sub_norm.weight"] = torch.randn(D_HIDDEN).bfloat16()
    save_file(norm, tmp_path / "norm.safetensors")
    refused(tmp_path / "norm.safetensors", "hidden_norm", layout="bitnet", to="llama")


def test_a_block_is_whole_and_of_one_dtype(tmp_path: Path) -> None:
    whole = model("llama")
    path = tmp_path / "one.safetensors"

    def changed(**changes: Tensor | None) -> Path:
        tensors: dict[str, Tensor | None] = {**whole}
        tensors |= {f"model.layers.1.mlp.{name}": tensor for name, tensor in changes.items()}
        save_file({n: t for n, t in tensors.items() if t is not None}, path)
        return path

    settings = {"layout": "llama", "to": "phi3"}
    refused(changed(**{"up_proj.weight": None}), "up_proj.weight .*missing", **settings)
    bias = torch.zeros(D_HIDDEN).bfloat16()
    refused(changed(**{"gate_proj.bias": bias}), "no bias of up", **settings)
    half = whole["model.layers.1.mlp.up_proj.weight"].half()
    refused(changed(**{"up_proj.weight": half}), "BF16 and F16", **settings)
    refused(changed(**{"extra.weight": half}), "nothing of a block may be left", **settings)
    refused(changed(**{"gate_proj.lora_A.weight": half}), "merge the adapter", **settings)
    refused(changed(**{"gate_up_proj.weight": half}), "left behind|twice", **settings)


def test_a_clash_of_names_is_refused(tmp_path: Path) -> None:
    tensors = model("olmo-original")
    tensors["model.blocks.0.gate_proj.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "one.safetensors")
    refused(
        tmp_path / "one.safetensors",
        r"would have model.blocks.0.gate_proj.weight twice",
        layout="olmo-original",
        to="llama",
    )


def test_targets(llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layout": "llama", "to": "phi3"}
    with pytest.raises(StorageError, match="exists already"):
        convert(llama, llama, **settings)
    with pytest.raises(StorageError, match=r"must end with .safetensors"):
        convert(llama, tmp_path / "x.bin", **settings)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(model("llama"), folder / "model.safetensors")
    with pytest.raises(StorageError, match="is a folder"):
        convert(folder, tmp_path / "x.safetensors", **settings)
    with pytest.raises(StorageError, match="is inside"):
        convert(folder, folder / "x", **settings)
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    with pytest.raises(StorageError, match="exists already"):
        convert(llama, tmp_path / "dangling.safetensors", **settings)
    before = sorted(p.name for p in tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written.*is a file: name another folder"):
        convert(llama, tmp_path / "file" / "x.safetensors", **settings)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "file") == before


@pytest.mark.parametrize("size", [1, 1e-12])
def test_a_wrong_result_is_found_and_not_written(
    size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tmp_path / "llama.safetensors"
    save_file({n: t.float() * size for n, t in model("llama").items()}, llama)
    real = plan.tensors_of  # type: ignore[attr-defined]

    def swapped(*args: Any, **kwargs: Any) -> Any:
        placed = real(*args, **kwargs)
        placed[0] = dataclasses.replace(placed[0], keys=placed[0].keys[::-1])
        return placed

    monkeypatch.setattr(plan, "tensors_of", swapped)
    target = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"mlp computes something else"):
        convert(llama, target, layout="llama", to="phi3", verify=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.safetensors"]


@pytest.mark.parametrize("wrong", ["experts", "halves"])
@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("mixtral", "experts-packed"),
        ("experts-packed", "megatron-experts"),
        ("gpt-oss", "experts-packed"),
    ],
)
def test_experts_and_halves_that_changed_places_are_found(
    name: str, to: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(model(name, layers=1), one)
    settings: dict[str, Any] = {"layout": name, "to": to, "variant": "swiglu", "verify": True}
    right = arithmetic.Placed.compose

    def swapped(self: Placed, rows: Any, expert: int, *rest: Any) -> Tensor:
        if wrong == "halves":
            self = dataclasses.replace(self, keys=self.keys[::-1])
            return right(self, rows, expert, *rest)
        return right(self, rows, (1, 0, 2)[expert], *rest)

    with monkeypatch.context() as patch:
        patch.setattr(arithmetic.Placed, "compose", swapped)
        with pytest.raises(CheckpointError, match="computes something else"):
            convert(one, two, **settings)
    assert not two.exists()
    convert(one, two, **settings)


def test_the_ranks_of_grouped_experts(tmp_path: Path) -> None:
    one, two, back = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "back"))
    tensors = model("experts-separate")
    save_file(tensors, one)
    convert(one, two, layout="experts-separate", to="megatron-experts", tp=2, verify=True)
    path = "model.layers.1.mlp.experts"
    first_rank = load_file(two)[f"{path}.linear_fc1.weight2"].chunk(2)[0]
    gate, up = (tensors[f"{path}.2.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(first_rank, torch.cat([gate.chunk(2)[0], up.chunk(2)[0]]))
    convert(two, back, to="experts-separate", verify=True)
    assert back.read_bytes() == one.read_bytes()


def test_weights_without_finite_outputs_cannot_be_verified(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in model("llama").items()}, one)
    with pytest.raises(CheckpointError, match="no finite outputs"):
        convert(one, two, layout="llama", to="phi3", verify=True)
    convert(one, two, layout="llama", to="phi3")


@pytest.mark.parametrize("experts", [0, -1, 2.5, "8", True, [2]])
def test_a_number_of_experts_that_is_none(experts: object, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(model("dbrx"), one)
    config(tmp_path, ffn_config={"moe_num_experts": experts})
    with pytest.raises(LayoutError, match="must be a positive whole number"):
        convert(one, two, layout="dbrx", to="experts-packed")


@pytest.mark.parametrize("limit", [10**400, float("nan"), True, "7"])
def test_a_setting_that_is_no_number(limit: object, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(model("gpt-oss"), one)
    config(tmp_path, swiglu_limit=limit)
    with pytest.raises(LayoutError, match="it must be a number"):
        convert(one, two, layout="gpt-oss", to="gpt-oss-original")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_came_meanwhile_is_not_replaced(
    what: str, folder: bool, llama: Path, sharded: Path, tmp_path: Path
) -> None:
    source, target = (sharded, tmp_path / "x") if folder else (llama, tmp_path / "x.safetensors")

    def meanwhile(*_: int) -> None:
        if not os.path.lexists(target):
            if what == "file":
                target.write_text("theirs")
            elif what == "folder":
                target.mkdir()
            else:
                target.symlink_to("nowhere")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match=f"^{target} exists already: choose another name$"):
        convert(source, target, layout="llama", to="phi3", progress=meanwhile)
    assert sorted(tmp_path.iterdir()) == sorted([*before, target])
    if what == "file":
        assert target.read_text() == "theirs"
    else:
        assert target.is_symlink() == (what == "link")
        assert not list(target.glob("*"))


@pytest.mark.parametrize("folder", [False, True])
def test_of_two_conversions_at_once_one_is_told(
    folder: bool, llama: Path, sharded: Path, tmp_path: Path
) -> None:
    source, target = (sharded, tmp_path / "x") if folder else (llama, tmp_path / "x.safetensors")
    both = threading.Barrier(2, timeout=60)

    def run(to: str) -> str:
        met: list[int] = []

        def meet(*_: int) -> None:
            if not met:  # both have begun to write
                met.append(both.wait())

        try:
            return convert(source, target, layout="llama", to=to, progress=meet).layout_to
        except StorageError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(run, ("phi3", "quack")))
    (won,) = {"phi3", "quack"} & set(told)
    assert f"{target} exists already: choose another name" in told
    written = sorted(target.glob("*.safetensors"))[0] if folder else target
    assert header(written)[0]["layout"] == won
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("name", "bias"), [("quack", True), ("megatron", True), ("gpt-oss", True)])
def test_a_mistake_in_the_order_is_found_too(
    name: str, bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(start: int, stop: int, second: bool, block: int) -> Tensor:
        return real(start, stop, not second, block)

    real = arithmetic.positions
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(model(name, bias=bias), one)
    to = "gpt-oss-original" if name == "gpt-oss" else "llama"
    convert(one, two, layout=name, to=to, verify=True)
    two.unlink()
    monkeypatch.setattr(arithmetic, "positions", wrong)
    with pytest.raises(CheckpointError, match="computes something else"):
        convert(one, two, layout=name, to=to, verify=True)
    assert not two.exists()


# Folders


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards; gate and up of a layer are not in the same one."""
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = model("llama")
    second = {n for n in tensors if "up_proj" in n or "layers.1" in n or n == "lm_head.weight"}
    files = {True: "model-00002-of-00002.safetensors", False: "model-00001-of-00002.safetensors"}
    for which, file in files.items():
        shard = {n: t for n, t in tensors.items() if (n in second) is which}
        save_file(shard, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {
        "metadata": {"total_size": size, "other": "kept"},
        "weight_map": {name: files[name in second] for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config(folder, architectures=["LlamaForCausalLM"], hidden_act="silu", intermediate_size=64)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "original").mkdir()
    return folder


def loaded(folder: Path) -> Named:
    found: Named = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_a_sharded_folder(sharded: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back"
    done = convert(sharded, packed, to="phi3", verify=True)
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]
        == json.loads((sharded / "model.safetensors.index.json").read_text())["metadata"]
    )
    for name, file in index["weight_map"].items():
        assert name in load_file(packed / file)
    assert index["weight_map"].keys() == loaded(packed).keys()
    assert (packed / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (packed / "optimizer.pt").exists()
    assert "not copied: optimizer.pt, original" in done.notes
    # The architecture does not read the result: nothing may load half of it.
    assert not (packed / "config.json").exists()
    assert any("config.original.json" in note for note in done.notes)
    assert gf.layouts.load_feed_forward(packed, layer=1).variant == "swiglu"
    done = convert(packed, back, to="llama", verify=True)
    assert done.notes == ()
    same(loaded(back), loaded(sharded))
    # A block across two shards is there again, too: every file is the very same.
    for path in sharded.iterdir():
        if path.suffix != ".pt" and path.is_file() and "index" not in path.name:
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    indexes = [
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (sharded, back)
    ]
    assert indexes[0] == indexes[1]


@pytest.mark.parametrize("place", ["first", "last", "none"])
def test_a_file_of_another_writer_comes_back_as_it_was(place: str, tmp_path: Path) -> None:
    one, two, three, four = (tmp_path / f"{n}.safetensors" for n in "abcd")
    tensors = dict(reversed(model("llama").items()))
    entries: dict[str, Any] = {"__metadata__": {"b": "\u00e9", "a": ""}} if place == "first" else {}
    body, names = b"", {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool:
            continue
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
            "dtype": names[tensor.dtype],
        }
        body += data
    if place == "last":
        entries["__metadata__"] = {}
    text = json.dumps(entries, indent=1).encode()
    one.write_bytes(len(text).to_bytes(8, "little") + text + body)
    convert(one, two, layout="llama", to="quack", verify=True)
    convert(two, three, to="megatron", tp=2, verify=True)
    convert(three, four, to="llama", verify=True)
    assert four.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("said", ["[]", "{", "", '{"x": {"dtype": "F32"}}'])
def test_a_first_header_that_is_none_is_told(said: str, llama: Path, tmp_path: Path) -> None:
    stated = [{"layout": "llama", "tp": 1, "at": ["layers.{layer}.mlp"], "origin": "phi3"}]
    kept = {"gatedffn": json.dumps(stated), "gatedffn_first_header": said}
    path = tmp_path / "one.safetensors"
    save_file(load_file(llama), path, metadata=kept)
    refused(path, "keeps a first header that is none", to="phi3")
    # One of other tensors is of no use, and is not believed.
    kept["gatedffn_first_header"] = "{}"
    save_file(load_file(llama), path, metadata=kept)
    convert(path, tmp_path / "two.safetensors", to="phi3", verify=True)


def test_a_model_that_no_layout_knows_gets_its_configuration_back(
    sharded: Path, tmp_path: Path
) -> None:
    config(sharded, architectures=["OwnForCausalLM"], hidden_act="silu")
    convert(sharded, tmp_path / "packed", layout="llama", to="phi3")
    convert(tmp_path / "packed", tmp_path / "ranks", to="megatron", tp=2)
    assert not (tmp_path / "ranks" / "config.json").exists()
    convert(tmp_path / "ranks", tmp_path / "back", to="llama")
    assert (tmp_path / "back" / "config.json").read_bytes() == (
        sharded / "config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("name", "to", "beside"),
    [
        ("granite-moe", "experts-packed", "bias"),
        ("mosaicbert", "phi3", "layernorm.weight"),
        ("boltz", "llama", "norm.weight"),
    ],
)
def test_what_is_beside_a_block_stays_there(
    name: str, to: str, beside: str, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / f"{n}.safetensors" for n in "abc")
    tensors = model(name) | {f"{place(name, 1)}.{beside}": torch.ones(D_MODEL)}
    save_file(tensors, one)
    convert(one, two, layout=name, to=to, verify=True)
    gf.layouts.load_feed_forward(two, layer=1, variant="swiglu", expert=0 if to[0] == "e" else None)
    convert(two, three, to=name, verify=True)
    same(load_file(three), tensors)


@pytest.mark.parametrize("to", ["gpt-oss-original", "vllm-gpt-oss", "torchtitan-gpt-oss"])
def test_a_gpt_oss_as_transformers_writes_it_there_and_back(to: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    folders[0].mkdir()
    tensors = model("gpt-oss")
    save_file(tensors, folders[0] / "model.safetensors")
    fields = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "intermediate_size": D_HIDDEN}
    config(folders[0], architectures=["GptOssForCausalLM"], hidden_act="silu", **fields)
    convert(folders[0], folders[1], to=to, verify=True)
    convert(folders[1], folders[2], to="gpt-oss", verify=True)
    same(loaded(folders[2]), tensors)
    assert (folders[2] / "config.json").exists()


def test_what_is_beside_a_block_does_not_become_a_part_of_it(tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    save_file(model("boltz") | {f"{place('boltz', 0)}.norm.weight": torch.ones(D_MODEL)}, one)
    refused(one, "would be a part of it in layout 'timm-swiglu'", layout="boltz", to="timm-swiglu")


def test_one_name_for_a_matrix_and_its_transpose_keeps_no_configuration(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save_file(model("qwen3-vl-moe"), source / "model.safetensors")
    config(source, architectures=["Qwen3VLMoeForConditionalGeneration"])
    done = convert(source, target, layout="qwen3-vl-moe", to="experts-packed")
    assert not (target / "config.json").exists()
    assert "does not read layout 'experts-packed'" in " ".join(done.notes)
    convert(target, tmp_path / "back", to="qwen3-vl-moe")
    assert (tmp_path / "back" / "config.json").exists()


def test_a_folder_of_one_file_and_of_pytorch_files(tmp_path: Path) -> None:
    tensors = model("phi3")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    save_file(tensors, one / "model.safetensors")
    convert(one, two, layout="phi3", to="llama", verify=True)
    assert [p.name for p in two.iterdir()] == ["model.safetensors"]
    three, four = tmp_path / "three", tmp_path / "four"
    three.mkdir()
    torch.save(tensors, three / "pytorch_model.bin")
    convert(three, four, layout="phi3", to="llama", verify=True)
    same(load_file(four / "model.safetensors"), load_file(two / "model.safetensors"))


def test_shards_of_pytorch(sharded: Path, tmp_path: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    (sharded / "model.safetensors.index.json").unlink()
    for file in set(index["weight_map"].values()):
        torch.save(load_file(sharded / file), sharded / renamed(file))
        (sharded / file).unlink()
    weights = {name: renamed(file) for name, file in index["weight_map"].items()}
    index = {"metadata": {}, "weight_map": weights}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(sharded, tmp_path / "x", to="phi3", verify=True)
    made = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert set(made["weight_map"].values()) == {
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    }
    assert made["metadata"]["total_size"] > 0


def renamed(file: str) -> str:
    return f"pytorch_{file.removesuffix('.safetensors')}.bin"


def test_shards_that_disagree_are_refused(sharded: Path, tmp_path: Path) -> None:
    for number, layout in enumerate(("llama", "phi3"), 1):
        path = sharded / f"model-0000{number}-of-00002.safetensors"
        stated = json.dumps([{"layout": layout, "tp": 1, "at": ["a"], "origin": layout}])
        save_file(load_file(path), path, metadata={"gatedffn": stated})
    with pytest.raises(CheckpointError, match="name different layouts"):
        convert(sharded, tmp_path / "x", to="phi3")


def test_a_link_in_a_folder_that_leads_out_is_not_copied(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("secret")
    (sharded / "linked.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        convert(sharded, tmp_path / "x", to="phi3")
    assert not (tmp_path / "x").exists()


# Memory, and what a kill leaves

BIG = """
import sys, torch, resource
from gatedffn.interop.checkpoints.configuration import variant_of
from gatedffn.interop.checkpoints.convert import convert
from gatedffn.interop.checkpoints.left import blocks_left
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
convert(sys.argv[1], sys.argv[2], layout='llama', to=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.parametrize(("to", "most"), [("quack", 110), ("keras-llama", 140)])  # MiB
def test_memory_is_bounded_by_a_tensor(to: str, most: int, tmp_path: Path) -> None:
    d_hidden, d_model, layers = 2048, 2048, 4  # 16 MiB a matrix, 192 MiB in all
    source = tmp_path / "one.safetensors"
    shape = {"gate": (d_hidden, d_model), "up": (d_hidden, d_model), "down": (d_model, d_hidden)}
    entries, at = {}, 0
    for layer in range(layers):
        for name, size in shape.items():
            entries[f"layers.{layer}.mlp.{name}_proj.weight"] = {
                "dtype": "F32",
                "shape": list(size),
                "data_offsets": [at, at + 4 * d_hidden * d_model],
            }
            at += 4 * d_hidden * d_model
    text = json.dumps(entries).encode()
    with source.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # sparse: it takes no room
    command = [sys.executable, "-c", BIG, str(source), str(tmp_path / "two.safetensors"), to]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < most


SLOW = """
import sys, time
from gatedffn.interop.checkpoints import convert as module
from gatedffn.interop.checkpoints import plan
real = module.safetensors.as_bytes
def slow(tensor):
    print('writing', flush=True)
    time.sleep(0.05)
    return real(tensor)
module.safetensors.as_bytes = slow
module.convert(sys.argv[1], sys.argv[2], layout='llama', to='phi3')
"""


@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_leaves_no_target(folder: bool, llama: Path, sharded: Path, tmp_path: Path) -> None:
    source, target = (sharded, tmp_path / "x") if folder else (llama, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", SLOW, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for _ in range(12):  # some tensors are read and written
            assert running.stdout.readline() == "writing\n"
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert running.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(list(tmp_path.glob(".x*.part"))) == 1  # what was begun has another name
    convert(source, target, layout="llama", to="phi3")
    assert target.exists()


def test_an_interruption_cleans_up(llama: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "x.safetensors", layout="llama", to="phi3", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["llama.safetensors"]


def test_names_that_are_too_long_are_told(llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layout": "llama", "to": "phi3"}
    for length in (300, 255):  # beside the second nothing can be written
        long = tmp_path / f"{'x' * (length - 12)}.safetensors"
        with pytest.raises(StorageError, match=r"cannot be written: .*; choose a shorter name$"):
            convert(llama, long, **settings)
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        convert(tmp_path / ("x" * 300), tmp_path / "x", **settings)


def test_progress_counts_every_byte(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "x.safetensors"
    convert(llama, target, layout="llama", to="phi3", progress=lambda *counts: seen.append(counts))
    size = sum(t.numel() * t.element_size() for t in load_file(target).values())
    assert seen[-1] == (size, size)
    assert {total for _, total in seen} == {size}


# The command


def gatedffn(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gatedffn", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command(llama: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed.safetensors", tmp_path / "back.safetensors"
    done = gatedffn(llama, packed, "--from", "llama", "--to", "phi3", "--verify")
    assert done.returncode == 0, done.stderr
    assert "2 blocks from llama to phi3; 5 other tensors as they were" in done.stdout
    assert re.search(r"model.layers.1.mlp\W+\d", done.stdout)
    assert f"wrote {packed}" in done.stdout.replace("\n", "")
    done = gatedffn(packed, back, "--to", "llama", "--json")
    assert json.loads(done.stdout)["layout_from"] == "phi3"
    same(load_file(back), load_file(llama))


def test_mistakes_end_in_one_line(llama: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((llama, tmp_path / "x.safetensors", "--to", "phi4"), "did you mean phi3"),
        ((tmp_path / "no", tmp_path / "x", "--to", "phi3"), "no such file or folder"),
    ):
        done = gatedffn(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.startswith("gatedffn: ")
        assert done.stderr.count("\n") == 1


def test_the_list_of_layouts() -> None:
    done = gatedffn("--list", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == list(LAYOUTS)
    assert "Phi-3" in gatedffn("--list").stdout


# Loading


def test_a_checkpoint_of_transformers_is_loaded_as_it_computes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    theirs: Any = LlamaForCausalLM(
        LlamaConfig(**settings, num_attention_heads=4, vocab_size=11, hidden_act="gelu")
    )
    theirs.save_pretrained(tmp_path / "model")
    layer = gf.layouts.load_feed_forward(tmp_path / "model", layer=1)
    assert layer.variant == "geglu"
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), theirs.model.layers[1].mlp(x))
    convert(tmp_path / "model", tmp_path / "packed", to="phi3", verify=True)
    layer = gf.layouts.load_feed_forward(tmp_path / "packed", layer=1)
    torch.testing.assert_close(layer(x), theirs.model.layers[1].mlp(x))
    # And the way back loads in transformers again.
    convert(tmp_path / "packed", tmp_path / "back", to="llama")
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    same(dict(again.state_dict()), dict(theirs.state_dict()))


def test_learned_parameters_and_experts_are_loaded(tmp_path: Path) -> None:
    from transformers import ApertusConfig, ApertusForCausalLM

    theirs: Any = ApertusForCausalLM(
        ApertusConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=11,
        )
    )
    mlp, x = theirs.model.layers[0].mlp, torch.randn(3, 32)
    with torch.no_grad():
        for projection in (mlp.up_proj, mlp.down_proj):
            projection.weight.mul_(10.0)  # so that the parameter shows
        before = mlp(x)
        mlp.act_fn.alpha_p.fill_(1.3)
    theirs.save_pretrained(tmp_path / "apertus")
    layer = gf.layouts.load_feed_forward(tmp_path / "apertus")
    wanted = mlp(x)
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)
    save_file(model("gpt-oss", dtype=torch.float32), tmp_path / "oss.safetensors")
    config(tmp_path, architectures=["GptOssForCausalLM"], swiglu_limit=5.0, swiglu_alpha=1.5)
    with pytest.raises(LayoutError, match="has 3 experts: name one"):
        gf.layouts.load_feed_forward(tmp_path / "oss.safetensors")
    layer = gf.layouts.load_feed_forward(tmp_path / "oss.safetensors", expert=2)
    assert layer.variant == "swiglu_oai"
    assert layer.activation_parameters() == {"limit": 5.0, "beta": 1.5}


def test_what_a_feed_forward_does_not_compute_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"

    def fails(name: str, message: str, extra: Named | None = None, **fields: object) -> None:
        save_file({**model(name), **(extra or {})}, path)
        config(tmp_path, **fields)
        with pytest.raises((LayoutError, CheckpointError), match=message):
            gf.layouts.load_feed_forward(path, name)

    fails("gemma3n", "keeps the largest gates")
    fails("falcon-h1", "mlp_multipliers")
    fails("llama", "name the variant")
    fails("llama", "swiglu_limit = 10", hidden_act="silu", swiglu_limit=10)
    fails("llama", "intermediate_size = 65", hidden_act="silu", intermediate_size=65)
    fails("mosaicbert", "compute geglu or reglu", feed_forward_type="silu")
    norm = {"model.layers.0.mlp.ffn_sub_norm.weight": torch.randn(D_HIDDEN).bfloat16()}
    fails("bitnet", "hidden_norm.weight, which FeedForward does not compute", norm)
    fails("apertus", "has no alpha_p, which 'xielu' learns")
    save_file(model("llama"), path)
    with pytest.raises(LayoutError, match="a block of 'llama' has a gate"):
        gf.layouts.load_feed_forward(path, "llama", variant="gelu")


def test_a_conformer_computes_what_its_configuration_says(tmp_path: Path) -> None:
    named = {n.replace("layers.", "encoder.layers."): t for n, t in model("conformer").items()}
    save_file(named, tmp_path / "model.safetensors")
    for fields, variant in (
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": "gelu", "speech_encoder_hidden_act": "swish"}, "swish"),
    ):
        config(tmp_path, **fields)
        path = tmp_path / "model.safetensors"
        assert gf.layouts.load_feed_forward(path, "conformer").variant == variant


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file(model("deepseek-v4"), path)
    for value in (None, 0):
        config(tmp_path, swiglu_limit=value)
        layer = gf.layouts.load_feed_forward(path, "deepseek-v4", expert=0)
        assert layer.activation_parameters()["limit"] == float("inf")
    config(tmp_path)
    layer = gf.layouts.load_feed_forward(path, "deepseek-v4", expert=0)
    assert layer.activation_parameters()["limit"] == 10.0


def test_a_loaded_layer_owns_its_weights(llama: Path) -> None:
    layer = gf.layouts.load_feed_forward(llama, "llama", variant="swiglu")
    llama.unlink()
    assert all(not p.is_meta and p.requires_grad for p in layer.parameters())
    with torch.no_grad():
        layer.up_proj.weight.zero_()  # type: ignore[operator]
    assert layer(torch.randn(2, D_MODEL).bfloat16()).shape == (2, D_MODEL)
