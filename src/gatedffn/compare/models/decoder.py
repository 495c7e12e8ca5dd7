"""A LLaMA-style decoder of Hugging Face."""

from collections.abc import Callable

from torch import nn

from gatedffn.compare.models.counting import idle, multiplied
from gatedffn.compare.settings import Setting
from gatedffn.layers import FeedForward
from gatedffn.sizing import hidden_size


def width(setting: Setting, arm: str, _vocabulary: int) -> int:
    """The hidden width by the paper's rule."""
    return hidden_size(setting.d_model, variant=arm, multiple_of=setting.multiple_of)


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """The decoder with a `FeedForward` in each layer."""
    d_hidden = width(setting, arm, vocabulary)
    return with_layers(
        setting, vocabulary, lambda: FeedForward(setting.d_model, d_hidden, variant=arm)
    )


def with_layers(setting: Setting, vocabulary: int, made: Callable[[], nn.Module]) -> nn.Module:
    """The decoder with what is made in the place of each feed-forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=setting.d_model,
        intermediate_size=1,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=setting.context,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = LlamaForCausalLM(config)
    for layer in model.get_submodule("model.layers").children():
        layer.add_module("mlp", made())
    # All branches are added up, so that what each of them adds is a part of one sum (as in GPT-2).
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter.fan_in = 2 * setting.layers * parameter.shape[-1]  # type: ignore[attr-defined]
    return model


def flops(setting: Setting, model: nn.Module) -> int:
    """Six for each weight that a token meets, and for each attention 12 context d_model for its
    two products.
    """
    used = multiplied(model) - idle(model)
    return 6 * used + 12 * setting.layers * setting.context * setting.d_model
