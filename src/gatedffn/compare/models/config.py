"""A decoder of the user's own architecture, by its Hugging Face configuration.

Its feed-forwards are found as `gatedffn.replace` finds them, and exchanged for those of an arm
with as many parameters. A model is taken only if exchanging them for ones of the same formula and
weights leaves its output what it was.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from gatedffn.compare.models.config_file import model_of, read
from gatedffn.compare.models.counting import multiplied
from gatedffn.compare.settings import Setting
from gatedffn.errors import SettingError, first_line
from gatedffn.interop.replacing.block import ReplacedFeedForward
from gatedffn.interop.replacing.replace import replace
from gatedffn.layers import FeedForward
from gatedffn.roles import Path, at
from gatedffn.sizing import weight_count


def read_config(source: str) -> dict[str, Any]:
    """What a configuration says of a setting: `config`, its JSON, and `d_model` and `layers`.

    Args:
        source: a JSON file, a folder with a `config.json`, or the name of a model at Hugging Face.

    Raises:
        SettingError: it cannot be read, or its model has no feed-forward that can be exchanged.
    """
    config = read(source)
    blocks = _blocks(config)
    return {"config": config, "d_model": blocks[0].d_model, "layers": len(blocks)}


@dataclass(frozen=True, slots=True)
class _Block:
    """A feed-forward of the model: where it is, its size, and what else the module does."""

    name: str
    d_model: int
    d_hidden: int
    d_out: int
    variant: str
    bias: bool
    before: tuple[Path, ...]
    after: tuple[Path, ...]
    dropout: float

    def exchanged(self, old: nn.Module, variant: str, d_hidden: int, **options: Any) -> nn.Module:
        """A feed-forward in place of the old one, with what that does before and after."""
        layer = FeedForward(
            self.d_model,
            d_hidden,
            variant=variant,
            d_out=self.d_out,
            bias=self.bias,
            dropout=self.dropout,
            **options,
        )
        around = [[at(old, p) for p in places] for places in (self.before, self.after)]
        return nn.Sequential(*around[0], layer, *around[1]) if any(around) else layer

    def width(self, variant: str, multiple_of: int) -> int:
        """The width, a multiple, at which a variant's parameters are nearest to the model's own."""

        def size(name: str, d_hidden: int) -> int:
            return weight_count(self.d_model, d_hidden, name, d_out=self.d_out, bias=self.bias)

        fixed = size(variant, 0)
        each = multiple_of * (size(variant, 1) - fixed)
        return max(1, round((size(self.variant, self.d_hidden) - fixed) / each)) * multiple_of


@lru_cache(maxsize=4)
def _blocks(config: str) -> tuple[_Block, ...]:
    """The feed-forwards of the model.

    Raises:
        SettingError: it has none, or one that cannot be exchanged.
    """
    tokens = 16  # whatever the vocabulary, the feed-forwards are the same
    with torch.device("cpu"), torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = model_of(config, tokens).eval()
        kind = type(model).__name__
        ids = torch.arange(tokens)[None]
        expected = _logits(model, ids)
        if expected.shape[-1] != tokens:
            raise SettingError(
                f"config: {kind} has not the vocabulary that vocab_size says: give the "
                "configuration of its language model alone"
            )
        ids[0, -1] = 0
        if not _close(_logits(model, ids)[:, :-1], expected[:, :-1]):
            raise SettingError(
                f"config: {kind} sees the tokens that it is to predict: it is no decoder, unless "
                "its configuration can say so (is_decoder)"
            )
        ids[0, -1] = tokens - 1
        found = replace(model)
        refused = [f"{block}: {block.reason}" for block in found.left]
        if refused or not found.replaced:
            raise SettingError(
                f"config: a feed-forward of {kind} cannot be exchanged: "
                + (refused[0] if refused else "none was found")
            )
        blocks = tuple(_exchange(model, block.name) for block in found.replaced)
        if not _close(_logits(model, ids), expected):
            raise SettingError(
                f"config: the feed-forwards of {kind} do more than the formula, so exchanging them "
                "would change the rest of the model"
            )
    return blocks


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    try:
        logits: torch.Tensor = model(input_ids=ids).logits
    except Exception as error:  # whatever the model's own code raises
        raise SettingError(
            f"config: {type(model).__name__} does not run on tokens alone: {first_line(error)}"
        ) from error
    return logits


@torch.no_grad()
def _exchange(model: nn.Module, name: str) -> _Block:
    """Exchanges a replaced block for a `FeedForward` with its weights."""
    old = model.get_submodule(name)
    if not isinstance(old, ReplacedFeedForward):
        raise SettingError(
            f"config: {name} cannot be exchanged: its weights are those of several experts, stacked"
        )
    roles = old._roles
    drops = [at(old, path) for path in roles.hidden]
    parameters = {name: _number(v) for name, v in old.activation_parameters().items()}
    try:
        weights = old.weights()
    except SettingError as error:
        raise SettingError(f"config: {name} cannot be exchanged: {error}") from error
    biases = [weights.gate_bias, weights.down_bias]
    biases += [] if weights.up is None else [weights.up_bias]
    given = {bias is not None for bias in biases}
    plain = roles.down is not None and roles.around is None and not roles.own_training
    plain &= len(given) == 1 and all(type(drop) is nn.Dropout for drop in drops)
    if not plain or None in parameters.values():
        raise SettingError(f"config: {name} has other parts than a feed-forward's own")
    block = _Block(
        name=name,
        d_model=old.d_model,
        d_hidden=old.d_hidden,
        d_out=old.d_out,
        variant=old.variant,
        bias=given == {True},
        before=roles.before,
        after=roles.after,
        dropout=max((drop.p for drop in drops if isinstance(drop, nn.Dropout)), default=0.0),
    )
    options = {"learnable": False, **parameters}
    new = block.exchanged(old, old.variant, old.d_hidden, **options).eval()
    layer = next(module for module in new.modules() if isinstance(module, FeedForward))
    pairs = zip(layer.weights(), weights, strict=True)
    for mine, its in pairs:
        if mine is not None:
            assert its is not None
            mine.copy_(its)
    model.set_submodule(name, new)
    return block


def _number(value: float | torch.Tensor) -> float | None:
    """A parameter of an activation; None if there is one for each hidden unit."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return value


def width(setting: Setting, arm: str, _vocabulary: int) -> int:
    """The hidden width in the first layer."""
    return _blocks(setting.config)[0].width(arm, setting.multiple_of)


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """The model with an arm's feed-forwards, each as large as the one that it stands for."""
    from transformers.pytorch_utils import Conv1D

    model = model_of(setting.config, vocabulary, setting.context)
    for block in _blocks(setting.config):
        old = model.get_submodule(block.name)
        d_hidden = block.width(arm, setting.multiple_of)
        model.set_submodule(block.name, block.exchanged(old, arm, d_hidden))
    for module in model.modules():
        if isinstance(module, Conv1D):
            # Its matrix is (in, out).
            module.weight.fan_in = module.weight.shape[0]  # type: ignore[attr-defined]
    return model


def flops(setting: Setting, model: nn.Module) -> int:
    """As of the LLaMA-style decoder, with attention to all of the context in every layer."""
    return 6 * multiplied(model) + 12 * setting.layers * setting.context * setting.d_model
