"""Your LlamaMLP is our FeedForward: the same three matrices under the same names."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gatedffn as gf

config = LlamaConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=1, num_attention_heads=4
)
model: torch.nn.Module = LlamaForCausalLM(config)
llama_mlp = model.get_submodule("model.layers.0.mlp")

# LlamaMLP     FeedForward   weight (out, in)      the branch
# gate_proj -> gate_proj     (d_hidden, d_model)   goes through silu: the gate
# up_proj   -> up_proj       (d_hidden, d_model)   stays linear
# down_proj -> down_proj     (d_model, d_hidden)
ours = gf.FeedForward(d_model=64, d_hidden=176, variant="swiglu")
ours.load_state_dict(llama_mlp.state_dict(), strict=True)

x = torch.randn(2, 10, 64)
torch.testing.assert_close(ours(x), llama_mlp(x))
print(ours)
