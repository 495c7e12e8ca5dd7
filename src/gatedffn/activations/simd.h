// Vectors of float, and the elementary functions on them, for whichever instruction set the
// compiler is given. Several builds of this can live in one process: nothing here is exported.
//
// A NaN stays a NaN, at the infinities a function has its limit. The builds contract a * b + c
// where there is such an instruction, and must not use -ffast-math. The polynomials were fitted
// by weighted least squares (Lawson's weights make it minimax) to 40 digits; their errors are in
// ulp of the result, and the rounding comes on top.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Without it a function that is used often would be called, with its vectors through memory.
#define GATEDFFN_INLINE static inline __attribute__((always_inline))

namespace gatedffn {

#if defined(__AVX512F__)
constexpr int LANES = 16;
// The intrinsics without a mask make GCC 12 warn of an uninitialized value in its own headers.
constexpr __mmask16 ALL = 0xffff;
#define GATEDFFN_MACHINE(name, ...) _mm512_maskz_##name##_ps(ALL, __VA_ARGS__)
#elif defined(__AVX2__)
constexpr int LANES = 8;
#define GATEDFFN_MACHINE(name, ...) _mm256_##name##_ps(__VA_ARGS__)
#else
constexpr int LANES = 4;
#if defined(__SSE2__)
#define GATEDFFN_MACHINE(name, ...) _mm_##name##_ps(__VA_ARGS__)
#endif
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

GATEDFFN_INLINE V set(float x) { return x - V{}; }
GATEDFFN_INLINE V set(V x) { return x; }
GATEDFFN_INLINE V select(I mask, V yes, V no) { return mask ? yes : no; }
GATEDFFN_INLINE U select(I mask, U yes, U no) { return mask ? yes : no; }
GATEDFFN_INLINE I is_nan(V x) { return x != x; }
GATEDFFN_INLINE V abs(V x) { return (V)((U)x & 0x7fffffffu); }
GATEDFFN_INLINE V with_sign_of(V x, V sign) { return (V)((U)abs(x) | ((U)sign & 0x80000000u)); }

// Of a NaN and another number these give the second: with the constant first, a NaN stays.
GATEDFFN_INLINE V min(V a, V b) {
#if defined(GATEDFFN_MACHINE)
  return GATEDFFN_MACHINE(min, a, b);
#else
  return a < b ? a : b;
#endif
}

GATEDFFN_INLINE V max(V a, V b) {
#if defined(GATEDFFN_MACHINE)
  return GATEDFFN_MACHINE(max, a, b);
#else
  return a > b ? a : b;
#endif
}

GATEDFFN_INLINE V min(float a, V b) { return min(set(a), b); }
GATEDFFN_INLINE V max(float a, V b) { return max(set(a), b); }
GATEDFFN_INLINE V clamp(float low, float high, V x) { return min(high, max(low, x)); }

GATEDFFN_INLINE V sqrt(V x) {
#if defined(GATEDFFN_MACHINE)
  return GATEDFFN_MACHINE(sqrt, x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 1 / x for 2^-126 <= |x| <= 2^126
GATEDFFN_INLINE V reciprocal(V x) {
#if defined(__AVX512F__)
  // A division takes longer than an estimate and one step of Newton's.
  V r = GATEDFFN_MACHINE(rcp14, x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e) for 0 <= e <= 2^126: its error is taken from the addends, so that the rounding of
// their sum has no part in it.
GATEDFFN_INLINE V reciprocal_after_one(V e) {
#if defined(__AVX512F__)
  V r = GATEDFFN_MACHINE(rcp14, 1.0f + e);
#else
  V r = 1.0f / (1.0f + e);
#endif
  return r + r * ((1.0f - r) - r * e);
}

// Loads and stores, which need no alignment.

template <class To, class From>
GATEDFFN_INLINE To copied(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof to);
  return to;
}

GATEDFFN_INLINE V load(const float* from) { return copied<V>(from); }

GATEDFFN_INLINE V load(const bf16* from) {
  return (V)(__builtin_convertvector(copied<Halves>(from), U) << 16);
}

GATEDFFN_INLINE V load(const f16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(ALL, copied<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(copied<__m128i>(from));
#else
  U bits = __builtin_convertvector(copied<Halves>(from), U);
  U size = (bits & 0x7fffu) << 13;
  U special = size + (224u << 23), normal = size + (112u << 23);
  // The bits of a subnormal follow those of the smallest normal number, which is taken off.
  V smallest = (V)(U{} + (113u << 23));
  U subnormal = (U)((V)(size + (113u << 23)) - smallest);
  size = select(size >= (31u << 23), special, select(size < (1u << 23), subnormal, normal));
  return (V)(size | (bits & 0x8000u) << 16);
#endif
}

GATEDFFN_INLINE void store(float* to, V x) { __builtin_memcpy(to, &x, sizeof x); }

GATEDFFN_INLINE void store(bf16* to, V x) {
  // The machine's own conversion would flush subnormal numbers.
  U bits = (U)x;
  U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  Halves halves = __builtin_convertvector(select(is_nan(x), U{} + 0x7fc0u, rounded), Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}

GATEDFFN_INLINE void store(f16* to, V x) {
#if defined(__AVX512F__)
  __m256i halves = _mm512_maskz_cvtps_ph(ALL, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
  __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  U size = (U)abs(x), sign = (U)x >> 16 & 0x8000u;
  U normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
  // The last place of 0.5 is the unit of the subnormals, so the addition rounds to it.
  U subnormal = (U)((V)size + 0.5f) - (126u << 23);
  U rounded = select(size < (113u << 23), subnormal, normal);
  rounded = select(size >= (143u << 23), U{} + 0x7c00u, rounded);
  rounded = select(size > (255u << 23), U{} + 0x7e00u, rounded);
  Halves halves = __builtin_convertvector(rounded | sign, Halves);
#endif
  __builtin_memcpy(to, &halves, sizeof halves);
}

// The first `n` elements; the others are 0, and their memory is not touched.
template <class T>
GATEDFFN_INLINE V load_some(const T* from, int n) {
  T elements[LANES] = {};
  for (int i = 0; i < n; i++) elements[i] = from[i];
  return load(elements);
}

template <class T>
GATEDFFN_INLINE void store_some(T* to, V x, int n) {
  T elements[LANES];
  store(elements, x);
  for (int i = 0; i < n; i++) to[i] = elements[i];
}

// Elementary functions.

GATEDFFN_INLINE V polynomial(V, float c) { return set(c); }

template <class... Floats>
GATEDFFN_INLINE V polynomial(V x, float c, Floats... higher) {
  return polynomial(x, higher...) * x + c;
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2, to 0.05 ulp of e^r.
GATEDFFN_INLINE V exp_rest(V r) {
  return polynomial(r, 0.5f, 0.16666518f, 0.041666206f, 0.008368953f, 0.0013950602f);
}

// e^x = 2^n (1 + p) for |x| <= 88. At -88 the power of 2 is 0, and so is what is made of it.
struct Exponential {
  V n, power, p;
};

// `rest` is a small number to add to an `x` that one float does not hold; without it, the
// addition of -0, which changes no number, is none.
GATEDFFN_INLINE Exponential exponential(V x, V rest = set(-0.0f)) {
  // An addition of this rounds to a whole number, with n + 127 in the lowest bits.
  const float magic = 0x1.8p23f + 127.0f;
  V sum = x * 1.44269504f + magic, n = sum - magic;
  // log(2) in two parts, of which the first times n is exact.
  V r = (x - n * 0.693359375f) + n * 2.12194440e-4f + rest;
  return {n, (V)((U)sum << 23), r * (1.0f + r * exp_rest(r))};
}

GATEDFFN_INLINE V product(Exponential e) { return e.power * (1.0f + e.p); }

// At the ends the power of 2 is no normal number, though e^x may be one: it is made of two.
GATEDFFN_INLINE V exp(V x) {
  Exponential e = exponential(clamp(-104.0f, 89.0f, x));
  I n = __builtin_convertvector(e.n, I), half = n >> 1;
  return (1.0f + e.p) * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
}

// For x <= 88
GATEDFFN_INLINE V expm1(V x) {
  Exponential e = exponential(max(-88.0f, x));
  return e.power * e.p + (e.power - 1.0f);
}

// The same as exp for x <= 88 but for what is below the normal numbers, which becomes 0. With
// expm1 of the same x, the compiler does the common work once.
GATEDFFN_INLINE V exp_below(V x) { return product(exponential(max(-88.0f, x))); }

// log(1 + x) = 2 atanh(s) for -0.3 <= x <= 1, to 0.1 ulp.
GATEDFFN_INLINE V log1p(V x) {
  V s = x * reciprocal(x + 2.0f), square = s * s;
  V rest = square * polynomial(square, 0.6666641f, 0.4002177f, 0.27997863f, 0.28031275f);
  return x - s * (x - rest);  // 2 s is x - s x, which has less rounding
}

// For an x that is positive, normal and finite.
GATEDFFN_INLINE V log(V x) {
  I n = ((I)x - 0x3f3504f3) >> 23;  // so that what is left is between sqrt(1/2) and sqrt(2)
  V left = (V)((I)x - (n << 23)), power = __builtin_convertvector(n, V);
  return (log1p(left - 1.0f) - power * 2.12194440e-4f) + power * 0.693359375f;
}

// The sigmoid at x, its derivative, and it at -x, which 1 less it would not give: that cancels.
// `x` is kept within the range in which these change in float32.
struct Sigmoid {
  V x, at, slope, opposite;
};

GATEDFFN_INLINE Sigmoid sigmoids(V x) {
  const float lowest = -87.3f;  // the sigmoid of it is the smallest normal number, nearly
  x = clamp(lowest, 88.0f, x);
  V e = product(exponential(-x)), r = reciprocal_after_one(e), at = select(x == lowest, V{}, r);
  V opposite = e * r, tail = min(at, opposite);
  // Near 1/2 an error of the tail has no part in this.
  return {x, at, tail - tail * tail, opposite};
}

// tanh, and its derivative
struct Tanh {
  V at, slope;
};

GATEDFFN_INLINE Tanh tanh_and_slope(V x) {
  V size = abs(x), square = x * x;
  V e = exp_below(-2.0f * size), tail = e * reciprocal_after_one(e);
  // 1 - 2 tail would cancel near 0: there by its own polynomial, to 0.05 ulp.
  V near = size + size * square * polynomial(square, -0.33333263f, 0.13330892f, -0.05369226f,
                                             0.02048106f, -0.0055261897f);
  size = select(size < 0.65f, near, 1.0f - 2.0f * tail);
  return {with_sign_of(size, x), 4.0f * (tail - tail * tail)};
}

// The normal distribution: the probability below x, and the density there.
struct Normal {
  V cdf, pdf;
};

GATEDFFN_INLINE Normal normal(V x) {
  V a = min(13.2664992f, abs(x));  // the density is 0 there
  // a^2 in two parts, of which the first is exact: a rounding would be multiplied by a^2.
  V head = (V)((U)a & 0xfffff000u);
  V e = product(exponential(-0.5f * head * head, -0.5f * (a - head) * (a + head)));
  // The tail over e^(-a^2 / 2), to 0.2 ulp with the coefficients rounded.
  V above = polynomial(a, 0.5f, 0.436146826f, 0.181646287f, 0.0400982201f, 0.00403702352f);
  V below = polynomial(a, 1.0f, 1.67017853f, 1.19589806f, 0.46527645f, 0.100518532f, 0.0101191793f);
  V tail = e * (above * reciprocal(below));
  return {select(x < 0.0f, tail, 1.0f - tail), e * 0.398942280f};
}

// erf(x / sqrt(2)); near 0 by its own polynomial, to 0.01 ulp, as 2 cdf(x) - 1 would cancel.
GATEDFFN_INLINE V normal_erf(V x) {
  V near = x * polynomial(x * x, 0.7978846f, -0.13298072f, 0.019946663f, -0.002372706f,
                          0.00022702532f, -1.5329359e-05f);
  V size = abs(x);
  return select(size < 1.0f, near, with_sign_of(1.0f - 2.0f * normal(-size).cdf, x));
}

// g^p for a g that is positive, normal and finite. The error is about |p log g| / 2 ulp.
GATEDFFN_INLINE V pow(V g, V p) { return exp(p * log(g)); }

}  // namespace gatedffn

#undef GATEDFFN_MACHINE
