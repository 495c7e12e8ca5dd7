"""How the parameters of a row travel through an operator.

Either all as numbers (`fixed`) or, when one of them is a tensor, all as tensors (`learned`), in
the order of the row: a schema has no list of tensors and numbers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.variants import VARIANTS


def split(parameters: Mapping[str, Value], like: Tensor) -> tuple[list[Tensor], list[float]]:
    """The parameters, complete and in order, as (learned, fixed)."""
    values = list(parameters.values())
    fixed = [value for value in values if not isinstance(value, Tensor)]
    if len(fixed) == len(values):
        return [], fixed
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    learned = [
        # Filled there: a copy to a GPU could not be part of a CUDA graph.
        value
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=dtype, device=like.device)
        for value in values
    ]
    return learned, []


def join(variant: str, learned: Sequence[Tensor], fixed: Sequence[float]) -> dict[str, Value]:
    """The parameters of a row by name."""
    return dict(zip(VARIANTS[variant].defaults, [*learned, *fixed], strict=True))


def no_gradient(values: Sequence[float]) -> list[None] | None:
    """The gradient of `fixed`: PyTorch takes an empty list for tensors, and wants one back."""
    return None if values else []
