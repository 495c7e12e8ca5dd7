// The layer for few tokens: every weight is read once, gate and up together.
//
// y[t] = (phi(W_gate x[t]) psi(W_up x[t])) W_down^T. Weights are read as they lie. Up to eight
// tokens, fewer in short rows, and where weights are converted, a product is a set of dot products,
// of rows and tokens that lie alike; otherwise tokens lie across vectors, and what they meet is one
// weight at a time.
#pragma once
#include "products.h"

namespace gatedffn {

constexpr int ROWS = 48;          // rows of a weight that a thread takes at once
constexpr int TOKENS = 32;        // the most tokens
static_assert(ROWS % LANES == 0, "sums are turned a square at a time");
constexpr int ACROSS = 9;         // the tokens from which they lie across vectors
constexpr int SHORT = 24;         // cells of a row for each token, below which they do too: a dot
                                  // product ends with a sum across its vector
// Values of a chunk at most: the next one is fetched meanwhile, and a lane adds up 64 of them, as
// sums of short sums are more exact.
constexpr int LONGEST = LANES < 8 ? 64 * LANES : 512;
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

// sums[m][r] += w[r] . x[m], lane by lane, for R rows and M tokens; `begin` says that there are no
// sums yet.
template <class W, int R, int M, bool FETCH>
static inline void meet_part(V (*sums)[ROWS], bool begin, const W* w, const W* next, int64_t stride,
                             const typename Step<W>::X* x, int64_t apart, int64_t n) {
  typedef Step<W> S;
  V part[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)  // one by one: a call that clears memory takes longer than short rows
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) part[r][m] = V{};
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
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m][r] = begin ? part[r][m] : sums[m][r] + part[r][m];
}

// The same; `next` is fetched meanwhile, if there is one.
template <class W, int R, int M>
static void meet_chunk(V (*sums)[ROWS], bool begin, const W* w, const W* next, int64_t stride,
                       const typename Step<W>::X* x, int64_t apart, int64_t n) {
  if (next) meet_part<W, R, M, true>(sums, begin, w, next, stride, x, apart, n);
  else meet_part<W, R, M, false>(sums, begin, w, next, stride, x, apart, n);
}

// all[t][first + r] = w[r] . x[t], lane by lane, for R rows. Sums of sums: the error grows with the
// number of terms.
template <class W, int R>
static void some_rows(V (*all)[ROWS], int64_t first, const W* w, int64_t stride,
                      const typename Step<W>::X* x, int64_t n, int64_t tokens) {
  auto sums = (V (*)[ROWS]) & all[0][first];
  int64_t chunk = chunk_size(tokens);
  for (int64_t k = 0; k < n; k += chunk, x += chunk * tokens) {
    int64_t size = n - k < chunk ? n - k : chunk, t = 0;
    // While the first tokens meet a chunk, the one after it is fetched.
    const W* next = k + chunk < n ? w + k + chunk : w + R * stride;
    for (; t + 4 <= tokens; t += 4, next = nullptr)
      meet_chunk<W, R, 4>(sums + t, !k, w + k, next, stride, x + t * chunk, chunk, size);
    for (; t + 2 <= tokens; t += 2, next = nullptr)
      meet_chunk<W, R, 2>(sums + t, !k, w + k, next, stride, x + t * chunk, chunk, size);
    for (; t < tokens; t++, next = nullptr)
      meet_chunk<W, R, 1>(sums + t, !k, w + k, next, stride, x + t * chunk, chunk, size);
  }
}

// Products as sets of dot products.
template <class W>
struct Dots {
  typedef typename Step<W>::X X;

  static int64_t prepared_bytes(int64_t n, int64_t tokens) {
    int64_t chunk = chunk_size(tokens);
    return (n + chunk - 1) / chunk * chunk * tokens * sizeof(X);
  }

  // This thread's share of the tokens, n long, to their places in each chunk; all of them where
  // each thread has its own.
  static void prepare(void* prepared, Rows<const W> x, int64_t n, int64_t tokens,
                      bool shared = true) {
    constexpr int S = Step<W>::SIZE;
    int64_t chunk = chunk_size(tokens);
    Share mine(tokens, shared);
    for (int64_t t = mine.begin; t < mine.end; t++)
      for (int64_t k = 0; k < n; k += S) {
        W last[S] = {};
        const W* from = x.row(t, k);
        if (n - k < S) std::memcpy(last, from, (n - k) * sizeof(W)), from = last;
        Step<W>::prepare((X*)prepared + k / chunk * chunk * tokens + t * chunk + k % chunk, from);
      }
  }

  // out[t][r] = w[r] . x[t] for up to ROWS rows, as many at once as sums fit into the registers.
  static void product(float (*out)[ROWS], const W* w, int64_t stride, int64_t rows, const void* x,
                      int64_t n, int64_t tokens) {
    constexpr int R = LANES == 16 ? 6 : 2;
    alignas(64) V sums[TOKENS][ROWS];
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      some_rows<W, R>(sums, r, w + r * stride, stride, (const X*)x, n, tokens);
    for (; r < rows; r++)
      some_rows<W, 1>(sums, r, w + r * stride, stride, (const X*)x, n, tokens);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t first = 0; first < rows; first += LANES) {
        for (int64_t i = rows; i < first + LANES; i++) sums[t][i] = V{};
        store(&out[t][first], sums_of(&sums[t][first]));
      }
  }
};

// The cells of a weight.
template <class W>
struct CellsOf {
  typedef Values<W> Type;
};
#ifdef __AVX512BF16__
template <>
struct CellsOf<bf16> {
  typedef Pairs Type;
};
#endif

// Products with the tokens across vectors.
template <class W>
struct Across {
  typedef typename CellsOf<W>::Type Cells;
  static constexpr int PER = Cells::PER_CELL;
  static constexpr int DEEP = 64;  // cells that are summed before they are added to the others

  static int64_t steps(int64_t n) { return parts(n, PER * LANES); }
  static int64_t prepared_bytes(int64_t n, int64_t tokens) {
    return steps(n) * SQUARE * parts(tokens, LANES) * sizeof(float);
  }

  static void prepare(void* prepared, Rows<const W> x, int64_t n, int64_t tokens,
                      bool shared = true) {
    int64_t all = steps(n);
    Share mine(parts(tokens, LANES) * all, shared);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      int64_t t = i / all * LANES, k = i % all * PER * LANES;
      float* square = (float*)prepared + i * SQUARE;
      pack<Cells, false>(square, {x.at, x.stride, 1}, t, tokens - t, k, n - k, 1);
    }
  }

  // sums[r][v] += for COUNT cells: several, as not all addresses of rows fit into registers.
  template <int R, int N, int COUNT>
  GATEDFFN_INLINE void meet_cells(V (*sums)[N], const W* w, int64_t stride, const float* x,
                                  int64_t apart) {
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; k++) {
      V right[N];
#pragma GCC unroll 2
      for (int v = 0; v < N; v++) right[v] = load(x + k * LANES + v * apart);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < N; v++)
          sums[r][v] = Cells::join(sums[r][v], w + r * stride + k * PER, right[v]);
    }
  }

  // out[r][t] for R rows and N vectors of tokens, which are `apart` from each other.
  template <int R, int N>
  static void meet_rows(float* out, const W* w, int64_t stride, const float* x, int64_t apart,
                        int64_t n) {
    V sums[R][N] = {};
    int64_t whole = n / PER, k = 0;
    for (; k < whole;) {
      int64_t end = whole - k < DEEP ? whole : k + DEEP;
      V part[R][N] = {};
      for (; k + 4 <= end; k += 4)
        meet_cells<R, N, 4>(part, w + k * PER, stride, x + k * LANES, apart);
      for (; k < end; k++)
        meet_cells<R, N, 1>(part, w + k * PER, stride, x + k * LANES, apart);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) sums[r][v] += part[r][v];
    }
    for (int r = 0; r < R; r++) {
      W last[PER] = {};  // half a pair, where there is one
      std::memcpy(last, w + r * stride + whole * PER, (n - whole * PER) * sizeof(W));
      for (int v = 0; v < N; v++) {
        if (n > whole * PER)
          sums[r][v] = Cells::join(sums[r][v], last, load(x + whole * LANES + v * apart));
        store(out + r * 2 * LANES + v * LANES, sums[r][v]);
      }
    }
  }

  template <int N>
  static void some_tokens(float (*out)[ROWS], const W* w, int64_t stride, int64_t rows,
                          const float* x, int64_t apart, int64_t n, int64_t tokens) {
    constexpr int R = N == 1 ? 12 : LANES == 16 ? 8 : 6;  // whose sums fit into the registers
    alignas(64) float across[ROWS][2 * LANES];
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      meet_rows<R, N>(across[r], w + r * stride, stride, x, apart, n);
    for (; r < rows; r++) meet_rows<1, N>(across[r], w + r * stride, stride, x, apart, n);
    for (int64_t first = 0; first < rows; first += LANES)
      for (int v = 0; v < N; v++) {
        V square[LANES];
        for (int i = 0; i < LANES; i++)
          square[i] = first + i < rows ? load(across[first + i] + v * LANES) : V{};
        transpose(square);
        for (int i = 0; i < LANES && v * LANES + i < tokens; i++)
          store(&out[v * LANES + i][first], square[i]);
      }
  }

  static void product(float (*out)[ROWS], const W* w, int64_t stride, int64_t rows, const void* x,
                      int64_t n, int64_t tokens) {
    int64_t apart = steps(n) * SQUARE;
    const float* panel = (const float*)x;
    for (int64_t t = 0; t < tokens; t += 2 * LANES, panel += 2 * apart) {
      if (tokens - t > LANES)
        some_tokens<2>(out + t, w, stride, rows, panel, apart, n, tokens - t);
      else
        some_tokens<1>(out + t, w, stride, rows, panel, apart, n, tokens - t);
    }
  }
};

// out[t][r] for the rows from `first` on, bias added, rounded as W.
template <class Form, class W>
static void meet(float (*out)[ROWS], const Weight<W>& weight, int64_t first, int64_t rows,
                 const void* x, int64_t n, int64_t tokens) {
  Form::product(out, weight.at + first * weight.stride, weight.stride, rows, x, n, tokens);
  float add[ROWS] = {};
  if (weight.bias) widen(add, weight.bias + first, rows);
  for (int64_t t = 0; t < tokens; t++) {
    if (weight.bias)
      for (int i = 0; i < ROWS; i += LANES) store(&out[t][i], load(&out[t][i]) + load(add + i));
    round_as<W>(out[t], ROWS);
  }
}

// Hidden values of some units, from `r` on; gate and up are saved where there is a place.
template <class Form, class W>
static void some_hidden(const Formula& formula, const Weight<W>& gate, const Weight<W>& up,
                        int64_t r, int64_t rows, const void* inputs, int64_t n, int64_t tokens,
                        Rows<W> hidden, Rows<W> saved_gate, Rows<W> saved_up) {
  alignas(64) float a[TOKENS][ROWS], b[TOKENS][ROWS];
  meet<Form>(a, gate, r, rows, inputs, n, tokens);
  if (up.at) meet<Form>(b, up, r, rows, inputs, n, tokens);
  for (int64_t t = 0; t < tokens; t++) {
    if (saved_gate.at) narrow(saved_gate.row(t, r), a[t], rows);
    if (saved_up.at) narrow(saved_up.row(t, r), b[t], rows);
    formula.hidden(a[t], a[t], b[t], r, rows);
    narrow(hidden.row(t, r), a[t], rows);
  }
}

// `up` and `down` may be missing (at is null): without `down` the hidden values are the result.
// Gate and up are saved where there is a place. `scratch` holds few_bytes() bytes.
template <class Form, class W>
static void few_by(const Formula& formula, Rows<const W> x, Weight<W> gate, Weight<W> up,
                   Weight<W> down, Rows<W> y, Rows<W> saved_gate, Rows<W> saved_up,
                   int64_t tokens, int64_t d_model, int64_t d_hidden, int64_t d_out, char* scratch,
                   int threads) {
  char* inputs = scratch;
  char* middle = inputs + Form::prepared_bytes(d_model, tokens);
  Rows<W> hidden = {(W*)(middle + Form::prepared_bytes(d_hidden, tokens)), d_hidden};
  int64_t next_hidden = 0, next_out = 0;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float a[TOKENS][ROWS];
    Form::prepare(inputs, x, d_model, tokens);
#pragma omp barrier
    for (;;) {
      int64_t r = __atomic_fetch_add(&next_hidden, ROWS, __ATOMIC_RELAXED);
      if (r >= d_hidden) break;
      int64_t rows = d_hidden - r < ROWS ? d_hidden - r : ROWS;
      some_hidden<Form>(formula, gate, up, r, rows, inputs, d_model, tokens,
                        down.at ? hidden : y, saved_gate, saved_up);
    }
    if (down.at) {
#pragma omp barrier
      Form::prepare(middle, {hidden.at, d_hidden}, d_hidden, tokens);
#pragma omp barrier
      for (;;) {
        int64_t r = __atomic_fetch_add(&next_out, ROWS, __ATOMIC_RELAXED);
        if (r >= d_out) break;
        int64_t rows = d_out - r < ROWS ? d_out - r : ROWS;
        meet<Form>(a, down, r, rows, middle, d_hidden, tokens);
        for (int64_t t = 0; t < tokens; t++) narrow(y.row(t, r), a[t], rows);
      }
    }
  }
}

// Whether weights are converted to be multiplied.
template <class W>
constexpr bool is_converted() {
  return sizeof(W) < sizeof(float) && CellsOf<W>::Type::PER_CELL == 1;
}

// Calls body with the form for so many tokens.
template <class W, class Body>
static void with_form(int64_t tokens, int64_t d_model, Body body) {
  // What has to be converted would be for every vector of tokens.
  constexpr int PER = CellsOf<W>::Type::PER_CELL;
  if constexpr (!is_converted<W>()) {
    bool in_short_rows = tokens > 2 && tokens * SHORT / PER > d_model;
    if (tokens >= ACROSS || in_short_rows) return body(Across<W>());
  }
  body(Dots<W>());
}

template <class W>
static int64_t few_bytes(int64_t tokens, int64_t d_model, int64_t d_hidden) {
  int64_t bytes = 0;
  with_form<W>(tokens, d_model, [&](auto form) {
    bytes = form.prepared_bytes(d_model, tokens) + form.prepared_bytes(d_hidden, tokens);
  });
  return bytes + tokens * d_hidden * sizeof(W);
}

template <class W, class... Rest>
static void few(const Formula& formula, Rows<const W> x, Weight<W> gate, Weight<W> up,
                Weight<W> down, Rows<W> y, Rows<W> saved_gate, Rows<W> saved_up, int64_t tokens,
                int64_t d_model, Rest... rest) {
  with_form<W>(tokens, d_model, [&](auto form) {
    few_by<decltype(form), W>(formula, x, gate, up, down, y, saved_gate, saved_up, tokens,
                               d_model, rest...);
  });
}

}  // namespace gatedffn
