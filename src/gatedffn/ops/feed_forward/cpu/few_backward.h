// The layer's gradients for few tokens: every weight is read once, as it lies, and every gradient
// is written once. In between all is float32, of which there is little.
#pragma once
#include "blocks.h"
#include "few.h"

namespace gatedffn {

constexpr int TALL = LANES == 16 ? 8 : 4;  // rows of sums at a time, with 3 vectors each
constexpr int WIDE = 6;                    // vectors of a row at a time, where rows are fewer
// Rows of `b` at a time: so many streams are fetched ahead, and sums of short sums are more exact.
constexpr int STREAMS = 32;
static_assert(STREAMS >= TOKENS, "what is summed over tokens is written at once");

// A term of a product: the sum over k of a[i][k] b[k][j].
template <class B>
struct Term {
  Operand<float> a;
  Rows<const B> b;
};

// out[R][N vectors] = a b, or += if `add`; of a row shorter than a vector there are `some`. The
// structs are none here: handed on in memory, they would be waited for.
template <int R, int N, class B>
static void meet_rows(float* out, int64_t stride, bool add, const float* a, int64_t a_row,
                      int64_t a_deep, const B* b, int64_t b_stride, int64_t deep, int some) {
  V sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)  // one by one: a call that clears memory takes longer
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) sums[r][v] = V{};
  for (int64_t k = 0; k < deep; k++, a += a_deep, b += b_stride) {
    V right[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++)
      right[v] = N == 1 && some ? load_some(b, some) : load(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V left = set(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) {
      float* at = out + r * stride + v * LANES;
      store(at, add ? load(at) + sums[r][v] : sums[r][v]);
    }
}

// The same for any number of rows, and `vectors` of them.
template <int N, class B>
static void meet_block(float* out, int64_t stride, bool add, const Operand<float>& a,
                       const Rows<const B>& b, int64_t rows, int64_t deep, int64_t vectors,
                       int some) {
  if constexpr (N > 1)
    if (vectors < N)
      return meet_block<N - 1>(out, stride, add, a, b, rows, deep, vectors, some);
  int64_t i = 0;
  auto next = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; i + R <= rows; i += R)
      meet_rows<R, N>(out + i * stride, stride, add, a.at + i * a.row, a.row, a.deep, b.at,
                      b.stride, deep, some);
  };
  if constexpr (N <= WIDE / 2) next(std::integral_constant<int, TALL>());
  if constexpr (TALL > 4) next(std::integral_constant<int, 4>());
  next(std::integral_constant<int, 2>());
  next(std::integral_constant<int, 1>());
}

// The vectors of a block of columns, and how many blocks there are. The last one begins earlier if
// it would end behind the row, so that some columns are computed twice.
struct Panels {
  int64_t vectors, count;
  Panels(int64_t rows, int64_t columns) {
    int64_t all = parts(columns, LANES);
    vectors = parts(all, parts(all, rows < TALL ? WIDE : WIDE / 2));
    vectors = std::max<int64_t>(1, std::min(vectors, columns / LANES));
    count = parts(columns, vectors * LANES);
  }
  int64_t floats(int64_t rows) const { return count * rows * vectors * LANES; }
};

// out = the sum of `count` terms. `sums` has floats() numbers, for up to TOKENS rows; where there
// are more of them, no more than STREAMS rows of `b`.
template <class B, class O>
static void combine(const Term<B>* terms, int count, Rows<O> out, int64_t rows, int64_t columns,
                    int64_t deep, float* sums, int threads) {
  constexpr bool wide = sizeof(O) == sizeof(float);
  Panels panels(rows, columns);
  int64_t width = panels.vectors * LANES, chunks = parts(deep, STREAMS);
  int some = columns < LANES ? int(columns) : 0;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float near[TOKENS * WIDE * LANES];
    Share mine(parts(rows, TOKENS) * panels.count);
    for (int64_t c = 0; c < count * chunks; c++) {
      const Term<B>& term = terms[c / chunks];
      int64_t k = c % chunks * STREAMS;
      bool first = c == 0, last = c + 1 == count * chunks;
      for (int64_t i = mine.begin; i < mine.end; i++) {
        int64_t r = i / panels.count * TOKENS, panel = i % panels.count;
        int64_t some_rows = std::min<int64_t>(TOKENS, rows - r);
        int64_t column = some ? 0 : std::min(panel * width, columns - width);
        bool direct = wide && first && last && !some;
        float* to = first && last ? near : sums + panel * rows * width;
        meet_block<WIDE>(direct ? (float*)out.row(r, column) : to, direct ? out.stride : width,
                         !first,
                         {term.a.at + r * term.a.row + k * term.a.deep, term.a.row, term.a.deep},
                         Rows<const B>{term.b.row(k, column), term.b.stride}, some_rows,
                         std::min<int64_t>(STREAMS, deep - k), panels.vectors, some);
        for (int64_t row = 0; last && !direct && row < some_rows; row++)
          narrow(out.row(r + row, column), to + row * width, some ? some : width);
      }
    }
  }
}

template <class T>
struct BackwardOfFew {
  int64_t tokens, d_model, d_hidden, d_out;
  int threads;

  int64_t matrix_bytes(int64_t columns) const { return lines(4 * columns) * tokens; }
  int64_t learned_bytes() const { return lines(threads * d_hidden * sizeof(double)); }
  int64_t sums_bytes() const {
    return 4 * std::max(Panels(tokens, d_hidden).floats(tokens),
                        Panels(tokens, d_model).floats(tokens));
  }

  // Matrices of float32: the gradient, gate, up, their gradients and the hidden values; and those
  // three that are computed again.
  int64_t scratch_bytes() const {
    return matrix_bytes(d_out) + 8 * matrix_bytes(d_hidden) + 2 * learned_bytes() +
           std::max(sums_bytes(), few_bytes<T>(tokens, d_model, d_hidden));
  }

  // Gate and up are computed again where they are not saved. Without `down` the gradient is that of
  // the hidden values.
  template <class X>
  void run(const Formula& formula, Rows<const T> x, const Weight<T>& gate, const Weight<T>& up,
           Rows<const T> down, Rows<const T> grad, Rows<const T> saved_gate,
           Rows<const T> saved_up, const Gradients<T, T, X>& wanted, char* scratch) const {
    auto place = [&](int64_t bytes) {
      char* at = scratch;
      scratch += bytes;
      return at;
    };
    auto matrix = [&](int64_t columns) -> Rows<float> {
      return {(float*)place(matrix_bytes(columns)), lines(4 * columns) / 4};
    };
    auto again = [&]() -> Rows<T> { return {(T*)place(matrix_bytes(d_hidden)), d_hidden}; };
    auto widened = [&](Rows<const T> of, int64_t columns) -> Rows<const float> {
      if constexpr (sizeof(T) == sizeof(float)) return of;
      if (!of.at) return {};
      Rows<float> made = matrix(columns);
      for (int64_t t = 0; t < tokens; t++) widen(made.row(t, 0), of.row(t, 0), columns);
      return {made.at, made.stride};
    };
    auto product = [&](auto a, auto b, auto out, int64_t rows, int64_t columns, int64_t deep) {
      Term<std::remove_const_t<std::remove_pointer_t<decltype(b.at)>>> term = {a, {b.at, b.stride}};
      combine(&term, 1, out, rows, columns, deep, (float*)scratch, threads);
    };

    if (wanted.down_bias)
      column_sums(grad, wanted.down_bias, false, tokens, d_out, threads, wanted.weights);
    bool beyond_down = wanted.beyond_down();
    if (!beyond_down && !wanted.down.at) return;
    if (!saved_gate.at) {
      Rows<T> left = again(), right = up.at ? again() : Rows<T>{}, made = again();
      few<T>(formula, x, gate, up, {}, made, left, right, tokens, d_model, d_hidden, d_hidden,
             scratch, threads);
      saved_gate = {left.at, left.stride}, saved_up = {right.at, right.stride};
    }
    Rows<const float> d_y = widened(grad, d_out), a = widened(saved_gate, d_hidden);
    Rows<const float> b = widened(saved_up, d_hidden), d_values = d_y;
    Rows<float> hidden = wanted.down.at ? matrix(d_hidden) : Rows<float>{};
    Rows<float> d_gate = matrix(d_hidden), d_up = up.at ? matrix(d_hidden) : Rows<float>{};
    if (beyond_down) {
      double* learned[2];
      for (int k = 0; k < 2; k++) {
        learned[k] = wanted.learned[k] ? (double*)place(learned_bytes()) : nullptr;
        if (learned[k]) std::fill(learned[k], learned[k] + threads * d_hidden, 0.0);
      }
      if (down.at) {
        // Where d_gate will be, which is made of it element by element.
        product(along(d_y), down, d_gate, tokens, d_hidden, d_out);
        d_values = {d_gate.at, d_gate.stride};
      }
      gating_backward<float>(formula, d_values, a, b,
                             {d_gate, d_up, hidden, {learned[0], learned[1]}, wanted.weights,
                              wanted.of_weights},
                             tokens, d_hidden, threads);
      for (int k = 0; k < 2; k++)
        for (int64_t i = 0; learned[k] && i < d_hidden; i++) {
          double sum = 0.0;
          for (int j = 0; j < threads; j++) sum += learned[k][j * d_hidden + i];
          wanted.learned[k][i] = sum;
        }
    } else {
      gating<float>(formula, a, b, hidden, tokens, d_hidden, threads);
    }
    if (wanted.down.at) product(across(d_y), hidden, wanted.down, d_out, d_hidden, tokens);
    Term<T> terms[2] = {{along(d_gate), {gate.at, gate.stride}}, {along(d_up), {up.at, up.stride}}};
    if (wanted.x.at)
      combine(terms, up.at ? 2 : 1, wanted.x, tokens, d_model, d_hidden, (float*)scratch, threads);
    auto branch = [&](Rows<float> d, Rows<T> sum, T* bias) {
      if (sum.at) product(across(d), x, sum, d_hidden, d_model, tokens);
      if (bias)
        column_sums(Rows<const float>{d.at, d.stride}, bias, false, tokens, d_hidden, threads);
    };
    branch(d_gate, wanted.gate, wanted.gate_bias);
    if (up.at) branch(d_up, wanted.up, wanted.up_bias);
  }
};

}  // namespace gatedffn
