"""A checkpoint from one layout to another and back, and one layer of it loaded."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import gatedffn as gf
from gatedffn.interop.checkpoints.convert import convert

config = LlamaConfig(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    architectures=["LlamaForCausalLM"],
)
model: torch.nn.Module = LlamaForCausalLM(config)

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    config.save_pretrained(folder / "llama")
    save_file(model.state_dict(), folder / "llama" / "model.safetensors")

    # config.json names the architecture, and that the layout: llama.
    done = convert(folder / "llama", folder / "packed", to="phi3", verify=True)
    print(done.layout_from, "to", done.layout_to, "-", len(done.blocks), "blocks")
    for note in done.notes:
        print(note)
    assert done.errors is not None
    assert max(error.largest for error in done.errors) < 1e-5

    tensors = load_file(folder / "packed" / "model.safetensors")
    gate_up = tensors["model.layers.0.mlp.gate_up_proj.weight"]
    mlp = model.get_submodule("model.layers.0.mlp")
    assert torch.equal(gate_up[:176], mlp.get_parameter("gate_proj.weight"))

    # One layer as a module: what it computes is read from the configuration.
    layer = gf.layouts.load_feed_forward(folder / "packed", layer=0)
    assert layer.variant == "swiglu"
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), mlp(x))

    # The result says its layout, so the way back needs no --from; another name is refused.
    convert(folder / "packed", folder / "back", to="llama")
    before = load_file(folder / "llama" / "model.safetensors")
    after = load_file(folder / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    try:
        convert(folder / "packed", folder / "wrong", layout="gte", to="llama")
    except gf.GatedFFNError as error:
        print(error)  # ... stored as 'phi3' at ..., as its header says, not as 'gte' ...
