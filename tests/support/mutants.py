"""Deliberately wrong computations, which the comparator must reject.

Each takes the inputs of a case and returns the output and the gradients as a faulty library would
compute them. A comparison that lets one of these pass would let the fault pass.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gatedffn.functional import glu
from gatedffn.variants import VARIANTS
from support.cases import DTYPES, Inputs, gradients, ours, with_gradients
from support.eager import EAGER

Results = Mapping[str, Tensor]
TILE = 32


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: what it computes, in which rows it shows, and in which dtypes it is visible."""

    name: str
    wrong: Callable[[Inputs], Results]
    rows: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    needs_rows: bool = False


ALL = tuple(VARIANTS)
GATED = tuple(name for name, row in VARIANTS.items() if row.gated)
# Where gate and up play the same part, swapping them is no fault.
LOPSIDED = tuple(name for name in GATED if VARIANTS[name].phi != VARIANTS[name].psi)
CLAMPED = tuple(name for name, row in VARIANTS.items() if "limit" in row.defaults)


def _right(inputs: Inputs) -> dict[str, Tensor]:
    return dict(with_gradients(inputs))


def _linear(inputs: Inputs) -> Tensor:
    assert inputs.up is not None
    return inputs.up


def _branches_swapped(inputs: Inputs) -> Results:
    swapped = _right(replace(inputs, gate=_linear(inputs), up=inputs.gate))
    return swapped | {"gate": swapped["up"], "up": swapped["gate"]}


def _gradients_swapped(inputs: Inputs) -> Results:
    right = _right(inputs)
    return right | {"gate": right["up"], "up": right["gate"]}


def _with_phi(phi: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Results]:
    """The row with another function on the gate, differentiated by autograd."""

    def wrong(inputs: Inputs) -> Results:
        gate = inputs.gate.double()
        hidden = phi(gate)
        if inputs.up is not None:
            hidden = hidden * inputs.up.double()
        output = hidden.to(inputs.gate.dtype)
        return {"output": output.detach()} | gradients(output, inputs)

    return wrong


def _second_term_dropped(inputs: Inputs) -> Results:
    """silu' as sigmoid(g), without g sigmoid(g) (1 - sigmoid(g))."""
    slope = torch.sigmoid(inputs.gate.double()) * inputs.grad.double()
    if inputs.up is not None:
        slope = slope * inputs.up.double()
    return _right(inputs) | {"gate": slope.to(inputs.gate.dtype).detach()}


def _sigmoid_of_wrong_half(inputs: Inputs) -> Results:
    gate, up = inputs.gate.double(), _linear(inputs).double()
    gate = gate if inputs.row.phi == "swish" else torch.ones_like(gate)
    output = (gate * torch.sigmoid(up) * up).to(inputs.gate.dtype)
    return _right(inputs) | {"output": output.detach()}


def _clamp_dropped(inputs: Inputs) -> Results:
    return _right(replace(inputs, parameters={**inputs.parameters, "limit": torch.inf}))


def _parameters_ignored(inputs: Inputs) -> Results:
    return _right(replace(inputs, parameters=inputs.row.defaults))


def _packed_order_reversed(inputs: Inputs) -> Results:
    packed = torch.cat([inputs.gate, _linear(inputs)], -1)
    output = glu(packed, -1, variant=inputs.row, order="up_gate", **inputs.parameters)
    return {"output": output.detach()} | gradients(output, inputs)


def _last_tile_skipped(inputs: Inputs) -> Results:
    right = _right(inputs)
    start = (inputs.gate.shape[-1] - 1) // TILE * TILE
    right["output"][..., start:] = 0.0
    return right


def _row_stride_off(inputs: Inputs) -> Results:
    width = inputs.gate.shape[-1]
    flat = inputs.gate.detach().flatten()
    row, column = torch.arange(flat.numel()) // width, torch.arange(flat.numel()) % width
    read = flat[(row * (width + 1) + column) % flat.numel()].view(inputs.gate.shape)
    return {"output": ours(replace(inputs, gate=read)).detach()}


def _last_rows_shifted(inputs: Inputs) -> Results:
    right = _right(inputs)
    return {name: gradient.roll(1, 0) for name, gradient in right.items()}


def _one_nan(inputs: Inputs) -> Results:
    right = _right(inputs)
    right["output"].view(-1)[-1] = torch.nan
    return right


def _one_stale(inputs: Inputs) -> Results:
    """One element that holds what the buffer held before."""
    right = _right(inputs)
    right["output"].view(-1)[-1] += right["output"].abs().max()
    return right


MUTANTS = (
    Mutant("branches swapped", _branches_swapped, LOPSIDED),
    Mutant("gradients swapped", _gradients_swapped, GATED),
    # The two differ by less than bfloat16 and float16 can tell.
    Mutant("tanh for erf", _with_phi(EAGER["gelu_tanh"]), ("gelu", "geglu"), dtypes=("fp32",)),
    Mutant("erf for tanh", _with_phi(EAGER["gelu"]), ("gelu_tanh", "geglu_tanh"), dtypes=("fp32",)),
    Mutant("second term of silu' dropped", _second_term_dropped, ("swish", "swiglu")),
    Mutant("sigmoid of the wrong half", _sigmoid_of_wrong_half, ("glu", "swiglu")),
    Mutant("clamp dropped", _clamp_dropped, CLAMPED),
    Mutant("packed order reversed", _packed_order_reversed, LOPSIDED),
    Mutant("last column tile skipped", _last_tile_skipped, ALL),
    Mutant("row stride off by one", _row_stride_off, ALL, needs_rows=True),
    Mutant("rows shifted", _last_rows_shifted, ALL, needs_rows=True),
    Mutant("one NaN", _one_nan, ALL),
    Mutant("one stale element", _one_stale, ALL),
)

PARAMETER_IGNORED = Mutant(
    "parameters ignored",
    _parameters_ignored,
    tuple(name for name, row in VARIANTS.items() if any(p.learnable for p in row.parameters)),
)


Fault = Literal["none", "bias forgotten", "bf16 sum"]


def linear(x: Tensor, weight: Tensor, bias: Tensor, fault: Fault) -> Tensor:
    """A projection, right or with a fault of its matrix product."""
    if fault == "bf16 sum":
        # Every partial sum is rounded, where hardware keeps float32.
        total = bias.expand(x.shape[0], -1)
        for column in range(x.shape[1]):
            total = total + x[:, column, None] * weight[None, :, column]
        return total
    return torch.nn.functional.linear(x, weight, None if fault == "bias forgotten" else bias)


def of_shape(mutants: Iterable[Mutant], shape: tuple[int, ...], dtype: str) -> list[Mutant]:
    """The mutants that can be seen at a shape and in a dtype."""
    several = len(shape) > 1 and shape[0] > 1
    return [m for m in mutants if dtype in m.dtypes and (several or not m.needs_rows)]
