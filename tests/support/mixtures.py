"""A tiny model of the types of transformers that hold stacked experts, by its type."""

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import nn

from support.architectures import spread
from support.zoo import SIZES as DENSE

# One layer, and it is a mixture; what a type does not have is left out.
SIZES: dict[str, Any] = {
    **DENSE,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_local_experts_per_layer"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "expert_layer_period"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 0),
    **dict.fromkeys(("expert_layer_offset", "attn_layer_offset"), 0),
    **dict.fromkeys(("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **{"mlp_only_layers": [], "layer_types": None, "mlp_layer_types": None},
}
# Whose attention has as many heads for keys as for queries.
EVEN = ("deepseek_v2", "deepseek_v3")


def mixture(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """The plain model of a type in inference mode, every weight drawn."""
    transformers: Any = import_module("transformers")
    mapping: Any = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    of_type = mapping[kind]
    known = {*vars(of_type()), *inspect.signature(of_type.__init__).parameters}
    heads = {"num_key_value_heads": 4} if kind in EVEN else {}
    config = of_type(**{n: size for n, size in SIZES.items() if n in known} | heads | more)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModel.from_config(config)
    spread(model)
    return model.to(dtype).eval()
