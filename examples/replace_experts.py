"""The experts of a mixture you have: replaced, or by the registry of transformers."""

from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import gatedffn as gf

config = MixtralConfig(
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
)
model: Any = MixtralForCausalLM(config)
ids = torch.randint(0, config.vocab_size, (2, 10))
before = model(ids).logits

report = gf.replace(model)
print(report)
# 2 of 2 feed-forward blocks replaced
torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
report.undo()

# Or by name. from_pretrained and from_config take experts_implementation="gatedffn" too.
model.set_experts_implementation("gatedffn")
torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
