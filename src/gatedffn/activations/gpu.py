"""The scalar functions of reference.py for kernels: each one once, as a value and a slope that
share their work. A kernel that asks for one of them pays for no more, as the compiler drops the
rest. Triton compiles this file, and `translation.py` makes the C++ and the JavaScript of it.

All is float32 blocks. A parameter is a number or a block that broadcasts; a function that has
fewer than two leaves `p0` and `p1` alone. A NaN stays a NaN, and at the infinities a function has
its limit. What ROUGH means is in elementary.py.

A function is named as in the table, and so is its derivative by a parameter: `swish_by_beta`.
"""

import triton
import triton.language as tl

from gatedffn.activations import elementary as el
from gatedffn.activations import reference

HARD_SWISH_END = tl.constexpr(reference.HARD_SWISH_END)
SELU_ALPHA = tl.constexpr(reference.SELU_ALPHA)
SELU_SCALE = tl.constexpr(reference.SELU_SCALE)
TANH_GELU_CUBIC = tl.constexpr(reference.TANH_GELU_CUBIC)
TANH_GELU_END = tl.constexpr(reference.TANH_GELU_END)
TANH_GELU_SCALE = tl.constexpr(reference.TANH_GELU_SCALE)
XIELU_SLOPE = tl.constexpr(reference.XIELU_SLOPE)


# what several share


@triton.jit
def finite(x):
    """`x` with the infinities moved to the largest numbers, so that 0 * x is 0."""
    return el.clamp(-el.LARGEST, el.LARGEST, x)


@triton.jit
def damped(x, factor):
    """`x * factor`, where a factor that has vanished wins over an infinite `x`."""
    return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def step(x):
    return tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))


# the functions of the table: value and slope


@triton.jit
def identity(x):
    return x, el.full(1.0, x)


@triton.jit
def relu(x):
    return el.max(0.0, x), step(x)


@triton.jit
def relu2(x):
    above = el.max(0.0, x)
    return above * above, 2.0 * above


@triton.jit
def leaky_relu(x, slope):
    above = step(x)
    return tl.where(x > 0.0, x, el.min(0.0, x) * slope), above + (1.0 - above) * slope


@triton.jit
def leaky_relu_by_slope(x, slope):
    return el.min(0.0, x)


@triton.jit
def sigmoid(x, ROUGH: tl.constexpr):
    _, at, slope, _ = el.sigmoids(x, ROUGH)
    return at, slope


@triton.jit
def tanh(x, ROUGH: tl.constexpr):
    at, slope = el.tanh_and_slope(x, ROUGH)
    return at, slope


@triton.jit
def softplus(x, ROUGH: tl.constexpr):
    e = el.exp_below(-tl.abs(x), ROUGH)
    slope = tl.where(x < 0.0, e, 1.0) * el.reciprocal_after_one(e, ROUGH)
    return el.max(0.0, x) + el.log1p(e), slope


@triton.jit
def swish(x, beta, ROUGH: tl.constexpr):
    z, at, bend, _ = el.sigmoids(finite(x) * beta, ROUGH)
    return damped(x, at), at + z * bend


@triton.jit
def swish_by_beta(x, beta, ROUGH: tl.constexpr):
    within = finite(x)
    _, _, bend, _ = el.sigmoids(within * beta, ROUGH)
    return within * (within * bend)


@triton.jit
def capped_swish(x, beta, limit, ROUGH: tl.constexpr):
    value, slope = swish(el.min(limit, x), beta, ROUGH)
    return value, tl.where(x > limit, 0.0, slope)


@triton.jit
def capped_swish_by_beta(x, beta, limit, ROUGH: tl.constexpr):
    return swish_by_beta(el.min(limit, x), beta, ROUGH)


@triton.jit
def mish(x, ROUGH: tl.constexpr):
    # tanh(log(1 + e^x)) is n / (n + 2) with n = e^x (e^x + 2); above 0 of e^-x, which is below 1.
    e = el.exp_below(-tl.abs(x), ROUGH)
    top = tl.where(x < 0.0, e * (e + 2.0), 1.0 + 2.0 * e)
    rest = tl.where(x < 0.0, 2.0, 2.0 * e * e)
    at = el.divided(top, top + rest, ROUGH)
    tail = el.divided(rest, top + rest, ROUGH)
    rise = tl.where(x < 0.0, e, 1.0) * el.reciprocal_after_one(e, ROUGH)
    return damped(x, at), at + finite(x) * rise * tail * (1.0 + at)


@triton.jit
def hard_swish(x):
    at = el.clamp(0.0, 2.0 * HARD_SWISH_END, x + HARD_SWISH_END) / (2.0 * HARD_SWISH_END)
    between = (2.0 * x + HARD_SWISH_END) / (2.0 * HARD_SWISH_END)
    below = tl.where(x <= -HARD_SWISH_END, 0.0, between)
    return damped(x, at), tl.where(x >= HARD_SWISH_END, 1.0, below)


@triton.jit
def gelu(x, ROUGH: tl.constexpr):
    cdf, pdf = el.normal(x, ROUGH)
    return damped(x, cdf), cdf + finite(x) * pdf


@triton.jit
def gelu_tanh(x, ROUGH: tl.constexpr):
    near = el.clamp(-TANH_GELU_END, TANH_GELU_END, x)
    square = near * near
    z = near * (square * (TANH_GELU_SCALE * TANH_GELU_CUBIC) + TANH_GELU_SCALE)
    by_x = square * (3.0 * (TANH_GELU_SCALE * TANH_GELU_CUBIC)) + TANH_GELU_SCALE
    _, at, bend, _ = el.sigmoids(z, ROUGH)
    return damped(x, at), at + near * bend * by_x


@triton.jit
def elu(x, alpha, ROUGH: tl.constexpr):
    below = el.min(0.0, x)
    value = tl.where(x > 0.0, x, el.expm1(below) * alpha)
    return value, tl.where(x > 0.0, 1.0, el.exp_below(below, ROUGH) * alpha)


@triton.jit
def selu(x, ROUGH: tl.constexpr):
    value, slope = elu(x, SELU_ALPHA, ROUGH)
    return value * SELU_SCALE, slope * SELU_SCALE


@triton.jit
def xielu(x, alpha_p, alpha_n):
    below = el.min(0.0, x)
    curve = alpha_n * el.expm1(below)
    # Written so that at minus infinity no infinity is subtracted from another.
    negative = curve - (alpha_n - XIELU_SLOPE) * below
    value = tl.where(x > 0.0, x * (alpha_p * x + XIELU_SLOPE), negative)
    return value, tl.where(x > 0.0, 2.0 * alpha_p * x, curve) + XIELU_SLOPE


@triton.jit
def xielu_by_alpha_p(x, alpha_p, alpha_n):
    above = el.max(0.0, x)
    return above * above


@triton.jit
def xielu_by_alpha_n(x, alpha_p, alpha_n):
    below = el.min(0.0, x)
    # Near 0 the difference would cancel.
    near = below * below * el.exp_rest(below)
    return tl.where(below > -0.34, near, el.expm1(below) - below)


@triton.jit
def situ(x, gate_cap, ROUGH: tl.constexpr):
    cap, bend = soft_cap(x, gate_cap, ROUGH)
    _, at, _, opposite = el.sigmoids(x, ROUGH)
    return cap * at, at * (bend + cap * opposite)


@triton.jit
def pow_gate(x, m, ROUGH: tl.constexpr):
    # x^exponent sigmoid(x) above 0, with exponent = m / (sqrt(x) + 1)
    g = tl.where(x > 0.0, el.clamp(el.SMALLEST, el.LARGEST, x), 1.0)
    root = el.sqrt(g, ROUGH)
    exponent = el.divided(m, root + 1.0, ROUGH)
    by_root = el.divided(-exponent, 2.0 * root * (root + 1.0), ROUGH)
    power = el.pow(g, exponent, ROUGH)
    z, at, bend, opposite = el.sigmoids(x, ROUGH)
    by_exponent = power * (by_root * el.log(g, ROUGH) + opposite)
    by_base = exponent * el.pow(g, exponent - 1.0, ROUGH)
    value = tl.where(x > 0.0, power * at, damped(x, at))
    return value, tl.where(x > 0.0, at * (by_exponent + by_base), at + z * bend)


@triton.jit
def expanded_swish(x, alpha, ROUGH: tl.constexpr):
    more = 1.0 + 2.0 * alpha
    z, at, bend, _ = el.sigmoids(x, ROUGH)
    return damped(x, at * more - alpha), (at + z * bend) * more - alpha


@triton.jit
def expanded_swish_by_alpha(x, alpha, ROUGH: tl.constexpr):
    at, _ = el.tanh_and_slope(0.5 * x, ROUGH)
    return x * at


@triton.jit
def expanded_gelu(x, alpha, ROUGH: tl.constexpr):
    more = 1.0 + 2.0 * alpha
    cdf, pdf = el.normal(x, ROUGH)
    return damped(x, cdf * more - alpha), (cdf + finite(x) * pdf) * more - alpha


@triton.jit
def expanded_gelu_by_alpha(x, alpha, ROUGH: tl.constexpr):
    return x * el.normal_erf(x, ROUGH)


@triton.jit
def clip(x, limit):
    slope = tl.where(tl.abs(x) > limit, 0.0, tl.where(x != x, x, 1.0))
    return el.max(-limit, el.min(limit, x)), slope


@triton.jit
def clip_plus_one(x, limit):
    value, slope = clip(x, limit)
    return value + 1.0, slope


@triton.jit
def soft_cap(x, up_cap, ROUGH: tl.constexpr):
    at, slope = el.tanh_and_slope(x / up_cap, ROUGH)
    return up_cap * at, slope


# what kernels call


@triton.jit
def parameter(p, STEP: tl.constexpr, columns, inside):
    """A parameter of a kernel: a number (STEP None), or a pointer to one value (0) or to one a
    hidden unit (1), of which those at `columns` are loaded where `inside`.
    """
    if STEP is None:
        loaded = p
    elif STEP == 0:
        loaded = tl.load(p).to(tl.float32)
    else:
        loaded = tl.load(p + columns, mask=inside, other=1.0).to(tl.float32)
    return loaded


@triton.jit
def both(x, p0, p1, NAME: tl.constexpr, ROUGH: tl.constexpr = False):
    """The function NAME of the table at `x`: its value and its slope."""
    value = x
    slope = x
    if NAME == "identity":
        value, slope = identity(x)
    elif NAME == "relu":
        value, slope = relu(x)
    elif NAME == "relu2":
        value, slope = relu2(x)
    elif NAME == "leaky_relu":
        value, slope = leaky_relu(x, p0)
    elif NAME == "sigmoid":
        value, slope = sigmoid(x, ROUGH)
    elif NAME == "tanh":
        value, slope = tanh(x, ROUGH)
    elif NAME == "softplus":
        value, slope = softplus(x, ROUGH)
    elif NAME == "swish":
        value, slope = swish(x, p0, ROUGH)
    elif NAME == "capped_swish":
        value, slope = capped_swish(x, p0, p1, ROUGH)
    elif NAME == "mish":
        value, slope = mish(x, ROUGH)
    elif NAME == "hard_swish":
        value, slope = hard_swish(x)
    elif NAME == "gelu":
        value, slope = gelu(x, ROUGH)
    elif NAME == "gelu_tanh":
        value, slope = gelu_tanh(x, ROUGH)
    elif NAME == "elu":
        value, slope = elu(x, p0, ROUGH)
    elif NAME == "selu":
        value, slope = selu(x, ROUGH)
    elif NAME == "xielu":
        value, slope = xielu(x, p0, p1)
    elif NAME == "situ":
        value, slope = situ(x, p0, ROUGH)
    elif NAME == "pow_gate":
        value, slope = pow_gate(x, p0, ROUGH)
    elif NAME == "expanded_swish":
        value, slope = expanded_swish(x, p0, ROUGH)
    elif NAME == "expanded_gelu":
        value, slope = expanded_gelu(x, p0, ROUGH)
    elif NAME == "clip":
        value, slope = clip(x, p0)
    elif NAME == "clip_plus_one":
        value, slope = clip_plus_one(x, p0)
    elif NAME == "soft_cap":
        value, slope = soft_cap(x, p0, ROUGH)
    else:
        tl.static_assert(False, "activations/gpu.py lacks the function " + NAME)
    return value, slope


@triton.jit
def value(x, p0, p1, NAME: tl.constexpr, ROUGH: tl.constexpr = False):
    """The function NAME of the table at `x`."""
    at, _ = both(x, p0, p1, NAME, ROUGH)
    return at


@triton.jit
def by(x, p0, p1, NAME: tl.constexpr, WHICH: tl.constexpr, ROUGH: tl.constexpr = False):
    """The derivative at `x` of the function NAME by its parameter WHICH, 0 or 1."""
    slope = x
    if NAME == "leaky_relu" and WHICH == 0:
        slope = leaky_relu_by_slope(x, p0)
    elif NAME == "swish" and WHICH == 0:
        slope = swish_by_beta(x, p0, ROUGH)
    elif NAME == "capped_swish" and WHICH == 0:
        slope = capped_swish_by_beta(x, p0, p1, ROUGH)
    elif NAME == "xielu" and WHICH == 0:
        slope = xielu_by_alpha_p(x, p0, p1)
    elif NAME == "xielu" and WHICH == 1:
        slope = xielu_by_alpha_n(x, p0, p1)
    elif NAME == "expanded_swish" and WHICH == 0:
        slope = expanded_swish_by_alpha(x, p0, ROUGH)
    elif NAME == "expanded_gelu" and WHICH == 0:
        slope = expanded_gelu_by_alpha(x, p0, ROUGH)
    else:
        tl.static_assert(False, "activations/gpu.py lacks a derivative by a parameter of " + NAME)
    return slope
