"""Small models of Hugging Face with random weights, by name: nothing is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

OLD = version("transformers").startswith("4.")
HIDDEN, WIDE, TOKENS = 32, 48, 40
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
ENCODER = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
IMAGE = {k: ENCODER[k] for k in list(ENCODER)[:4]} | {"image_size": 16, "patch_size": 8}
T5 = {"d_model": HIDDEN, "d_ff": WIDE, "d_kv": 8, "num_heads": 4, "num_layers": 2}
T5 |= {"vocab_size": TOKENS}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model by its type, what it is made with, and what `replace` should find in it."""

    model: str
    variant: str
    settings: Mapping[str, Any] = field(default_factory=lambda: TEXT)
    order: str | None = None
    blocks: int = 2
    image: bool = False
    kind: str = "AutoModel"

    def build(self) -> Any:
        """The model, in float32 and inference mode, with weights of realistic size."""
        transformers: Any = import_module("transformers")
        config = transformers.AutoConfig.for_model(self.model, **self.settings)
        config._attn_implementation = "eager"
        kind: Any = getattr(transformers, self.kind)
        model: nn.Module = getattr(kind, "from_config", kind)(config)
        spread(model)
        return model.float().eval()

    def inputs(self) -> dict[str, Tensor]:
        """An input that it takes."""
        if self.image:
            return {"pixel_values": torch.randn(2, 3, 16, 16)}
        return {"input_ids": torch.randint(3, TOKENS, (2, 7))}


def spread(model: nn.Module) -> None:
    """Draws every weight anew, so that hidden values reach where activations bend."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            elif "norm" not in name.lower() and "alpha" not in name and "ln" not in name:
                parameter.normal_(std=0.5)


def results(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of all parameters by name, of a model."""
    output = model(**inputs)[0]
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(output.shape, generator=generator).to(output.dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((output * weights).sum(), list(named.values()), allow_unused=True)
    grads: list[Tensor | None] = list(found)
    made = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return {"output": output.detach(), **made}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "swiglu"),
    "llama-bias": Architecture("llama", "swiglu", {**TEXT, "mlp_bias": True}),
    "mistral": Architecture("mistral", "swiglu", TEXT | HEADS),
    "qwen2": Architecture("qwen2", "swiglu"),
    "qwen3": Architecture("qwen3", "swiglu", TEXT | HEADS),
    "gemma": Architecture("gemma", "geglu_tanh", TEXT | HEADS),
    "gemma2": Architecture("gemma2", "geglu_tanh", TEXT | HEADS),
    "gemma3": Architecture("gemma3_text", "geglu_tanh", TEXT | HEADS),
    "phi3": Architecture("phi3", "swiglu", order="gate_up"),
    "glm4": Architecture("glm4", "swiglu", TEXT | HEADS, order="gate_up"),
    "olmo2": Architecture("olmo2", "swiglu"),
    "cohere": Architecture("cohere", "swiglu"),
    "stablelm": Architecture("stablelm", "swiglu"),
    "falcon-h1": Architecture(
        "falcon_h1",
        "swiglu",
        {
            **TEXT,
            **HEADS,
            "mlp_multipliers": [0.75, 0.5],
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "granite": Architecture("granite", "swiglu"),
    "smollm3": Architecture("smollm3", "swiglu"),
    "t5-v1.1": Architecture(
        "t5", "geglu_tanh", {**T5, "feed_forward_proj": "gated-gelu"}, kind="T5EncoderModel"
    ),
    "mt5": Architecture(
        "mt5", "geglu_tanh", {**T5, "feed_forward_proj": "gated-gelu"}, kind="MT5EncoderModel"
    ),
    "umt5": Architecture(
        "umt5", "geglu_tanh", {**T5, "feed_forward_proj": "gated-gelu"}, kind="UMT5EncoderModel"
    ),
    "ul2": Architecture(
        "t5", "swiglu", {**T5, "feed_forward_proj": "gated-silu"}, kind="T5EncoderModel"
    ),
    "t5-v1.0": Architecture(
        "t5", "relu", {**T5, "feed_forward_proj": "relu"}, kind="T5EncoderModel"
    ),
    "bert": Architecture("bert", "gelu", ENCODER),
    "roberta": Architecture("roberta", "gelu", ENCODER),
    "vit": Architecture("vit", "gelu", IMAGE, image=True),
    "gpt2": Architecture(
        "gpt2", "gelu_tanh", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": TOKENS}
    ),
    "opt": Architecture(
        "opt",
        "relu",
        {**ENCODER, "ffn_dim": WIDE, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64},
    ),
    "falcon": Architecture("falcon", "gelu", ENCODER),
    "bloom": Architecture(
        "bloom",
        "gelu_tanh",
        {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": TOKENS},
    ),
    "nemotron": Architecture("nemotron", "relu2", TEXT | HEADS),
    "modernbert": Architecture("modernbert", "geglu", ENCODER, order="gate_up"),
    "dinov2-swiglu": Architecture(
        "dinov2",
        "swiglu",
        {**IMAGE, "use_swiglu_ffn": True, "mlp_ratio": 4},
        order="gate_up" if OLD else None,
        image=True,
    ),
    "apertus": Architecture("apertus", "xielu"),
}
