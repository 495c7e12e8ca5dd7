"""Counting the parameters of models, and widths that bring them to a number."""

from collections.abc import Callable

from torch import nn

from gatedffn.mixture import MixtureFeedForward


def count(model: nn.Module) -> int:
    """The parameters of a model; one that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def idle(model: nn.Module) -> int:
    """The weights of experts that a token does not go through."""
    return sum(
        weight.numel() // experts.num_experts * (experts.num_experts - mixture.gate.rule.top_k)
        for mixture in model.modules()
        if isinstance(mixture, MixtureFeedForward)
        for experts in [mixture.experts]
        for weight in experts.parameters()
        if weight.dim() >= 2
    )


def multiplied(model: nn.Module) -> int:
    """The weights that tokens are multiplied by; one that is used twice counts twice."""
    return sum(
        weight.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.dim() >= 2
    )


def nearest(counted: Callable[[int], int], target: int) -> int:
    """The width whose count, which grows with it, is nearest to the target."""
    low, high = 1, 2
    while counted(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if counted(middle) < target else (low, middle)
    return min((low, high), key=lambda width: abs(counted(width) - target))
