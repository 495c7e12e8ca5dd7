"""The gradients of gate and up in the epilogue of the product with W_down, as one kernel.

    d_hidden = grad W_down
    d_gate   = d_hidden phi'(gate) psi(up)
    d_up     = d_hidden phi(gate) psi'(up)
    hidden   = phi(gate) psi(up)

d_hidden is never written: a tile of it meets the same tile of the branches, saved or computed
anew. The hidden values are what the gradient of W_down is made of. The gradients of learned
parameters are summed over the tokens of each tile here, and over the tiles afterwards, always in
the same order.

It is for any part of the hidden units: a slice of the columns of every operand but `grad`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.activations.gpu import both, by, parameter
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs, tiles
from gatedffn.ops.feed_forward.gpu.configs import Config, Operands
from gatedffn.ops.feed_forward.gpu.tiles import halves, load, place, store


@triton.jit
def finish(
    d_hidden, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
    weights, dots, block, row, column, tokens, units, apart,
    gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_stride,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUBTILES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    """What comes after the product, for so many parts of the tile one after the other.

    `block` is the number of the tile's row of tiles. `weights`, one a row, scale the gradient and
    the hidden values. `dots` has a place a row for the product of both without them, summed over
    the columns of a part; those of the next part are `apart` from it.
    """
    if SUBTILES > 1:
        first, second = halves(d_hidden, ROWS, COLUMNS)
        finish(
            first, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
            weights, dots, block, row, column, tokens, units, apart,
            gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_stride,
            PHI, PSI, STEP0, STEP1, STEP2, ROWS, COLUMNS // 2, SUBTILES // 2, DESCRIPTORS, ROUGH,
        )  # fmt: skip
        finish(
            second, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
            weights, dots, block, row, column + COLUMNS // 2, tokens, units, apart,
            gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_stride,
            PHI, PSI, STEP0, STEP1, STEP2, ROWS, COLUMNS // 2, SUBTILES // 2, DESCRIPTORS, ROUGH,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, COLUMNS)[None, :]
        within = columns < units
        first = parameter(p0, STEP0, columns, within)
        second = parameter(p1, STEP1, columns, within)
        a = load(
            gate, row, column, gate_stride, tokens, units, ROWS, COLUMNS, DESCRIPTORS
        ).to(tl.float32)  # fmt: skip
        value, slope = both(a, first, second, PHI, ROUGH)
        found = d_hidden
        if weights is not None:
            d_hidden = found * weights
        through = d_hidden
        if PSI is not None:
            b = load(
                up, row, column, up_stride, tokens, units, ROWS, COLUMNS, DESCRIPTORS
            ).to(tl.float32)  # fmt: skip
            other, other_slope = both(b, parameter(p2, STEP2, columns, within), 0.0, PSI, ROUGH)
            through = d_hidden * other
            if d_up is not None:
                store(
                    d_up, d_hidden * value * other_slope, row, column, d_up_stride,
                    tokens, units, ROWS, COLUMNS, DESCRIPTORS,
                )  # fmt: skip
            value *= other
        if d_gate is not None:
            store(
                d_gate, through * slope, row, column, d_gate_stride,
                tokens, units, ROWS, COLUMNS, DESCRIPTORS,
            )  # fmt: skip
        if dots is not None:
            at = dots + (column // COLUMNS).to(tl.int64) * apart
            rows = row + tl.arange(0, ROWS)[:, None]
            tl.store(at, tl.sum(found * value, axis=1)[:, None], mask=rows < tokens)
        if hidden is not None:
            if weights is not None:
                value *= weights
            store(
                hidden, value, row, column, hidden_stride, tokens, units, ROWS, COLUMNS, DESCRIPTORS
            )  # fmt: skip
        if sums0 is not None:
            _sum(sums0, through * by(a, first, second, PHI, 0, ROUGH), block, columns, units)
        if sums1 is not None:
            _sum(sums1, through * by(a, first, second, PHI, 1, ROUGH), block, columns, units)


@triton.jit
def _sum(sums, terms, block, columns, units):
    """Writes the sums over the tokens of a tile; those of rows beyond the last are of zeros."""
    place = sums + block.to(tl.int64) * units + columns
    tl.store(place, tl.sum(terms, axis=0)[None, :], mask=columns < units)


@triton.jit
def branch_gradients_kernel(
    grad, weight, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
    tokens, units, d_out, grad_stride, weight_stride,
    gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_stride,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, DEEP: tl.constexpr,
    GROUP: tl.constexpr, SUBTILES: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BRANCH_DESCRIPTORS: tl.constexpr,
    ROUGH: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(tokens, TOKENS)
    along = tl.cdiv(units, UNITS)
    for index in tl.range(
        tl.program_id(0), down * along, tl.num_programs(0),
        flatten=FLATTEN, warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        block, column = place(index, down, along, GROUP)
        row = block * TOKENS
        column *= UNITS
        d_hidden = tl.zeros((TOKENS, UNITS), tl.float32)
        for step in tl.range(0, tl.cdiv(d_out, DEEP)):
            deep = step * DEEP
            rows = load(grad, row, deep, grad_stride, tokens, d_out, TOKENS, DEEP, DESCRIPTORS)
            weights = load(
                weight, deep, column, weight_stride, d_out, units, DEEP, UNITS, DESCRIPTORS
            )  # fmt: skip
            d_hidden = tl.dot(rows, weights, d_hidden, input_precision=PRECISION)
        finish(
            d_hidden, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
            None, None, block, row, column, tokens, units, 0,
            gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_stride,
            PHI, PSI, STEP0, STEP1, STEP2, TOKENS, UNITS, SUBTILES, BRANCH_DESCRIPTORS, ROUGH,
        )  # fmt: skip


def branch_gradients(
    grad: Tensor,
    down_weight: Tensor,
    saved_gate: Tensor,
    saved_up: Tensor | None,
    variant: str,
    parameters: Mapping[str, Value],
    d_gate: Tensor | None,
    d_up: Tensor | None,
    hidden: Tensor | None,
    learned: Collection[str] = (),
    config: Config | None = None,
) -> dict[str, Tensor]:
    """Writes the gradients of the branches and the hidden values, of those that have a place.

    grad (tokens, d_out), down_weight (d_out, units), all else (tokens, units), each of any row
    stride. A gradient's place may be the memory of the branch that it belongs to. The call is one
    that the table of ways has nothing against.

    Args:
        learned: the parameters whose gradients are wanted.
        config: None takes the best of the table's.

    Returns:
        The float64 sums over the tokens of those gradients, one for each unit, by name.

    Raises:
        ShapeError: the tensors do not fit together.
        BackendError: `config` reads its operands in a way that these tensors do not allow.
    """
    (tokens, d_out), units = grad.shape, down_weight.shape[1]
    branches = (saved_gate, saved_up, d_gate, d_up, hidden)
    tiles.check_branches(variant, saved_up, d_up)
    of = (tokens, units)
    tiles.check(
        grad,
        ("the weight", down_weight, (d_out, units)),
        ("the gate", saved_gate, of),
        ("the up branch", saved_up, of),
        ("the place of the gate's gradient", d_gate, of),
        ("the place of the up branch's gradient", d_up, of),
        ("the place of the hidden values", hidden, of),
    )
    allowed: Operands = "joined" if tiles.have_descriptors(grad, down_weight) else "pointers"

    def again(config: Config) -> None:
        """Elsewhere: a gradient's place may be what it is made of."""
        made = [None if t is None else torch.empty_like(t) for t in (d_gate, d_up, hidden)]
        given = (grad, down_weight, saved_gate, saved_up, variant, parameters)
        branch_gradients(*given, made[0], made[1], made[2], learned, config)

    config = configs.chosen("branch_gradients", config, allowed, grad, of, again)
    config = tiles.parted(config, branches)
    formula = gpu.describe(variant, parameters)
    down = triton.cdiv(tokens, config.tokens)
    sums = {
        name: torch.empty(down, units, dtype=torch.float32, device=grad.device) for name in learned
    }
    operands: tuple[Any, ...] = grad, down_weight
    if config.operands != "pointers":
        operands = (
            tiles.descriptor(grad, config.tokens, config.deep),
            tiles.descriptor(down_weight, config.deep, config.units),
        )
    met = tiles.places(branches, config)
    count = down * triton.cdiv(units, config.units)
    with gpu.on_device_of(grad):
        branch_gradients_kernel[(tiles.programs(count, config.for_each, grad.device),)](
            *operands,
            *met,
            *[*(sums.get(name) for name in formula.of_phi), None, None][:2],
            *formula.values(),
            tokens,
            units,
            d_out,
            *(tiles.stride(t) for t in (grad, down_weight, *branches)),
            **formula.constants(),
            TOKENS=config.tokens,
            UNITS=config.units,
            DEEP=config.deep,
            GROUP=config.group,
            SUBTILES=config.subtiles,
            PRECISION="tf32" if gpu.kind_of(grad.dtype) == "tf32" else "ieee",
            DESCRIPTORS=config.operands != "pointers",
            BRANCH_DESCRIPTORS=met[0] is not saved_gate,
            ROUGH=grad.dtype != torch.float32,
            FLATTEN=config.flatten,
            SPECIALIZE=config.specialize,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return {name: parts.sum(0, dtype=torch.float64) for name, parts in sums.items()}
