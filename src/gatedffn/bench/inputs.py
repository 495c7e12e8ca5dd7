"""The numbers that every contestant of a row gets: drawn from one seed, rounded to the dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gatedffn.bench.rows import Row
from gatedffn.variants import VARIANTS

SEED = 20_020_520


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input, the weights as `torch.nn.Linear` has them, and the gradient of the output.

    `gate` is None for a variant without a gate.
    """

    x: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    d_output: Tensor


def make_inputs(row: Row) -> Inputs:
    """The same for every process; hidden and output values are of the size of the input's."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(rows: int, columns: int, std: float = 1.0) -> Tensor:
        values = torch.empty(rows, columns).normal_(std=std, generator=generator)
        return values.to(row.torch_dtype)

    def weight(rows: int, columns: int) -> Tensor:
        return drawn(rows, columns, columns**-0.5)

    x = drawn(row.tokens, row.d_model)
    gated = VARIANTS[row.variant].gated
    gate = weight(row.d_hidden, row.d_model) if gated else None
    up = weight(row.d_hidden, row.d_model)
    down = weight(row.d_model, row.d_hidden)
    return Inputs(x, gate, up, down, drawn(row.tokens, row.d_model))
