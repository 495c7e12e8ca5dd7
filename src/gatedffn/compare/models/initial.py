"""How the models of a comparison start."""

import hashlib

import torch
from torch import nn


@torch.no_grad()
def initialise(model: nn.Module, init: str, seed: int) -> None:
    """Draws every matrix from a normal distribution, by a seed of its own name; biases are 0.

    The standard deviation is 1 / sqrt(fan_in), or a fixed number if `init` is one. Since each
    matrix has its own seed, those that two arms share are equal in both; of matrices of two widths
    the hidden units that both have start alike but for the scale. A model tells by an attribute
    `fan_in` of a parameter what its shape does not.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan_in = getattr(parameter, "fan_in", parameter.numel() / parameter.shape[0])
            spread = fan_in**-0.5 if init == "fan_in" else float(init)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            # Hidden units one after the other, so that a narrower matrix has the first of them.
            turned = name.endswith("down_proj.weight")
            shape = parameter.shape[::-1] if turned else parameter.shape
            drawn = torch.randn(shape, generator=generator)
            parameter.copy_((drawn.t() if turned else drawn) * spread)
        elif "bias" in name.rpartition(".")[2]:
            parameter.zero_()
