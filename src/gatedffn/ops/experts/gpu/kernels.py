"""The kernels of experts on GPUs; see routes.py for what they are given and products.py for the
launches.

Rows are slots, sorted by expert, each expert's from `starts` of it on. A program takes a block of
rows of one expert, and a block beyond the last is left at once. What a slot is given lies in the
row of its token, and is gathered where it is loaded. Weights may have any strides; they are read
as (expert, unit, deep), `deep` being summed over. All sums are float32.
"""

import triton
import triton.language as tl

from gatedffn.ops.feed_forward.gpu import fused, fused_backward
from gatedffn.ops.feed_forward.gpu.tiles import place


@triton.jit
def blocks_kernel(starts, blocks, experts, most, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of each block the expert, and behind those the first row of each; a block beyond the last has
    no expert.
    """
    expert = tl.arange(0, EXPERTS)
    within = expert < experts
    start = tl.load(starts + expert, mask=within, other=0)
    stop = tl.load(starts + expert + 1, mask=within, other=0)
    count = tl.cdiv(stop - start, ROWS)
    end = tl.cumsum(count, 0)
    for i in tl.range(0, tl.max(count, 0)):
        at = blocks + end - count + i
        tl.store(at, expert, mask=i < count)
        tl.store(at + most, start + i * ROWS, mask=i < count)
    for i in tl.range(tl.max(end, 0), most, EXPERTS):
        tl.store(blocks + i + expert, expert * 0 + experts, mask=i + expert < most)


@triton.jit
def _rows(first, stop, order, slots, ROWS: tl.constexpr):
    """The rows of a block, which of them there are, their slots and tokens."""
    row = first + tl.arange(0, ROWS)[:, None]
    inside = row < stop
    slot = tl.load(order + row, mask=inside, other=0).to(tl.int32)
    return row.to(tl.int64), inside, slot.to(tl.int64), (slot // slots).to(tl.int64)


@triton.jit
def _along(at, inside, deep, end, DEEP: tl.constexpr):
    """The next numbers of some rows."""
    along = deep + tl.arange(0, DEEP)[None, :]
    return tl.load(at + along, mask=inside & (along < end), other=0.0)


@triton.jit
def _weight(at, within, deep, end, stride, DEEP: tl.constexpr):
    """The next of what is summed over of some units of a weight, (DEEP, units)."""
    down = deep + tl.arange(0, DEEP)[:, None]
    return tl.load(at + down.to(tl.int64) * stride, mask=within & (down < end), other=0.0)


@triton.jit
def _units(weight, expert, expert_stride, column, unit_stride, UNITS: tl.constexpr):
    """The places of some units of an expert, and their numbers."""
    columns = column + tl.arange(0, UNITS)[None, :]
    return weight + expert.to(tl.int64) * expert_stride + columns.to(
        tl.int64
    ) * unit_stride, columns


@triton.jit
def _weighed(rows, weights, slot, inside):
    """Rows times the weights of their slots, rounded to their dtype."""
    scale = tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
    return (rows.to(tl.float32) * scale).to(rows.dtype)


@triton.jit
def hidden_kernel(
    order, starts, blocks, x, weights, gate, up, gate_bias, up_bias, hidden, out_gate, out_up,
    p0, p1, p2, most, experts, slots, d_hidden, d_model, x_stride,
    gate_expert, gate_unit, gate_deep, up_expert, up_unit, up_deep,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr,
    SUBTILES: tl.constexpr, PRECISION: tl.constexpr, ROUGH: tl.constexpr,
):  # fmt: skip
    """The hidden values, gate and up of each row, of those that have a place."""
    block, column = place(tl.program_id(0), most, tl.cdiv(d_hidden, UNITS), GROUP)
    expert = tl.load(blocks + block)
    if expert >= experts:
        return
    column *= UNITS
    first, stop = tl.load(blocks + most + block), tl.load(starts + expert + 1)
    _, inside, slot, token = _rows(first, stop, order, slots, ROWS)
    at = x + token * x_stride
    gate_at, columns = _units(gate, expert, gate_expert, column, gate_unit, UNITS)
    up_at = gate_at
    if PSI is not None:
        up_at, _ = _units(up, expert, up_expert, column, up_unit, UNITS)
    within = columns < d_hidden
    a = tl.zeros((ROWS, UNITS), tl.float32)
    b = a
    for step in tl.range(0, tl.cdiv(d_model, DEEP)):
        deep = step * DEEP
        rows = _along(at, inside, deep, d_model, DEEP)
        if weights is not None:
            rows = _weighed(rows, weights, slot, inside)
        tile = _weight(gate_at, within, deep, d_model, gate_deep, DEEP)
        a = tl.dot(rows, tile, a, input_precision=PRECISION)
        if PSI is not None:
            tile = _weight(up_at, within, deep, d_model, up_deep, DEEP)
            b = tl.dot(rows, tile, b, input_precision=PRECISION)
    if gate_bias is not None:
        gate_bias += expert.to(tl.int64) * d_hidden
    if up_bias is not None:
        up_bias += expert.to(tl.int64) * d_hidden
    fused.finish(
        a, b, gate_bias, up_bias, hidden, out_gate, out_up,
        p0, p1, p2, first, column, stop, d_hidden, d_hidden, d_hidden, d_hidden,
        PHI, PSI, STEP0, STEP1, STEP2, ROWS, UNITS, SUBTILES, False, ROUGH,
    )  # fmt: skip


@triton.jit
def product_kernel(
    order, starts, blocks, one, one_weight, other, other_weight, bias, out, x, dots,
    most, experts, slots, units, deeps, apart, x_stride,
    one_expert, one_unit, one_deep, other_expert, other_unit, other_deep, bias_expert,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The product of each row with its expert's weight, and of another row with another added, in
    the place of its slot. `dots` has places for what it gives times the row of `x`.
    """
    block, part = place(tl.program_id(0), most, tl.cdiv(units, UNITS), GROUP)
    expert = tl.load(blocks + block)
    if expert >= experts:
        return
    column = part * UNITS
    first, stop = tl.load(blocks + most + block), tl.load(starts + expert + 1)
    row, inside, slot, token = _rows(first, stop, order, slots, ROWS)
    row *= deeps
    one_at, columns = _units(one_weight, expert, one_expert, column, one_unit, UNITS)
    other_at = one_at
    if other is not None:
        other_at, _ = _units(other_weight, expert, other_expert, column, other_unit, UNITS)
    within = columns < units
    made = tl.zeros((ROWS, UNITS), tl.float32)
    for step in tl.range(0, tl.cdiv(deeps, DEEP)):
        deep = step * DEEP
        rows = _along(one + row, inside, deep, deeps, DEEP)
        tile = _weight(one_at, within, deep, deeps, one_deep, DEEP)
        made = tl.dot(rows, tile, made, input_precision=PRECISION)
        if other is not None:
            rows = _along(other + row, inside, deep, deeps, DEEP)
            tile = _weight(other_at, within, deep, deeps, other_deep, DEEP)
            made = tl.dot(rows, tile, made, input_precision=PRECISION)
    if bias is not None:
        at = bias + expert.to(tl.int64) * bias_expert + columns
        made += tl.load(at, mask=within, other=0.0).to(tl.float32)
    if dots is not None:
        at = x + token * x_stride + columns
        meets = tl.load(at, mask=inside & within, other=0.0).to(tl.float32)
        sums = tl.sum(made * meets, axis=1)[:, None]
        tl.store(dots + part.to(tl.int64) * apart + slot, sums, mask=inside)
    if out is not None:
        tl.store(out + slot * units + columns, made, mask=inside & within)


@triton.jit
def sum_kernel(
    parts, index, weights, out, experts, slots, columns, out_stride, COLUMNS: tl.constexpr
):
    """The sum over the slots of a token, in their order, of those that have an expert here."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    for i in tl.range(0, slots):
        slot = token * slots + i
        expert = tl.load(index + slot)
        here = (expert >= 0) & (expert < experts)
        part = tl.load(parts + slot * columns + column, mask=within & here, other=0.0)
        if weights is not None:
            part *= tl.load(weights + slot, mask=here, other=0.0).to(tl.float32)
        total += part
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=within)


@triton.jit
def branch_gradients_kernel(
    order, starts, blocks, grad, weights, down, down_bias, gate, up, d_gate, d_up, hidden,
    sums0, sums1, dots, p0, p1, p2, most, experts, slots, d_hidden, d_out, apart, grad_stride,
    down_expert, down_unit, down_deep,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr,
    SUBTILES: tl.constexpr, PRECISION: tl.constexpr, ROUGH: tl.constexpr,
):  # fmt: skip
    """What the layer's kernel of this name writes, of each row; `weights` scale it, and `dots` have
    places for the gradients of these, of which that of `down_bias` is the last.
    """
    block, part = place(tl.program_id(0), most, tl.cdiv(d_hidden, UNITS), GROUP)
    expert = tl.load(blocks + block)
    if expert >= experts:
        return
    column = part * UNITS
    first, stop = tl.load(blocks + most + block), tl.load(starts + expert + 1)
    _, inside, slot, token = _rows(first, stop, order, slots, ROWS)
    at = grad + token * grad_stride
    down_at, columns = _units(down, expert, down_expert, column, down_unit, UNITS)
    within = columns < d_hidden
    d_hidden_tile = tl.zeros((ROWS, UNITS), tl.float32)
    of_bias = tl.zeros((ROWS, 1), tl.float32)
    if down_bias is not None:
        bias_at = down_bias + expert.to(tl.int64) * d_out
    for step in tl.range(0, tl.cdiv(d_out, DEEP)):
        deep = step * DEEP
        rows = _along(at, inside, deep, d_out, DEEP)
        tile = _weight(down_at, within, deep, d_out, down_deep, DEEP)
        d_hidden_tile = tl.dot(rows, tile, d_hidden_tile, input_precision=PRECISION)
        if down_bias is not None:
            along = deep + tl.arange(0, DEEP)[None, :]
            biases = tl.load(bias_at + along, mask=along < d_out, other=0.0).to(tl.float32)
            of_bias += tl.sum(rows.to(tl.float32) * biases, axis=1)[:, None]
    scale = None
    if weights is not None:
        scale = tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
    places = None
    if dots is not None:
        places = dots + slot
        if down_bias is not None:
            last = places + (tl.cdiv(d_hidden, UNITS) * SUBTILES).to(tl.int64) * apart
            tl.store(last, of_bias, mask=inside & (part == 0))
    fused_backward.finish(
        d_hidden_tile, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
        scale, places, block, first, column, stop, d_hidden, apart,
        d_hidden, d_hidden, d_hidden, d_hidden, d_hidden,
        PHI, PSI, STEP0, STEP1, STEP2, ROWS, UNITS, SUBTILES, False, ROUGH,
    )  # fmt: skip


@triton.jit
def weight_gradient_kernel(
    order, starts, rows, given, weights, out, slots, units, deeps, given_stride,
    out_expert, out_unit, out_deep,
    UNITS: tl.constexpr, DEEPS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of each expert's weight: of its rows and of what their slots were given."""
    along = tl.cdiv(deeps, DEEPS)
    unit = tl.program_id(0) // along * UNITS + tl.arange(0, UNITS)[:, None]
    deep = tl.program_id(0) % along * DEEPS + tl.arange(0, DEEPS)[None, :]
    expert = tl.program_id(1)
    stop = tl.load(starts + expert + 1)
    total = tl.zeros((UNITS, DEEPS), tl.float32)
    for first in tl.range(tl.load(starts + expert), stop, ROWS):
        row, inside, slot, token = _rows(first, stop, order, slots, ROWS)
        at = given + token * given_stride + deep
        b = tl.load(at, mask=inside & (deep < deeps), other=0.0)
        if weights is not None:
            b = _weighed(b, weights, slot, inside)
        row = first + tl.arange(0, ROWS)[None, :]
        at = rows + row.to(tl.int64) * units + unit
        a = tl.load(at, mask=(row < stop) & (unit < units), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = out + expert.to(tl.int64) * out_expert
    at += unit.to(tl.int64) * out_unit + deep.to(tl.int64) * out_deep
    tl.store(at, total.to(out.dtype.element_ty), mask=(unit < units) & (deep < deeps))


@triton.jit
def bias_gradient_kernel(
    order, starts, rows, weights, out, slots, columns, rows_stride, out_expert, out_column,
    GATHERED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over each expert's rows; GATHERED are those of tokens, times the slots' weights."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    expert = tl.program_id(1)
    stop = tl.load(starts + expert + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.load(starts + expert), stop, ROWS):
        row, inside, slot, token = _rows(first, stop, order, slots, ROWS)
        at = row
        if GATHERED:
            at = token
        part = tl.load(
            rows + at * rows_stride + column, mask=inside & (column < columns), other=0.0
        ).to(tl.float32)
        if weights is not None:
            part *= tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
        total += part
    at = out + expert.to(tl.int64) * out_expert + column.to(tl.int64) * out_column
    made = tl.sum(total, 0)[None, :].to(out.dtype.element_ty)
    tl.store(at, made, mask=column < columns)
