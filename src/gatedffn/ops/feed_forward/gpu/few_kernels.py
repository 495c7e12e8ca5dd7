"""The kernels of the layer for few tokens; see few.py."""

import triton
import triton.language as tl

from gatedffn.activations.gpu import parameter, value

# What changes from call to call is not compiled for.
_ANY_VALUE = ["tokens", "x_units", "out_rows"]
_ANY_ADDRESS = ["gate_bias", "up_bias", "p0", "p1", "p2", "out"]


@triton.jit
def _hidden(
    a,
    b,
    rows,
    inside,
    gate_bias,
    up_bias,
    p0,
    p1,
    p2,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    PHI: tl.constexpr,
    PSI: tl.constexpr,
    STEP0: tl.constexpr,
    STEP1: tl.constexpr,
    STEP2: tl.constexpr,
):
    """phi(a + bias) * psi(b + bias) from the sums; a bias has the stride that is named like it."""
    at = rows.to(tl.int64)
    if GATE_BIAS is not None:
        a += tl.load(gate_bias + at * GATE_BIAS, mask=inside, other=0.0).to(tl.float32)
    p0 = parameter(p0, STEP0, rows, inside)
    p1 = parameter(p1, STEP1, rows, inside)
    hidden = value(a, p0, p1, PHI)
    if PSI is not None:
        if UP_BIAS is not None:
            b += tl.load(up_bias + at * UP_BIAS, mask=inside, other=0.0).to(tl.float32)
        hidden *= value(b, parameter(p2, STEP2, rows, inside), 0.0, PSI)
    return hidden


@triton.jit
def _weight(at, deep, DEEP: tl.constexpr, WHOLE: tl.constexpr):
    """A piece of some rows of a weight, which nobody reads again."""
    if WHOLE:
        return tl.load(at + deep[None, :], eviction_policy="evict_first")
    inside = (deep < DEEP)[None, :]
    return tl.load(at + deep[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _summed(w, x, VECTOR: tl.constexpr):
    """The products of a piece with a token, summed as far as one thread has them."""
    products = w.to(tl.float32) * x[None, :]
    groups: tl.constexpr = products.shape[1] // VECTOR
    return tl.sum(tl.reshape(products, [products.shape[0], groups, VECTOR]), 2)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def product(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    p0,
    p1,
    p2,
    out,
    tokens,
    x_units: tl.int64,
    out_rows: tl.int64,
    # the sizes of the weights and their row strides; x has one of x_units * X_UNIT
    ROWS: tl.constexpr,
    DEEP: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    X_UNIT: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    PHI: tl.constexpr,
    PSI: tl.constexpr,
    STEP0: tl.constexpr,
    STEP1: tl.constexpr,
    STEP2: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The hidden values of BLOCK_ROWS rows; split, the sums (split, branch, token, row) alone."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = (rows < ROWS)[:, None]
    # Beyond the last row it is read once more.
    row = tl.minimum(rows, ROWS - 1).to(tl.int64)[:, None]
    t = tl.arange(0, TOKENS)[None, :].to(tl.int64)
    WHOLE: tl.constexpr = DEEP == CHUNK * SPLITS
    begin = tl.program_id(1) * CHUNK
    if TOKENS == 1:
        a = tl.zeros([BLOCK_ROWS, BLOCK_DEEP // VECTOR], tl.float32)
        b = a
        for k in tl.range(0, CHUNK, BLOCK_DEEP, num_stages=STAGES, loop_unroll_factor=UNROLL):
            deep = begin + k + tl.arange(0, BLOCK_DEEP)
            here = deep < DEEP
            token = tl.load(x + deep, mask=here, other=0.0, eviction_policy="evict_last")
            token = token.to(tl.float32)
            w = _weight(gate + row * GATE, deep, DEEP, WHOLE)
            if PSI is not None:
                v = _weight(up + row * UP, deep, DEEP, WHOLE)
                b += _summed(v, token, VECTOR)
            a += _summed(w, token, VECTOR)
        a = tl.sum(a, 1)[:, None]
        b = tl.sum(b, 1)[:, None]
    else:
        a = tl.zeros([BLOCK_ROWS, TOKENS], tl.float32)
        b = a
        for k in tl.range(0, CHUNK, BLOCK_DEEP, num_stages=STAGES):
            deep = begin + k + tl.arange(0, BLOCK_DEEP)
            here = (deep < DEEP)[:, None] & (t < tokens)
            at = x + t * (x_units * X_UNIT) + deep[:, None]
            some = tl.load(at, mask=here, other=0.0, eviction_policy="evict_last")
            w = _weight(gate + row * GATE, deep, DEEP, WHOLE)
            a = tl.dot(w, some, a, input_precision=PRECISION)
            if PSI is not None:
                v = _weight(up + row * UP, deep, DEEP, WHOLE)
                b = tl.dot(v, some, b, input_precision=PRECISION)
    to = inside & (t < tokens)
    if SPLITS > 1:
        COUNT: tl.constexpr = 1 if PSI is None else 2
        at = out + (tl.program_id(1) * COUNT * tokens + t) * ROWS + rows[:, None]
        tl.store(at, a, mask=to)
        if PSI is not None:
            tl.store(at + tokens.to(tl.int64) * ROWS, b, mask=to)
    else:
        a = _hidden(
            *(a, b, rows[:, None], inside, gate_bias, up_bias, p0, p1, p2),
            *(GATE_BIAS, UP_BIAS, PHI, PSI, STEP0, STEP1, STEP2),
        )
        tl.store(out + t * out_rows + rows[:, None], a.to(out.dtype.element_ty), mask=to)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=[*_ANY_ADDRESS, "parts"])
def joined(
    parts,
    gate_bias,
    up_bias,
    p0,
    p1,
    p2,
    out,
    tokens,
    out_rows: tl.int64,
    ROWS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    PHI: tl.constexpr,
    PSI: tl.constexpr,
    STEP0: tl.constexpr,
    STEP1: tl.constexpr,
    STEP2: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The hidden values of one token from the sums of the splits, added in their order."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < ROWS
    token = tl.program_id(1).to(tl.int64)
    apart = tokens.to(tl.int64) * ROWS
    at = parts + token * ROWS + rows
    a = tl.zeros([BLOCK_ROWS], tl.float32)
    b = a
    for _ in tl.range(SPLITS):
        a += tl.load(at, mask=inside, other=0.0)
        at += apart
        if PSI is not None:
            b += tl.load(at, mask=inside, other=0.0)
            at += apart
    a = _hidden(
        *(a, b, rows, inside, gate_bias, up_bias, p0, p1, p2),
        *(GATE_BIAS, UP_BIAS, PHI, PSI, STEP0, STEP1, STEP2),
    )
    tl.store(out + token * out_rows + rows, a.to(out.dtype.element_ty), mask=inside)
