"""The Triton kernels of gating: forward and backward, for every row of the table.

A program computes a tile of some rows and columns, element by element, in float32. Rows lie any
stride apart. A gate and an up branch that take turns in one tensor, a PAIR, are read together, and
their gradients written together.
"""

import triton
import triton.language as tl

from gatedffn.activations import gpu as functions


@triton.jit
def _load(at, row, stride, column, inside):
    offsets = row[:, None] * stride + column[None, :]
    return tl.load(at + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(at, row, stride, column, inside, values):
    offsets = row[:, None] * stride + column[None, :]
    tl.store(at + offsets, values.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _load_pair(
    at,
    row,
    stride,
    start,
    rows,
    columns,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Two matrices that take turns, column by column; the one is FIRST if that is 0."""
    column = start * 2 + tl.arange(0, 2 * COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < 2 * columns)
    both = _load(at, row, stride, column, inside)
    even, odd = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    if FIRST != 0:
        even, odd = odd, even
    return even, odd


@triton.jit
def _store_pair(
    at,
    row,
    stride,
    start,
    rows,
    columns,
    one,
    other,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = start * 2 + tl.arange(0, 2 * COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < 2 * columns)
    both = tl.join(one, other) if FIRST == 0 else tl.join(other, one)
    _store(at, row, stride, column, inside, tl.reshape(both, (ROWS, 2 * COLUMNS)))


@triton.jit
def forward(
    gate, up, hidden, p0, p1, p2,
    gate_stride, up_stride, hidden_stride, rows, columns,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    PAIR: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ROUGH: tl.constexpr = gate.dtype.element_ty != tl.float32
    # UNIT divides these; said so that the compiler sees it.
    gate_stride = gate_stride // UNIT * UNIT
    up_stride = up_stride // UNIT * UNIT
    hidden_stride = hidden_stride // UNIT * UNIT
    columns = columns // UNIT * UNIT
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = (program % across).to(tl.int64) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    of_column = column[None, :] < columns
    q0 = functions.parameter(p0, STEP0, column[None, :], of_column)
    q1 = functions.parameter(p1, STEP1, column[None, :], of_column)
    if PAIR is not None:
        x, other = _load_pair(gate, row, gate_stride, start, rows, columns, PAIR, ROWS, COLUMNS)
    else:
        x = _load(gate, row, gate_stride, column, inside)
        other = x
        if PSI is not None:
            other = _load(up, row, up_stride, column, inside)
    made = functions.value(x, q0, q1, PHI, ROUGH)
    if PSI is not None:
        q2 = functions.parameter(p2, STEP2, column[None, :], of_column)
        made = made * functions.value(other, q2, q2, PSI, ROUGH)
    _store(hidden, row, hidden_stride, column, inside, made)


@triton.jit
def backward(
    grad, gate, up, d_gate, d_up, hidden, sums0, sums1, p0, p1, p2,
    grad_stride, gate_stride, up_stride, d_gate_stride, d_up_stride,
    hidden_stride, rows, columns, walk,
    PHI: tl.constexpr, PSI: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    PAIR: tl.constexpr, D_PAIR: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ROUGH: tl.constexpr = gate.dtype.element_ty != tl.float32
    grad_stride = grad_stride // UNIT * UNIT
    gate_stride = gate_stride // UNIT * UNIT
    up_stride = up_stride // UNIT * UNIT
    d_gate_stride = d_gate_stride // UNIT * UNIT
    d_up_stride = d_up_stride // UNIT * UNIT
    hidden_stride = hidden_stride // UNIT * UNIT
    columns = columns // UNIT * UNIT
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    share = (program // across).to(tl.int64)
    start = (program % across).to(tl.int64) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    of_column = column[None, :] < columns
    q0 = functions.parameter(p0, STEP0, column[None, :], of_column)
    q1 = functions.parameter(p1, STEP1, column[None, :], of_column)
    q2 = functions.parameter(p2, STEP2, column[None, :], of_column)
    total0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    total1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(walk):
        row = (share * walk + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & of_column
        through = _load(grad, row, grad_stride, column, inside)
        if PAIR is not None:
            x, other = _load_pair(gate, row, gate_stride, start, rows, columns, PAIR, ROWS, COLUMNS)
        else:
            x = _load(gate, row, gate_stride, column, inside)
            other = x
            if PSI is not None:
                other = _load(up, row, up_stride, column, inside)
        made, slope = functions.both(x, q0, q1, PHI, ROUGH)
        if PSI is not None:
            other, other_slope = functions.both(other, q2, q2, PSI, ROUGH)
            d_other = through * made * other_slope
            through = through * other
            made = made * other
        d_x = through * slope
        if D_PAIR is not None:
            _store_pair(
                d_gate, row, d_gate_stride, start, rows, columns, d_x, d_other,
                D_PAIR, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            if d_gate is not None:
                _store(d_gate, row, d_gate_stride, column, inside, d_x)
            if d_up is not None:
                _store(d_up, row, d_up_stride, column, inside, d_other)
        if hidden is not None:
            _store(hidden, row, hidden_stride, column, inside, made)
        if sums0 is not None:
            total0 += through * functions.by(x, q0, q1, PHI, 0, ROUGH)
        if sums1 is not None:
            total1 += through * functions.by(x, q0, q1, PHI, 1, ROUGH)
    at = share * columns + column
    if sums0 is not None:
        tl.store(sums0 + at, tl.sum(total0, 0), mask=column < columns)
    if sums1 is not None:
        tl.store(sums1 + at, tl.sum(total1, 0), mask=column < columns)
