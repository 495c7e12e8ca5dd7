"""How the models of a comparison start."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialise(model: nn.Module, init: str, seed: int) -> None:
    """Draws every matrix from a normal distribution, by a seed of its own name; biases are 0.

    The standard deviation is 1 / sqrt(fan_in), or a fixed number if `init` is one. Since each
    matrix has its own seed, those that two arms share are equal in both; of matrices of two widths
    the hidden units that both have start alike but for the scale. A model tells by attributes of a
    parameter what its shape does not: `fan_in`, and `stacked`, the names of what a stack of experts
    holds of each, one below the other.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan_in = getattr(parameter, "fan_in", parameter.numel() / parameter.shape[0])
            spread = fan_in**-0.5 if init == "fan_in" else float(init)
            for own, matrix in _matrices(name, parameter):
                _draw(matrix, own, spread, seed)
        elif "bias" in name.rpartition(".")[2]:
            parameter.zero_()


def _matrices(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter with its name; of stacked experts each matrix, named as if it lay alone."""
    stacked: tuple[str, ...] = getattr(parameter, "stacked", ())
    if not stacked:
        yield name, parameter
    for number, expert in enumerate(parameter if stacked else ()):
        for part, matrix in zip(stacked, expert.chunk(len(stacked)), strict=True):
            yield f"{name.rpartition('.')[0]}.{number}.{part}.weight", matrix


def _draw(matrix: Tensor, name: str, spread: float, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    # Hidden units one after the other, so that a narrower matrix has the first of them.
    turned = name.endswith("down_proj.weight")
    shape = matrix.shape[::-1] if turned else matrix.shape
    drawn = torch.randn(shape, generator=generator)
    matrix.copy_((drawn.t() if turned else drawn) * spread)
