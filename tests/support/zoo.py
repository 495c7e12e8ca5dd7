"""A tiny model of every type of transformers whose feed-forward `layouts.py` knows, by its type."""

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from support.architectures import spread

# Every name that a configuration has for a size; what a type does not have is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "n_inner", "hidden_dim", "d_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts", "num_experts_per_tok"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "dim_head", "num_mel_bins"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    **{"mask_token_id": 3, "vocab_size": 40, "image_size": 16, "patch_size": 8},
    **{"max_source_positions": 8, "max_target_positions": 16},
    **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    **{"mamba_n_groups": 1},
}
MORE: dict[str, dict[str, Any]] = {"recurrent_gemma": {"num_hidden_layers": 3}}  # one of each kind
# Of the architectures in `layouts.py`, and those whose layers are replaced as a whole.
# fmt: off
TYPES = [
    "apertus", "arcee", "bart", "bert", "bitnet", "bloom", "codegen", "cohere", "cohere2",
    "cpmant", "dinov2", "distilbert", "esm", "exaone4", "falcon", "falcon_h1", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
    "granite", "lfm2", "llama", "longt5", "mistral", "modernbert", "modernbert-decoder", "mpt",
    "mt5", "nemotron", "nomic_bert", "olmo", "olmo2", "olmo3", "openai-gpt", "opt", "persimmon",
    "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "recurrent_gemma", "roberta", "seed_oss",
    "smollm3", "stablelm", "starcoder2", "t5", "t5gemma", "umt5", "vit", "whisper", "xlnet",
    "biogpt", "blenderbot", "m2m_100", "marian", "mbart", "pegasus", "plbart", "xglm",
]
# fmt: on
# Their code has constants of eight digits, or insists on float32.
SINGLE = {"bloom", "qwen2_moe", "xglm", "xlnet"}


def tiny(kind: str) -> Any:
    """The plain model of a type in inference mode, every weight drawn, in float64 if it can be."""
    transformers: Any = import_module("transformers")
    mapping: Any = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    of_type = mapping[kind]
    known = {*vars(of_type()), *inspect.signature(of_type.__init__).parameters}
    sizes = {n: size for n, size in SIZES.items() if n in known} | MORE.get(kind, {})
    for name, inner in of_type.sub_configs.items():  # an encoder and a decoder
        known = {*vars(inner())}
        sizes[name] = inner(**{n: size for n, size in SIZES.items() if n in known}).to_dict()
    config = of_type(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModel.from_config(config)
    spread(model)
    return model.to(torch.float32 if kind in SINGLE else torch.float64).eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    """An input that it takes, of two sequences, one padded."""
    generator = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        shape: tuple[int, ...] = (2, 3, 16, 16)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=model.dtype)}
    ids = torch.randint(4, 40, (2, 7), generator=generator)
    inputs = {"input_ids": ids}
    if model.main_input_name == "input_features":
        features = torch.randn((2, 8, 16), generator=generator, dtype=model.dtype)
        inputs = {"input_features": features}
    elif "attention_mask" in takes:
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        inputs["attention_mask"] = mask
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.randint(4, 40, (2, 5), generator=generator)
    return inputs
