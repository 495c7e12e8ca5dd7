"""The encoder-decoder of Shazeer 2020: Hugging Face's T5 with a `FeedForward` in each layer."""

from torch import nn

from gatedffn.compare.corruption import Corruption
from gatedffn.compare.models.counting import count, multiplied
from gatedffn.compare.models.decoder import width
from gatedffn.compare.settings import Setting
from gatedffn.layers import FeedForward

__all__ = ["build", "flops", "width"]


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """An encoder and a decoder of so many layers each; tied embeddings, no dropout, no biases."""
    from transformers import T5Config, T5ForConditionalGeneration

    corruption = Corruption(setting.context, vocabulary)
    d_hidden, d_head = width(setting, arm, vocabulary), setting.d_model // setting.heads
    config = T5Config(
        vocab_size=corruption.all_tokens,
        d_model=setting.d_model,
        d_kv=d_head,
        d_ff=d_hidden,
        num_layers=setting.layers,
        num_heads=setting.heads,
        dropout_rate=0.0,
        use_cache=False,
        pad_token_id=corruption.start,
        eos_token_id=corruption.end,
    )
    config.decoder_start_token_id = corruption.start
    model: nn.Module = T5ForConditionalGeneration(config)
    # It says by its signature that it divides the loss by all processes' tokens, and does not.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    for module in list(model.modules()):
        if hasattr(module, "DenseReluDense"):
            module.DenseReluDense = FeedForward(setting.d_model, d_hidden, variant=arm)
    # T5 divides no scores: the square root of the head's width is in the queries' initial values.
    for name, parameter in model.named_parameters():
        if name.endswith("Attention.q.weight"):
            parameter.fan_in = setting.d_model * d_head  # type: ignore[attr-defined]
        elif name.endswith("relative_attention_bias.weight"):
            parameter.fan_in = setting.d_model  # type: ignore[attr-defined]
    model.get_parameter("shared.weight").fan_in = 1  # type: ignore[attr-defined]
    return model


def flops(setting: Setting, model: nn.Module) -> int:
    """Of a token of the text, which is in the input or in the target.

    The encoder and the decoder's keys and values of it are computed for each token of the input,
    the rest for each of the target; a product with scores for each pair.
    """
    corruption = Corruption(setting.context, 1)
    given, wanted = corruption.input_length, corruption.target_length
    crossing = sum(
        count(module)
        for name, module in model.named_modules()
        if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    )
    encoder = multiplied(model.get_submodule("encoder"))
    rest = multiplied(model) - encoder - crossing
    pairs = given * given + wanted * wanted + wanted * given
    scores = 12 * setting.layers * setting.d_model * pairs
    return (6 * (given * (encoder + crossing) + wanted * rest) + scores) // setting.context
