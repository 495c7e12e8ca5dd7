"""The elementary functions that `gpu.py` is made of, in Triton; in C++ they are in simd.h, in
JavaScript in plots/assets/elementary.js, under the same names.

All is float32 blocks. A NaN stays a NaN. The polynomials are those of simd.h; they leave the
exponential and the reciprocal as the only operations that a GPU approximates, and the
reciprocal's error is taken off again.

What is rounded to 16 bits afterwards may be ROUGH: the exponential and the reciprocal are then as
the chip has them, off by some units of float32, more where an exponential is very small or large.
"""

import math

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number

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
def full(value, x):
    """The same number wherever `x` has one."""
    return tl.full(x.shape, value, tl.float32)


# A minimum or a maximum in which a NaN stays. In C++ only that of the second argument does.


@triton.jit
def min(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(low, high, x):
    return min(high, max(low, x))


@triton.jit
def with_sign_of(size, x):
    return tl.where(x < 0.0, -size, size)


@triton.jit
def divided(x, y, ROUGH: tl.constexpr):
    return x / y if ROUGH else tl.div_rn(x + tl.zeros_like(y), y)


@triton.jit
def sqrt(x, ROUGH: tl.constexpr):
    return tl.sqrt(x) if ROUGH else tl.sqrt_rn(x)


@triton.jit
def _reduced(x):
    """e^x = 2^n e^r for |x| <= 88: n, r, and 2^n, which is 0 at -88."""
    total = x * LOG2_E + MAGIC
    n = total - MAGIC
    r = (x - n * LOG_2_HEAD) - n * LOG_2_REST
    return n, r, (total.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_rest(r):
    """(e^r - 1 - r) / r^2 for |r| <= log(2) / 2, to 0.05 ulp of e^r."""
    high = (0.0013950602 * r + 0.008368953) * r + 0.041666206
    return (high * r + 0.16666518) * r + 0.5


@triton.jit
def exp_below(x, ROUGH: tl.constexpr):
    """e^x for x <= 88; what is below the normal numbers is 0."""
    if ROUGH:
        e = tl.exp2(x * LOG2_E)
    else:
        _, r, power = _reduced(max(-88.0, x))
        e = power * tl.exp2(r * LOG2_E)
    return e


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 88."""
    _, r, power = _reduced(max(-88.0, x))
    return power * (r + r * r * exp_rest(r)) + (power - 1.0)


@triton.jit
def _exp(x):
    """e^x of any x. At the ends the power of 2 is no normal number, so it is made of two."""
    n, r, _ = _reduced(clamp(-104.0, 89.0, x))
    n = n.to(tl.int32)
    half = n >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp2(r * LOG2_E) * low * high


@triton.jit
def reciprocal_after_one(e, ROUGH: tl.constexpr):
    """1 / (1 + e) for 0 <= e <= 2^126: its error is taken from the addends, so that neither the
    rounding of their sum nor an approximate division has a part in it.
    """
    r = 1.0 / (1.0 + e)
    if not ROUGH:
        r = r + r * ((1.0 - r) - r * e)
    return r


@triton.jit
def log1p(x):
    """log(1 + x) = 2 atanh(s) for -0.3 <= x <= 1, to 0.1 ulp."""
    s = tl.div_rn(x, x + 2.0)
    square = s * s
    high = (0.28031275 * square + 0.27997863) * square + 0.4002177
    rest = square * (high * square + 0.6666641)
    return x - s * (x - rest)  # 2 s is x - s x, which has less rounding


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # so that what is left is between sqrt(1/2) and sqrt(2)
    left = (bits - (n << 23)).to(tl.float32, bitcast=True)
    power = n.to(tl.float32)
    return (log1p(left - 1.0) + power * LOG_2_REST) + power * LOG_2_HEAD


@triton.jit
def log(x, ROUGH: tl.constexpr):
    """Of an x that is positive, normal and finite."""
    return tl.log2(x) * LOG_2 if ROUGH else _log(x)


@triton.jit
def pow(g, p, ROUGH: tl.constexpr):
    """g^p for a g that is positive, normal and finite. The error is about |p log g| / 2 ulp."""
    return tl.exp2(p * tl.log2(g)) if ROUGH else _exp(p * _log(g))


@triton.jit
def sigmoids(x, ROUGH: tl.constexpr):
    """`x` within the range in which a sigmoid changes, the sigmoid there, its slope, and the
    sigmoid of -x, which 1 less it would not give: that cancels.
    """
    near = clamp(LOWEST, 88.0, x)
    if ROUGH:
        e = tl.exp2(x * -LOG2_E)
        at = 1.0 / (1.0 + e)
        opposite = tl.where(e > TOO_LARGE, 1.0, e * at)
        slope = at * opposite
    else:
        e = exp_below(-near, ROUGH)
        r = reciprocal_after_one(e, ROUGH)
        at = tl.where(near == LOWEST, 0.0, r)
        opposite = e * r
        tail = min(at, opposite)
        # Near 1/2 an error of the tail has no part in this.
        slope = tail - tail * tail
    return near, at, slope, opposite


@triton.jit
def tanh_and_slope(x, ROUGH: tl.constexpr):
    size = tl.abs(x)
    e = exp_below(-2.0 * size, ROUGH)
    tail = e * reciprocal_after_one(e, ROUGH)
    # 1 - 2 tail would cancel near 0: there by its own polynomial, to 0.05 ulp.
    square = x * x
    high = (-0.0055261897 * square + 0.02048106) * square - 0.05369226
    near = size + size * square * ((high * square + 0.13330892) * square - 0.33333263)
    size = tl.where(size < 0.65, near, 1.0 - 2.0 * tail)
    return with_sign_of(size, x), 4.0 * (tail - tail * tail)


@triton.jit
def normal(x, ROUGH: tl.constexpr):
    """The normal distribution: the probability below x, and the density there."""
    if ROUGH:
        a = min(20.0, tl.abs(x))
        e = tl.exp2(a * a * (-0.5 * LOG2_E))
    else:
        a = min(NO_DENSITY, tl.abs(x))
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
def normal_erf(x, ROUGH: tl.constexpr):
    """erf(x / sqrt(2)); near 0 by its own polynomial, to 0.01 ulp, as 2 cdf(x) - 1 would cancel."""
    square = x * x
    high = (-1.5329359e-05 * square + 0.00022702532) * square - 0.002372706
    high = (high * square + 0.019946663) * square - 0.13298072
    near = x * (high * square + 0.7978846)
    size = tl.abs(x)
    below, _ = normal(-size, ROUGH)
    return tl.where(size < 1.0, near, with_sign_of(1.0 - 2.0 * below, x))
