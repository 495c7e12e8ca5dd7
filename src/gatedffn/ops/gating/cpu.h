// Gating and its gradients, element by element, in one pass over memory: reference.py defines them.
#pragma once
#include "../cpu.h"

namespace gatedffn {

// Calls body(row, column, n) for every block of a matrix, this thread's share of them: of blocks, or
// of whole rows.
template <class Body>
static inline void each_block(int64_t rows, int64_t columns, Body body, bool whole_rows = false) {
  int64_t across = (columns + BLOCK - 1) / BLOCK, together = whole_rows ? across : 1;
  Share share(rows * across / together);
  for (int64_t i = share.begin * together; i < share.end * together; i++) {
    int64_t column = i % across * BLOCK;
    body(i / across, column, columns - column < BLOCK ? columns - column : BLOCK);
  }
}

template <class T>
static void gating(const Formula& formula, Rows<const T> gate, Rows<const T> up, Rows<T> hidden,
                   int64_t rows, int64_t columns, int threads) {
#pragma omp parallel num_threads(threads)
  each_block(rows, columns, [&](int64_t r, int64_t c, int64_t n) {
    alignas(64) float a[BLOCK], b[BLOCK], h[BLOCK];
    widen(a, gate.row(r, c), n);
    if (formula.gated()) widen(b, up.row(r, c), n);
    formula.hidden(h, a, b, c, n);
    narrow(hidden.row(r, c), h, n);
  });
}

// With `weights` the gradient that comes in is that of the hidden values times their row's weight,
// and so are those that are written to `hidden`.
template <class T>
struct Wanted {
  Rows<T> d_gate, d_up, hidden;
  double* sums[2];  // by phi's parameters: for each thread a row of `columns`; null: not wanted
  const float* weights = nullptr;
  float* of_weights = nullptr;  // where each weight's gradient is added; null: not wanted
};

template <class T>
static void gating_backward(const Formula& formula, Rows<const T> grad, Rows<const T> gate,
                            Rows<const T> up, const Wanted<T>& wanted, int64_t rows,
                            int64_t columns, int threads) {
#pragma omp parallel num_threads(threads)
  each_block(rows, columns, [&](int64_t r, int64_t c, int64_t n) {
    alignas(64) float a[BLOCK], b[BLOCK], d[BLOCK], out[BLOCK], given[BLOCK];
    alignas(64) float value[BLOCK], slope[BLOCK], other[BLOCK], other_slope[BLOCK];
    Parameter p[3];
    formula.at(c, p);
    widen(a, gate.row(r, c), n);
    widen(d, grad.row(r, c), n);
    formula.phi().both(value, slope, a, p, n);
    if (formula.gated()) {
      widen(b, up.row(r, c), n);
      formula.psi().both(other, other_slope, b, p + 2, n);
    }
    V weight = set(wanted.weights ? wanted.weights[r] : 1.0f);
    if (wanted.of_weights) std::memcpy(given, d, sizeof d);
    // through = grad psi(up): what reaches phi.
    for (int64_t i = 0; i < n; i += LANES) {
      V through = load(d + i) * weight, h = load(value + i);
      if (formula.gated()) {
        store(other_slope + i, through * h * load(other_slope + i));
        through = through * load(other + i);
        h = h * load(other + i);
      }
      store(d + i, through);
      store(value + i, h);
      store(out + i, through * load(slope + i));
    }
    if (wanted.of_weights) wanted.of_weights[r] += dot(given, value, n);
    if (wanted.weights)
      for (int64_t i = 0; i < n; i += LANES) store(value + i, load(value + i) * weight);
    if (wanted.d_gate.at) narrow(wanted.d_gate.row(r, c), out, n);
    if (wanted.d_up.at) narrow(wanted.d_up.row(r, c), other_slope, n);
    if (wanted.hidden.at) narrow(wanted.hidden.row(r, c), value, n);
    for (int k = 0; k < 2; k++) {
      if (!wanted.sums[k]) continue;
      formula.phi().by[k](out, a, p, n);
      double* sums = wanted.sums[k] + omp_get_thread_num() * columns + c;
      for (int64_t i = 0; i < n; i++) sums[i] += double(d[i]) * double(out[i]);
    }
  }, wanted.of_weights != nullptr);
}

}  // namespace gatedffn
