"""What would run for every feed-forward layer of a model, and the reasons against the others."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gatedffn as gf

config = LlamaConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4
)
model: torch.nn.Module = LlamaForCausalLM(config)
gf.replace(model)

print(gf.explain(model, tokens=512))
# For each stage the way that is taken, the milliseconds of those that were measured, and what is
# against the others. Layers that are alike are told once: the four here are.

# What keeps a layer from its fast path is said too.
up = model.get_submodule("model.layers.1.mlp.up_proj")
hook = up.register_forward_hook(lambda *_: None)
(second,) = gf.explain(model.get_submodule("model.layers.1.mlp"))
print(second.path, second.why)  # modules up_proj is not a plain nn.Linear, or has a hook ...
hook.remove()

# As data: for a test that the way that was meant is the way that runs.
found = gf.explain(model, tokens=1)
assert {each.path for each in found} == {"operator"}
assert json.loads(found.to_json())[0]["plans"]["inference"]["chosen"]
