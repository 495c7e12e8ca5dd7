"""The models of the comparison, in which only the feed-forward differs, and how they start."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.compare.settings import LARGEST_MISMATCH, LSTM, Setting
from gatedffn.convolution import GatedConvStack
from gatedffn.errors import SettingError
from gatedffn.layers import FeedForward
from gatedffn.sizing import hidden_size


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm costs: its width, its parameters, those that differ, and its arithmetic.

    `compared` counts the parameters of the part that differs between the arms: the feed-forwards,
    or the whole network of convolutions. `flops` are those of a training step for one token.
    """

    width: int
    parameters: int
    compared: int
    flops: int


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """The model of an arm on the current default device, as its libraries initialise it."""
    width = arm_width(setting, arm, vocabulary)
    if setting.model == "gated-conv":
        return _sequence_model(setting, arm, vocabulary, width)
    return _decoder(setting, arm, vocabulary, width)


def arm_width(setting: Setting, arm: str, vocabulary: int) -> int:
    """The hidden width, or the channels, that make an arm's parameters equal to the others'."""
    if setting.model == "decoder":
        return hidden_size(setting.d_model, variant=arm, multiple_of=setting.multiple_of)

    def count(candidate: str, width: int) -> int:
        with torch.device("meta"):
            model = _sequence_model(setting, candidate, vocabulary, width)
        return _count(model)

    target = count("glu", setting.d_model)
    return _nearest(lambda width: count(arm, width), target)


def _nearest(count: Callable[[int], int], target: int) -> int:
    """The width whose count, which grows with it, is nearest to the target."""
    low, high = 1, 2
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda width: abs(count(width) - target))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _decoder(setting: Setting, arm: str, vocabulary: int, width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=setting.d_model,
        intermediate_size=width,
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
        layer.add_module("mlp", FeedForward(setting.d_model, width, variant=arm))
    return model


class SequenceModel(nn.Module):
    """A language model of an embedding, a body over (batch, length, channels), and a head."""

    def __init__(self, vocabulary: int, d_embedding: int, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_embedding)
        self.body = body
        self.head = nn.Linear(channels, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(self.embedding(input_ids)))
        if labels is None:
            return {"logits": logits}
        predictions = logits[:, :-1].flatten(0, 1).float()
        return {"loss": F.cross_entropy(predictions, labels[:, 1:].flatten()), "logits": logits}


class _Convolutions(nn.Module):
    def __init__(self, stack: GatedConvStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.stack(x.transpose(1, 2))
        return output.transpose(1, 2)


class _Recurrence(nn.Module):
    def __init__(self, d_embedding: int, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_embedding, width, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(x)[0]
        return output


def _sequence_model(setting: Setting, arm: str, vocabulary: int, width: int) -> SequenceModel:
    # Narrower than every layer, as in the published networks, so that no arm is spared the
    # change of width in its first block.
    d_embedding = max(1, setting.d_model // 2)
    body: nn.Module
    if arm == LSTM:
        body = _Recurrence(d_embedding, width, setting.layers)
    else:
        blocks = [[(width, setting.kernel_size)]] * setting.layers
        body = _Convolutions(GatedConvStack(d_embedding, blocks, variant=arm))
    return SequenceModel(vocabulary, d_embedding, body, width)


@torch.no_grad()
def initialise(model: nn.Module, init: str, seed: int) -> None:
    """Draws every matrix from a normal distribution, by a seed of its own name; biases are 0.

    The standard deviation is 1 / sqrt(fan_in), or a fixed number if `init` is one. Since each
    matrix has its own seed, those that two arms share are equal in both.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan_in = parameter.numel() / parameter.shape[0]
            spread = fan_in**-0.5 if init == "fan_in" else float(init)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            drawn = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(drawn)
        elif "bias" in name.rpartition(".")[2]:
            parameter.zero_()


def cost(setting: Setting, arm: str, vocabulary: int) -> Cost:
    """Counts parameters and arithmetic on the meta device: nothing is computed.

    A training step takes six operations for each weight that is multiplied and token, and for
    each attention layer 12 context d_model for the two products with scores (Kaplan et al. 2020,
    arXiv 2001.08361, table 1, forward and backward).
    """
    with torch.device("meta"):
        model = build(setting, arm, vocabulary)
    multiplied = sum(
        weight.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.dim() >= 2
    )
    flops = 6 * multiplied
    compared = _count(model)
    if setting.model == "decoder":
        flops += 12 * setting.layers * setting.context * setting.d_model
        compared = sum(_count(m) for m in model.modules() if isinstance(m, FeedForward))
    return Cost(arm_width(setting, arm, vocabulary), _count(model), compared, flops)


def mismatches(setting: Setting, costs: dict[str, Cost]) -> dict[str, float]:
    """By how much the compared parameters of each arm differ from the baseline's, as a fraction.

    Raises:
        SettingError: two arms differ by more than 1% and the setting does not allow it.
    """
    counts = {arm: cost.compared for arm, cost in costs.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    spread = counts[most] / counts[least] - 1
    if spread > LARGEST_MISMATCH and not setting.allow_mismatch:
        raise SettingError(
            f"{most} has {spread:.1%} more parameters than {least} ({counts[most]:,} and "
            f"{counts[least]:,}), and a ranking needs at most {LARGEST_MISMATCH:.0%}: use "
            "--multiple-of 1 or another --d-model, or --allow-mismatch to compare unequal sizes"
        )
    return {arm: count / counts[setting.baseline] - 1 for arm, count in counts.items()}
