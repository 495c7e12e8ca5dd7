"""The scalar functions of reference.py in Triton: each one once, as a value and a slope that share
their work. A kernel that asks for one of them pays for no more, as the compiler drops the rest.

All is float32 blocks. A parameter is a number or a block that broadcasts; a function that has
fewer than two leaves `p0` and `p1` alone. A NaN stays a NaN, and at the infinities a function has
its limit. The polynomials are those of simd.h; they leave the exponential and the reciprocal as
the only operations that a GPU approximates, and the reciprocal's error is taken off again.

What is rounded to 16 bits afterwards may be ROUGH: the exponential and the reciprocal are then as
the chip has them, off by some units of float32, more where an exponential is very small or large.
"""

import math

import triton
import triton.language as tl

from gatedffn.activations import reference

LARGEST = tl.constexpr(3.4028234663852886e38)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number
TANH_GELU_SCALE = tl.constexpr(reference.TANH_GELU_SCALE)
TANH_GELU_CUBE = tl.constexpr(reference.TANH_GELU_SCALE * reference.TANH_GELU_CUBIC)
SELU_ALPHA = tl.constexpr(reference.SELU_ALPHA)
SELU_SCALE = tl.constexpr(reference.SELU_SCALE)
XIELU_SLOPE = tl.constexpr(reference.XIELU_SLOPE)

LOG2_E = tl.constexpr(math.log2(math.e))
LOG_2 = tl.constexpr(math.log(2.0))
# log(2) in two parts, of which the first times a whole number up to 2^15 is exact
LOG_2_HEAD = tl.constexpr(0.693359375)
LOG_2_REST = tl.constexpr(-2.12194440e-4)
# An addition of this rounds to a whole number n, with n + 127 in the lowest bits.
MAGIC = tl.constexpr(1.5 * 2.0**23 + 127.0)
TOO_LARGE = tl.constexpr(2.0**120)  # an e^-x that leaves nothing of a sigmoid
LOWEST = tl.constexpr(-87.3)  # the sigmoid of it is the smallest normal number, nearly
DENSITY_AT_0 = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
NO_DENSITY = tl.constexpr(13.2664992)  # the normal density is 0 there


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


# A minimum or a maximum in which a NaN stays


@triton.jit
def _min(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, low, high):
    return _min(_max(x, low), high)


@triton.jit
def _finite(x):
    """`x` with the infinities moved to the largest numbers, so that 0 * x is 0."""
    return _clamp(x, -LARGEST, LARGEST)


@triton.jit
def _damped(x, factor):
    """`x * factor`, where a factor that has vanished wins over an infinite `x`."""
    return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def _step(x):
    return tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))


@triton.jit
def _with_sign_of(size, x):
    return tl.where(x < 0.0, -size, size)


# elementary functions


@triton.jit
def _reduced(x):
    """e^x = 2^n e^r for |x| <= 88: n, r, and 2^n, which is 0 at -88."""
    total = x * LOG2_E + MAGIC
    n = total - MAGIC
    r = (x - n * LOG_2_HEAD) - n * LOG_2_REST
    return n, r, (total.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp_rest(r):
    """(e^r - 1 - r) / r^2 for |r| <= log(2) / 2, to 0.05 ulp of e^r."""
    high = (0.0013950602 * r + 0.008368953) * r + 0.041666206
    return (high * r + 0.16666518) * r + 0.5


@triton.jit
def _exp_below(x, ROUGH: tl.constexpr):
    """e^x for x <= 88; what is below the normal numbers is 0."""
    if ROUGH:
        e = tl.exp2(x * LOG2_E)
    else:
        _, r, power = _reduced(_max(x, -88.0))
        e = power * tl.exp2(r * LOG2_E)
    return e


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 88."""
    _, r, power = _reduced(_max(x, -88.0))
    return power * (r + r * r * _exp_rest(r)) + (power - 1.0)


@triton.jit
def _exp(x):
    """e^x of any x. At the ends the power of 2 is no normal number, so it is made of two."""
    n, r, _ = _reduced(_clamp(x, -104.0, 89.0))
    n = n.to(tl.int32)
    half = n >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp2(r * LOG2_E) * low * high


@triton.jit
def _reciprocal_after_one(e, ROUGH: tl.constexpr):
    """1 / (1 + e) for 0 <= e <= 2^126: its error is taken from the addends, so that neither the
    rounding of their sum nor an approximate division has a part in it.
    """
    r = 1.0 / (1.0 + e)
    if not ROUGH:
        r = r + r * ((1.0 - r) - r * e)
    return r


@triton.jit
def _log1p(x):
    """log(1 + x) = 2 atanh(s) for -0.3 <= x <= 1, to 0.1 ulp."""
    s = tl.div_rn(x, x + 2.0)
    square = s * s
    high = (0.28031275 * square + 0.27997863) * square + 0.4002177
    rest = square * (high * square + 0.6666641)
    return x - s * (x - rest)  # 2 s is x - s x, which has less rounding


@triton.jit
def _log(x):
    """log(x) of an x that is positive, normal and finite."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # so that what is left is between sqrt(1/2) and sqrt(2)
    left = (bits - (n << 23)).to(tl.float32, bitcast=True)
    power = n.to(tl.float32)
    return (_log1p(left - 1.0) + power * LOG_2_REST) + power * LOG_2_HEAD


@triton.jit
def _sigmoids(x, ROUGH: tl.constexpr):
    """`x` within the range in which a sigmoid changes, the sigmoid there, its slope, and the
    sigmoid of -x, which 1 less it would not give: that cancels.
    """
    near = _clamp(x, LOWEST, 88.0)
    if ROUGH:
        e = tl.exp2(x * -LOG2_E)
        at = 1.0 / (1.0 + e)
        opposite = tl.where(e > TOO_LARGE, 1.0, e * at)
        slope = at * opposite
    else:
        e = _exp_below(-near, ROUGH)
        r = _reciprocal_after_one(e, ROUGH)
        at = tl.where(near == LOWEST, 0.0, r)
        opposite = e * r
        tail = _min(at, opposite)
        # Near 1/2 an error of the tail has no part in this.
        slope = tail - tail * tail
    return near, at, slope, opposite


@triton.jit
def _tanh(x, ROUGH: tl.constexpr):
    """tanh, and its slope."""
    size = tl.abs(x)
    e = _exp_below(-2.0 * size, ROUGH)
    tail = e * _reciprocal_after_one(e, ROUGH)
    # 1 - 2 tail would cancel near 0: there by its own polynomial, to 0.05 ulp.
    square = x * x
    high = (-0.0055261897 * square + 0.02048106) * square - 0.05369226
    near = size + size * square * ((high * square + 0.13330892) * square - 0.33333263)
    size = tl.where(size < 0.65, near, 1.0 - 2.0 * tail)
    return _with_sign_of(size, x), 4.0 * (tail - tail * tail)


@triton.jit
def _normal(x, ROUGH: tl.constexpr):
    """The normal distribution: the probability below x, and the density there."""
    if ROUGH:
        a = _min(tl.abs(x), 20.0)
        e = tl.exp2(a * a * (-0.5 * LOG2_E))
    else:
        a = _min(tl.abs(x), NO_DENSITY)
        # a^2 in two parts, of which the first is exact: a rounding would be multiplied by a^2.
        head = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        _, r, power = _reduced(-0.5 * head * head)
        e = power * tl.exp2((r - 0.5 * (a - head) * (a + head)) * LOG2_E)
    # The tail over e^(-a^2 / 2), to 0.2 ulp with the coefficients rounded.
    above = (0.00403702352 * a + 0.0400982201) * a + 0.181646287
    above = (above * a + 0.436146826) * a + 0.5
    below = ((0.0101191793 * a + 0.100518532) * a + 0.46527645) * a + 1.19589806
    below = (below * a + 1.67017853) * a + 1.0
    tail = e * (above / below)
    return tl.where(x < 0.0, tail, 1.0 - tail), e * DENSITY_AT_0


@triton.jit
def _normal_erf(x, ROUGH: tl.constexpr):
    """erf(x / sqrt(2)); near 0 by its own polynomial, to 0.01 ulp, as 2 cdf(x) - 1 would cancel."""
    square = x * x
    high = (-1.5329359e-05 * square + 0.00022702532) * square - 0.002372706
    high = (high * square + 0.019946663) * square - 0.13298072
    near = x * (high * square + 0.7978846)
    size = tl.abs(x)
    below, _ = _normal(-size, ROUGH)
    return tl.where(size < 1.0, near, _with_sign_of(1.0 - 2.0 * below, x))


# the functions of the table: value and slope


@triton.jit
def _relu(x):
    return _max(x, 0.0), _step(x)


@triton.jit
def _relu2(x):
    above = _max(x, 0.0)
    return above * above, 2.0 * above


@triton.jit
def _leaky_relu(x, slope):
    step = _step(x)
    return tl.where(x > 0.0, x, _min(x, 0.0) * slope), step + (1.0 - step) * slope


@triton.jit
def _sigmoid(x, ROUGH: tl.constexpr):
    _, at, slope, _ = _sigmoids(x, ROUGH)
    return at, slope


@triton.jit
def _softplus(x, ROUGH: tl.constexpr):
    e = _exp_below(-tl.abs(x), ROUGH)
    slope = tl.where(x < 0.0, e, 1.0) * _reciprocal_after_one(e, ROUGH)
    return _max(x, 0.0) + _log1p(e), slope


@triton.jit
def _swish(x, beta, ROUGH: tl.constexpr):
    z, at, slope, _ = _sigmoids(_finite(x) * beta, ROUGH)
    return _damped(x, at), at + z * slope


@triton.jit
def _swish_by_beta(x, beta, ROUGH: tl.constexpr):
    x = _finite(x)
    _, _, slope, _ = _sigmoids(x * beta, ROUGH)
    return x * (x * slope)


@triton.jit
def _capped_swish(x, beta, limit, ROUGH: tl.constexpr):
    value, slope = _swish(_min(x, limit), beta, ROUGH)
    return value, tl.where(x > limit, 0.0, slope)


@triton.jit
def _gelu(x, ROUGH: tl.constexpr):
    cdf, pdf = _normal(x, ROUGH)
    return _damped(x, cdf), cdf + _finite(x) * pdf


@triton.jit
def _gelu_tanh(x, ROUGH: tl.constexpr):
    near = _clamp(x, -10.5, 10.5)  # the sigmoid is 0 or 1 there
    square = near * near
    _, at, slope, _ = _sigmoids(near * (square * TANH_GELU_CUBE + TANH_GELU_SCALE), ROUGH)
    by_x = square * (3.0 * TANH_GELU_CUBE) + TANH_GELU_SCALE
    return _damped(x, at), at + near * slope * by_x


@triton.jit
def _elu(x, alpha, ROUGH: tl.constexpr):
    below = _min(x, 0.0)
    value = tl.where(x > 0.0, x, _expm1(below) * alpha)
    return value, tl.where(x > 0.0, 1.0, _exp_below(below, ROUGH) * alpha)


@triton.jit
def _selu(x, ROUGH: tl.constexpr):
    value, slope = _elu(x, SELU_ALPHA, ROUGH)
    return value * SELU_SCALE, slope * SELU_SCALE


@triton.jit
def _xielu(x, alpha_p, alpha_n):
    below = _min(x, 0.0)
    curve = alpha_n * _expm1(below)
    # Written so that at minus infinity no infinity is subtracted from another.
    negative = curve - (alpha_n - XIELU_SLOPE) * below
    value = tl.where(x > 0.0, x * (alpha_p * x + XIELU_SLOPE), negative)
    return value, tl.where(x > 0.0, 2.0 * alpha_p * x, curve) + XIELU_SLOPE


@triton.jit
def _xielu_by_alpha_n(x):
    below = _min(x, 0.0)
    # Near 0 the difference would cancel.
    return tl.where(below > -0.34, below * below * _exp_rest(below), _expm1(below) - below)


@triton.jit
def _soft_cap(x, cap, ROUGH: tl.constexpr):
    at, slope = _tanh(x / cap, ROUGH)
    return cap * at, slope


@triton.jit
def _situ(x, cap, ROUGH: tl.constexpr):
    value, slope = _soft_cap(x, cap, ROUGH)
    _, at, _, opposite = _sigmoids(x, ROUGH)
    return value * at, at * (slope + value * opposite)


@triton.jit
def _pow_gate(x, m, ROUGH: tl.constexpr):
    # x^exponent sigmoid(x) above 0, with exponent = m / (sqrt(x) + 1)
    g = tl.where(x > 0.0, _clamp(x, SMALLEST, LARGEST), 1.0)
    if ROUGH:
        root = tl.sqrt(g)
        exponent = m / (root + 1.0)
        by_root = -exponent / (2.0 * root * (root + 1.0))
        log = tl.log2(g)
        power = tl.exp2(exponent * log)
        by_base = exponent * tl.exp2((exponent - 1.0) * log)
        log = log * LOG_2
    else:
        root = tl.sqrt_rn(g)
        exponent = tl.div_rn(tl.zeros_like(g) + m, root + 1.0)
        by_root = tl.div_rn(-exponent, 2.0 * root * (root + 1.0))
        log = _log(g)
        power = _exp(exponent * log)
        by_base = exponent * _exp((exponent - 1.0) * log)
    _, at, _, opposite = _sigmoids(x, ROUGH)
    by_exponent = power * (by_root * log + opposite)
    value, slope = _swish(_min(x, 0.0), 1.0, ROUGH)
    return (
        tl.where(x > 0.0, power * at, value),
        tl.where(x > 0.0, at * (by_exponent + by_base), slope),
    )


@triton.jit
def _expanded_swish(x, alpha, ROUGH: tl.constexpr):
    more = 1.0 + 2.0 * alpha
    z, at, slope, _ = _sigmoids(x, ROUGH)
    return _damped(x, at * more - alpha), (at + z * slope) * more - alpha


@triton.jit
def _expanded_swish_by_alpha(x, ROUGH: tl.constexpr):
    at, _ = _tanh(0.5 * x, ROUGH)
    return x * at


@triton.jit
def _expanded_gelu(x, alpha, ROUGH: tl.constexpr):
    more = 1.0 + 2.0 * alpha
    cdf, pdf = _normal(x, ROUGH)
    return _damped(x, cdf * more - alpha), (cdf + _finite(x) * pdf) * more - alpha


@triton.jit
def _clip(x, limit):
    slope = tl.where(tl.abs(x) > limit, 0.0, tl.where(x != x, x, 1.0))
    return _max(_min(x, limit), -limit), slope


# what kernels call


@triton.jit
def both(x, p0, p1, NAME: tl.constexpr, ROUGH: tl.constexpr = False):
    """The function NAME of the table at `x`: its value and its slope."""
    value = x
    slope = tl.full(x.shape, 1.0, tl.float32)
    if NAME == "identity":
        pass
    elif NAME == "relu":
        value, slope = _relu(x)
    elif NAME == "relu2":
        value, slope = _relu2(x)
    elif NAME == "leaky_relu":
        value, slope = _leaky_relu(x, p0)
    elif NAME == "sigmoid":
        value, slope = _sigmoid(x, ROUGH)
    elif NAME == "tanh":
        value, slope = _tanh(x, ROUGH)
    elif NAME == "softplus":
        value, slope = _softplus(x, ROUGH)
    elif NAME == "swish":
        value, slope = _swish(x, p0, ROUGH)
    elif NAME == "capped_swish":
        value, slope = _capped_swish(x, p0, p1, ROUGH)
    elif NAME == "gelu":
        value, slope = _gelu(x, ROUGH)
    elif NAME == "gelu_tanh":
        value, slope = _gelu_tanh(x, ROUGH)
    elif NAME == "elu":
        value, slope = _elu(x, p0, ROUGH)
    elif NAME == "selu":
        value, slope = _selu(x, ROUGH)
    elif NAME == "xielu":
        value, slope = _xielu(x, p0, p1)
    elif NAME == "situ":
        value, slope = _situ(x, p0, ROUGH)
    elif NAME == "pow_gate":
        value, slope = _pow_gate(x, p0, ROUGH)
    elif NAME == "expanded_swish":
        value, slope = _expanded_swish(x, p0, ROUGH)
    elif NAME == "expanded_gelu":
        value, slope = _expanded_gelu(x, p0, ROUGH)
    elif NAME == "clip":
        value, slope = _clip(x, p0)
    elif NAME == "clip_plus_one":
        value, slope = _clip(x, p0)
        value += 1.0
    elif NAME == "soft_cap":
        value, slope = _soft_cap(x, p0, ROUGH)
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
        slope = _min(x, 0.0)
    elif NAME == "swish" and WHICH == 0:
        slope = _swish_by_beta(x, p0, ROUGH)
    elif NAME == "capped_swish" and WHICH == 0:
        slope = _swish_by_beta(_min(x, p1), p0, ROUGH)
    elif NAME == "xielu" and WHICH == 0:
        above = _max(x, 0.0)
        slope = above * above
    elif NAME == "xielu" and WHICH == 1:
        slope = _xielu_by_alpha_n(x)
    elif NAME == "expanded_swish" and WHICH == 0:
        slope = _expanded_swish_by_alpha(x, ROUGH)
    elif NAME == "expanded_gelu" and WHICH == 0:
        slope = x * _normal_erf(x, ROUGH)
    else:
        tl.static_assert(False, "activations/gpu.py lacks a derivative by a parameter of " + NAME)
    return slope
