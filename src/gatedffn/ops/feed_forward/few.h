// The layer for few tokens: every weight is read once, gate and up together.
//
// y[t] = (phi(W_gate x[t]) psi(W_up x[t])) W_down^T. Rows of a weight and tokens lie alike, along
// the summed dimension, so a product is a set of dot products and nothing needs packing.
#pragma once
#include "../cpu.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace gatedffn {

constexpr int ROWS = 48;          // rows of a weight that a thread takes at once
constexpr int TOKENS = 32;        // the most tokens
constexpr int LONGEST = 512;      // values of a chunk at most: the next one is fetched meanwhile
constexpr int IN_CACHE = 8192;    // values of the tokens that a chunk has: two thirds of L1

// A step of the summed dimension: how weights of a dtype meet the tokens, which lie prepared.
template <class W>
struct Step {
  typedef float X;
  static constexpr int SIZE = LANES;
  struct Piece { V a; };
  static Piece fetch(const W* w) { return {load(w)}; }
  static Piece token(const X* x) { return {load(x)}; }
  static void meet(V& sum, Piece x, Piece w) { sum += x.a * w.a; }
  static void prepare(X* out, const W* x) { store(out, load(x)); }
};

template <>
struct Step<bf16> {
#ifdef __AVX512BF16__
  typedef bf16 X;
  static constexpr int SIZE = 32;
  typedef __m512bh Piece;
  static Piece fetch(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static Piece token(const X* x) { return fetch(x); }
  static void meet(V& sum, Piece x, Piece w) { sum = (V)_mm512_dpbf16_ps((__m512)sum, x, w); }
  static void prepare(X* out, const bf16* x) { std::memcpy(out, x, sizeof(bf16) * SIZE); }
#else
  // Two neighbours are one 32-bit word: the upper half is a float32 once the lower is cleared, the
  // lower one after a shift. The tokens are prepared apart to match: the even ones, then the odd.
  typedef float X;
  static constexpr int SIZE = 2 * LANES;
  struct Piece { V even, odd; };
  static Piece fetch(const bf16* w) {
    I bits;
    std::memcpy(&bits, w, sizeof bits);
    return {(V)(bits << 16), (V)(bits & int32_t(0xffff0000))};
  }
  static Piece token(const X* x) { return {load(x), load(x + LANES)}; }
  static void meet(V& sum, const Piece& x, const Piece& w) {
    sum += x.even * w.even;
    sum += x.odd * w.odd;
  }
  static void prepare(X* out, const bf16* x) {
    Piece p = fetch(x);
    store(out, p.even);
    store(out + LANES, p.odd);
  }
#endif
};

// The summed dimension is taken in chunks: a chunk of all tokens is in L1 while rows meet it. The
// tokens lie chunk after chunk, so that they spread evenly over the sets of L1.
static inline int64_t chunk_size(int64_t tokens) {
  int64_t chunk = IN_CACHE / tokens / 64 * 64;
  return chunk < LONGEST ? chunk : LONGEST;
}

static inline int64_t prepared_size(int64_t n, int64_t tokens) {
  int64_t chunk = chunk_size(tokens);
  return (n + chunk - 1) / chunk * chunk * tokens;
}

// Token t of `tokens`, n long, to its place in each chunk.
template <class W>
static void prepare(typename Step<W>::X* out, const W* x, int64_t n, int64_t t, int64_t tokens) {
  constexpr int S = Step<W>::SIZE;
  int64_t chunk = chunk_size(tokens);
  for (int64_t k = 0; k < n; k += S) {
    W last[S] = {};
    if (n - k < S) std::memcpy(last, x + k, (n - k) * sizeof(W));
    Step<W>::prepare(out + k / chunk * chunk * tokens + t * chunk + k % chunk,
                     n - k < S ? last : x + k);
  }
}

// sums[m][r] += w[r] . x[m], lane by lane, for R rows and M tokens.
template <class W, int R, int M, bool FETCH>
static inline void meet_part(V (*sums)[R], const W* w, const W* next, int64_t stride,
                              const typename Step<W>::X* x, int64_t apart, int64_t n) {
  typedef Step<W> S;
  V part[R][M] = {};
  int64_t k = 0;
  for (; k + S::SIZE <= n; k += S::SIZE) {
    typename S::Piece pieces[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      if (FETCH) __builtin_prefetch(next + r * stride + k);
      pieces[r] = S::fetch(w + r * stride + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      typename S::Piece token = S::token(x + m * apart + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) S::meet(part[r][m], token, pieces[r]);
    }
  }
  if (k < n)
    for (int r = 0; r < R; r++) {
      W last[S::SIZE] = {};
      std::memcpy(last, w + r * stride + k, (n - k) * sizeof(W));
      for (int m = 0; m < M; m++)
        S::meet(part[r][m], S::token(x + m * apart + k), S::fetch(last));
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[m][r] += part[r][m];
}

// The same; `next` is fetched meanwhile, if there is one.
template <class W, int R, int M>
static void meet_chunk(V (*sums)[R], const W* w, const W* next, int64_t stride,
                       const typename Step<W>::X* x, int64_t apart, int64_t n) {
  if (next) meet_part<W, R, M, true>(sums, w, next, stride, x, apart, n);
  else meet_part<W, R, M, false>(sums, w, next, stride, x, apart, n);
}

// out[t][r] = w[r] . x[t] for R rows. Sums of sums: the error grows with the number of terms.
template <class W, int R>
static void some_rows(float* out, const W* w, int64_t stride, const typename Step<W>::X* x,
                      int64_t n, int64_t tokens) {
  V sums[TOKENS][R];
  for (int64_t t = 0; t < tokens; t++)
    for (int r = 0; r < R; r++) sums[t][r] = V{};
  int64_t chunk = chunk_size(tokens);
  for (int64_t k = 0; k < n; k += chunk, x += chunk * tokens) {
    int64_t size = n - k < chunk ? n - k : chunk, t = 0;
    // While the first tokens meet a chunk, the one after it is fetched.
    const W* next = k + chunk < n ? w + k + chunk : w + R * stride;
    for (; t + 4 <= tokens; t += 4, next = nullptr)
      meet_chunk<W, R, 4>(sums + t, w + k, next, stride, x + t * chunk, chunk, size);
    for (; t + 2 <= tokens; t += 2, next = nullptr)
      meet_chunk<W, R, 2>(sums + t, w + k, next, stride, x + t * chunk, chunk, size);
    for (; t < tokens; t++, next = nullptr)
      meet_chunk<W, R, 1>(sums + t, w + k, next, stride, x + t * chunk, chunk, size);
  }
  // As many at a time as a vector has lanes: turned, their sum is one vector of sums.
  for (int64_t i = 0; i < tokens * R; i += LANES) {
    V square[LANES];
    for (int j = 0; j < LANES; j++)
      square[j] = i + j < tokens * R ? sums[(i + j) / R][(i + j) % R] : set(0.0f);
    transpose(square);
    for (int j = 1; j < LANES; j++) square[0] += square[j];
    for (int j = 0; j < LANES && i + j < tokens * R; j++)
      out[(i + j) / R * ROWS + (i + j) % R] = square[0][j];
  }
}

// out[t][r] = w[r] . x[t] for up to ROWS rows, as many at once as sums fit into the registers.
template <class W>
static void product(float (*out)[ROWS], const W* w, int64_t stride, int64_t rows,
                    const typename Step<W>::X* x, int64_t n, int64_t tokens) {
  constexpr int R = LANES == 16 ? 6 : 2;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    some_rows<W, R>(&out[0][r], w + r * stride, stride, x, n, tokens);
  for (; r < rows; r++) some_rows<W, 1>(&out[0][r], w + r * stride, stride, x, n, tokens);
}

// out[t][r] for the rows from `first` on, bias added, rounded as W.
template <class W>
static void meet(float (*out)[ROWS], const Weight<W>& weight, int64_t first, int64_t rows,
                 const typename Step<W>::X* x, int64_t n, int64_t tokens) {
  product<W>(out, weight.at + first * weight.stride, weight.stride, rows, x, n, tokens);
  float add[ROWS] = {};
  if (weight.bias) widen(add, weight.bias + first, rows);
  for (int64_t t = 0; t < tokens; t++) {
    if (weight.bias)
      for (int i = 0; i < ROWS; i += LANES) store(&out[t][i], load(&out[t][i]) + load(add + i));
    round_as<W>(out[t], ROWS);
  }
}

// `activated` goes through phi; `linear` and `down` may be missing (at is null): without `down`
// the hidden values are the result. `scratch` holds few_scratch() bytes.
template <class W>
static void few(const Gate& gate, Rows<const W> x, Weight<W> activated, Weight<W> linear,
                Weight<W> down, Rows<W> y, int64_t tokens, int64_t d_model, int64_t d_hidden,
                int64_t d_out, char* scratch, int threads) {
  typedef typename Step<W>::X X;
  X* inputs = (X*)scratch;
  X* middle = inputs + prepared_size(d_model, tokens);
  W* hidden = (W*)(middle + prepared_size(d_hidden, tokens));
  int64_t next_hidden = 0, next_out = 0;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float a[TOKENS][ROWS], b[TOKENS][ROWS];
    Share mine(tokens);
    for (int64_t t = mine.begin; t < mine.end; t++)
      prepare<W>(inputs, x.row(t, 0), d_model, t, tokens);
#pragma omp barrier
    for (;;) {
      int64_t r = __atomic_fetch_add(&next_hidden, ROWS, __ATOMIC_RELAXED);
      if (r >= d_hidden) break;
      int64_t rows = d_hidden - r < ROWS ? d_hidden - r : ROWS;
      meet(a, activated, r, rows, inputs, d_model, tokens);
      if (linear.at) meet(b, linear, r, rows, inputs, d_model, tokens);
      for (int64_t t = 0; t < tokens; t++) {
        gate.hidden(a[t], a[t], b[t], r, rows);
        narrow(down.at ? hidden + t * d_hidden + r : y.row(t, r), a[t], rows);
      }
    }
    if (down.at) {
#pragma omp barrier
      for (int64_t t = mine.begin; t < mine.end; t++)
        prepare<W>(middle, hidden + t * d_hidden, d_hidden, t, tokens);
#pragma omp barrier
      for (;;) {
        int64_t r = __atomic_fetch_add(&next_out, ROWS, __ATOMIC_RELAXED);
        if (r >= d_out) break;
        int64_t rows = d_out - r < ROWS ? d_out - r : ROWS;
        meet(a, down, r, rows, middle, d_hidden, tokens);
        for (int64_t t = 0; t < tokens; t++) narrow(y.row(t, r), a[t], rows);
      }
    }
  }
}

}  // namespace gatedffn
