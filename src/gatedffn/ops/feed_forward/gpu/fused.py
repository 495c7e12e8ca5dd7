"""The hidden values as one kernel: `phi(x W_gate^T + b) * psi(x W_up^T + b)`.

One pass over a tile's rows of x feeds the sums of both branches; biases, phi and psi come when
they are complete, in float32, and what is written is rounded once. Gate and up are written as
well where they are to be saved.

Where both weights lie as a descriptor can take them, each step reads one tile of both and
multiplies x with it once, as a product of twice the width does: the matrix units of Hopper want
that width, and with a single sum a program reads its next tile while it finishes this one.

Without a gate a tile has twice the hidden units, so that it is a product of the same size.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.activations.gpu import parameter, value
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs, tiles
from gatedffn.ops.feed_forward.gpu.configs import Config, Operands
from gatedffn.ops.feed_forward.gpu.tiles import halves, load, place, store


@triton.jit
def finish(
    gate, up, gate_bias, up_bias, hidden, out_gate, out_up, p0, p1, p2,
    row, column, tokens, d_hidden, hidden_stride, out_gate_stride, out_up_stride,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUBTILES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    """What comes after the products, for so many parts of the tile one after the other."""
    if SUBTILES > 1:
        first, second = halves(gate, ROWS, COLUMNS)
        other, another = first, second
        if PSI is not None:
            other, another = halves(up, ROWS, COLUMNS)
        finish(
            first, other, gate_bias, up_bias, hidden, out_gate, out_up,
            p0, p1, p2, row, column, tokens, d_hidden,
            hidden_stride, out_gate_stride, out_up_stride,
            PHI, PSI, STEP0, STEP1, STEP2, ROWS, COLUMNS // 2, SUBTILES // 2, DESCRIPTORS, ROUGH,
        )  # fmt: skip
        finish(
            second, another, gate_bias, up_bias, hidden, out_gate, out_up,
            p0, p1, p2, row, column + COLUMNS // 2, tokens, d_hidden,
            hidden_stride, out_gate_stride, out_up_stride,
            PHI, PSI, STEP0, STEP1, STEP2, ROWS, COLUMNS // 2, SUBTILES // 2, DESCRIPTORS, ROUGH,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, COLUMNS)[None, :]
        within = columns < d_hidden
        if gate_bias is not None:
            gate += tl.load(gate_bias + columns, mask=within, other=0.0).to(tl.float32)
        if out_gate is not None:
            store(
                out_gate, gate, row, column, out_gate_stride, tokens, d_hidden,
                ROWS, COLUMNS, DESCRIPTORS,
            )  # fmt: skip
        first = parameter(p0, STEP0, columns, within)
        second = parameter(p1, STEP1, columns, within)
        result = value(gate, first, second, PHI, ROUGH)
        if PSI is not None:
            if up_bias is not None:
                up += tl.load(up_bias + columns, mask=within, other=0.0).to(tl.float32)
            if out_up is not None:
                store(
                    out_up, up, row, column, out_up_stride, tokens, d_hidden,
                    ROWS, COLUMNS, DESCRIPTORS,
                )  # fmt: skip
            result *= value(up, parameter(p2, STEP2, columns, within), 0.0, PSI, ROUGH)
        if hidden is not None:
            store(
                hidden, result, row, column, hidden_stride, tokens, d_hidden,
                ROWS, COLUMNS, DESCRIPTORS,
            )  # fmt: skip


@triton.jit
def hidden_values_kernel(
    x, gate_weight, up_weight, gate_bias, up_bias,
    hidden, out_gate, out_up, p0, p1, p2, tokens, d_hidden, d_model,
    x_stride, gate_stride, up_stride,
    hidden_stride, out_gate_stride, out_up_stride,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, DEEP: tl.constexpr,
    GROUP: tl.constexpr, SUBTILES: tl.constexpr, PRECISION: tl.constexpr,
    OPERANDS: tl.constexpr, SWAPPED: tl.constexpr, RESULT_DESCRIPTORS: tl.constexpr,
    ROUGH: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """OPERANDS is "pointers", "descriptors" or "joined"; SWAPPED says that the up branch's
    weight is the first of the joined two.
    """
    DESCRIPTORS: tl.constexpr = OPERANDS != "pointers"
    JOINED: tl.constexpr = OPERANDS == "joined" and PSI is not None
    down = tl.cdiv(tokens, TOKENS)
    along = tl.cdiv(d_hidden, UNITS)
    for index in tl.range(
        tl.program_id(0), down * along, tl.num_programs(0),
        flatten=FLATTEN, warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        row, column = place(index, down, along, GROUP)
        row *= TOKENS
        column *= UNITS
        if JOINED:
            both = tl.zeros((TOKENS, 2 * UNITS), tl.float32)
            for step in tl.range(0, tl.cdiv(d_model, DEEP)):
                deep = step * DEEP
                rows = x.load([row, deep])
                weights = gate_weight.load([0, column, deep]).reshape(2 * UNITS, DEEP)
                both = tl.dot(rows, weights.T, both, input_precision=PRECISION)
            gate, up = halves(both, TOKENS, 2 * UNITS)
            if SWAPPED:
                gate, up = up, gate
        else:
            gate = tl.zeros((TOKENS, UNITS), tl.float32)
            up = gate
            for step in tl.range(0, tl.cdiv(d_model, DEEP)):
                deep = step * DEEP
                rows = load(x, row, deep, x_stride, tokens, d_model, TOKENS, DEEP, DESCRIPTORS)
                weights = load(
                    gate_weight, column, deep, gate_stride, d_hidden, d_model,
                    UNITS, DEEP, DESCRIPTORS,
                )  # fmt: skip
                gate = tl.dot(rows, weights.T, gate, input_precision=PRECISION)
                if PSI is not None:
                    weights = load(
                        up_weight, column, deep, up_stride, d_hidden, d_model,
                        UNITS, DEEP, DESCRIPTORS,
                    )  # fmt: skip
                    up = tl.dot(rows, weights.T, up, input_precision=PRECISION)
        finish(
            gate, up, gate_bias, up_bias, hidden, out_gate, out_up,
            p0, p1, p2, row, column, tokens, d_hidden,
            hidden_stride, out_gate_stride, out_up_stride,
            PHI, PSI, STEP0, STEP1, STEP2, TOKENS, UNITS, SUBTILES, RESULT_DESCRIPTORS, ROUGH,
        )  # fmt: skip


def operands(x: Tensor, gate_weight: Tensor, up_weight: Tensor | None) -> Operands:
    """The best way in which these can be read; a single weight needs no other to be joined to."""
    if not tiles.have_descriptors(x, gate_weight, up_weight):
        return "pointers"
    if up_weight is None or tiles.joinable(gate_weight, up_weight):
        return "joined"
    return "descriptors"


def hidden_values(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    variant: str,
    parameters: Mapping[str, Value],
    out_hidden: Tensor,
    out_gate: Tensor | None = None,
    out_up: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Writes `phi(x W_gate^T + b) * psi(x W_up^T + b)`, and both branches if wanted.

    x (tokens, d_model), weights (d_hidden, d_model), biases (d_hidden,), outputs (tokens,
    d_hidden), each of any row stride. The call is one that the table of ways has nothing against.

    Args:
        config: None takes the best of the table's.

    Raises:
        ShapeError: the tensors do not fit together.
        BackendError: `config` reads its operands in a way that these tensors do not allow.
    """
    (tokens, d_model), d_hidden = x.shape, gate_weight.shape[0]
    results = (out_hidden, out_gate, out_up)
    tiles.check_branches(variant, up_weight, out_up)
    into, of = (d_hidden, d_model), (tokens, d_hidden)
    tiles.check(
        x,
        ("the weight of the gate", gate_weight, into),
        ("the weight of the up branch", up_weight, into),
        ("the bias of the gate", gate_bias, (d_hidden,)),
        ("the bias of the up branch", up_bias, (d_hidden,)),
        ("the place of the hidden values", out_hidden, of),
        ("the place of the gate", out_gate, of),
        ("the place of the up branch", out_up, of),
    )
    given = (x, gate_weight, gate_bias, up_weight, up_bias, variant, parameters, *results)
    allowed = operands(x, gate_weight, up_weight)
    again = partial(hidden_values, *given)
    config = configs.chosen("hidden_values", config, allowed, x, of, again)
    if up_weight is None:
        config = replace(config, units=2 * config.units, subtiles=4 * config.subtiles)
    config = tiles.parted(config, results)
    units = config.units
    weights: tuple[Any, ...] = gate_weight, up_weight
    rows: Any = x
    swapped = False
    if config.operands != "pointers":
        rows = tiles.descriptor(x, config.tokens, config.deep)
        weights = tuple(tiles.descriptor(w, units, config.deep) for w in weights)
    if config.operands == "joined" and up_weight is not None:
        weights = tiles.joined(gate_weight, up_weight, units, config.deep), None
        swapped = up_weight.data_ptr() < gate_weight.data_ptr()
    written = tiles.places(results, config)
    formula = gpu.describe(variant, parameters)
    count = triton.cdiv(tokens, config.tokens) * triton.cdiv(d_hidden, units)
    with gpu.on_device_of(x):
        hidden_values_kernel[(tiles.programs(count, config.for_each, x.device),)](
            rows,
            *weights,
            *(None if b is None else b.contiguous() for b in (gate_bias, up_bias)),
            *written,
            *formula.values(),
            tokens,
            d_hidden,
            d_model,
            *(tiles.stride(t) for t in (x, gate_weight, up_weight, *results)),
            **formula.constants(),
            TOKENS=config.tokens,
            UNITS=units,
            DEEP=config.deep,
            GROUP=config.group,
            SUBTILES=config.subtiles,
            PRECISION="tf32" if gpu.kind_of(x.dtype) == "tf32" else "ieee",
            OPERANDS=config.operands,
            SWAPPED=swapped,
            RESULT_DESCRIPTORS=written[0] is not out_hidden,
            ROUGH=x.dtype != torch.float32,
            # With two sums the compiler would take them apart at every end of a tile.
            FLATTEN=config.flatten and (up_weight is None or config.operands == "joined"),
            SPECIALIZE=config.specialize,
            num_warps=config.warps,
            num_stages=config.stages,
        )
