"""The model of an arm: which module makes it, and what its size is."""

from types import ModuleType

import torch
from torch import Tensor, nn

from gatedffn.compare.corruption import Corruption
from gatedffn.compare.models import config, convolution, decoder, mixture, t5
from gatedffn.compare.settings import ModelName, Setting

_MODULES: dict[ModelName, ModuleType] = {
    "decoder": decoder,
    "gated-conv": convolution,
    "moe": mixture,
    "t5": t5,
}


def module_of(setting: Setting) -> ModuleType:
    """The module that makes the models of a setting.

    Each has
    width    the hidden width, or the channels, at which an arm's parameters equal the others'
    build    the model of an arm
    flops    operations of a training step, forward and backward, for one token of the text
    """
    return config if setting.config else _MODULES[setting.model]


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """The model of an arm on the current default device, as its libraries initialise it."""
    model: nn.Module = module_of(setting).build(setting, arm, vocabulary)
    return model


def arm_width(setting: Setting, arm: str, vocabulary: int) -> int:
    """The hidden width, or the channels, that make an arm's parameters equal to the others'."""
    width: int = module_of(setting).width(setting, arm, vocabulary)
    return width


def blank(setting: Setting, batch: int, device: torch.device | str) -> dict[str, Tensor]:
    """An input of that many sequences in the shape of training, to measure time and memory with."""
    lengths = {"input_ids": setting.context, "labels": setting.context}
    if setting.model == "t5":
        corruption = Corruption(setting.context, 1)
        lengths = {"input_ids": corruption.input_length, "labels": corruption.target_length}
    return {
        name: torch.zeros(batch, length, dtype=torch.long, device=device)
        for name, length in lengths.items()
    }
