"""The feed-forward layers of a model you have, computed by this library, and back again."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gatedffn as gf

config = LlamaConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4
)
model: torch.nn.Module = LlamaForCausalLM(config)
ids = torch.randint(0, config.vocab_size, (2, 10))
keys = list(model.state_dict())
before = model(ids).logits

report = gf.replace(model)
print(report)
# 2 of 2 feed-forward blocks replaced
#   model.layers.0.mlp  LlamaMLP  swiglu (beta=1): gate gate_proj, up up_proj, down down_proj
#   model.layers.1.mlp  LlamaMLP  swiglu (beta=1): gate gate_proj, up up_proj, down down_proj

# The same numbers from the same parameters under the same names.
torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
assert list(model.state_dict()) == keys
assert sum(isinstance(module, gf.FeedForward) for module in model.modules()) == 2

# What is not understood is left, with the reason; strict=True makes that an error.
unknown = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Softsign(), torch.nn.Linear(24, 8))
print(gf.replace(unknown))
try:
    gf.replace(unknown, strict=True)
except gf.GatedFFNError as error:
    print(error)

report.undo()
assert not any(isinstance(module, gf.FeedForward) for module in model.modules())
assert torch.equal(model(ids).logits, before)
