"""The numbers that every contestant of a row gets: drawn from one seed, rounded to the dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedffn.bench.devices import place_of
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


@dataclass(frozen=True, slots=True)
class GatingInputs:
    """Both branches and the gradient of the hidden values, (tokens, d_hidden) each.

    `up` is None for a variant without a gate.
    """

    gate: Tensor
    up: Tensor | None
    d_hidden: Tensor


def inputs_of(row: Row) -> Inputs | GatingInputs:
    """What the contestants of a row get, by what is measured."""
    return make_inputs(row) if row.part == "layer" else make_gating_inputs(row)


def make_gating_inputs(row: Row) -> GatingInputs:
    """The same for every process."""
    drawn = _drawing(row)
    gate = drawn(row.tokens, row.d_hidden)
    up = drawn(row.tokens, row.d_hidden) if VARIANTS[row.variant].gated else None
    return GatingInputs(gate, up, drawn(row.tokens, row.d_hidden))


def make_inputs(row: Row) -> Inputs:
    """The same for every process; hidden and output values are of the size of the input's."""
    drawn = _drawing(row)

    def weight(rows: int, columns: int) -> Tensor:
        return drawn(rows, columns, columns**-0.5)

    x = drawn(row.tokens, row.d_model)
    gated = VARIANTS[row.variant].gated
    gate = weight(row.d_hidden, row.d_model) if gated else None
    up = weight(row.d_hidden, row.d_model)
    down = weight(row.d_model, row.d_hidden)
    return Inputs(x, gate, up, down, drawn(row.tokens, row.d_model))


def _drawing(row: Row) -> Callable[..., Tensor]:
    """Draws matrices one after the other, where the row is computed."""
    device = place_of(row.device).tensors
    generator = torch.Generator(device).manual_seed(SEED)

    def drawn(rows: int, columns: int, std: float = 1.0) -> Tensor:
        values = torch.empty(rows, columns, device=device)
        return values.normal_(std=std, generator=generator).to(row.torch_dtype)

    return drawn
