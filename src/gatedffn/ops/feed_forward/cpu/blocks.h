// The layer and its gradients by products of blocks: each is one call, whatever it is made of.
#pragma once
#include "../../gating/cpu.h"
#include "products.h"

namespace gatedffn {

// Hidden values of a patch: the sums of both projections become gate and up, rounded as T, and what
// the gate makes of them, each where there is a place.
template <class Kernel, class T = typename Kernel::Source>
static void gate_patch(const Cut<Kernel>& cut, const Patch& patch, float** sums,
                       const Formula& formula, const Weight<T>& gate, const Weight<T>& up,
                       Rows<T> hidden, Rows<T> saved_gate, Rows<T> saved_up) {
  alignas(64) float biases[2][Cut<Kernel>::WIDEST] = {};
  if (gate.bias) widen(biases[0], gate.bias + patch.column, patch.columns);
  if (up.bias) widen(biases[1], up.bias + patch.column, patch.columns);
  for (int64_t r = 0; r < patch.rows; r++) {
    float *a = sums[0] + r * cut.width, *b = up.at ? sums[1] + r * cut.width : nullptr;
    int64_t token = patch.row + r;
    if (gate.bias) plus(a, biases[0], patch.columns);
    if (up.bias) plus(b, biases[1], patch.columns);
    round_as<T>(a, patch.columns);
    if (b) round_as<T>(b, patch.columns);
    if (saved_gate.at) narrow(saved_gate.row(token, patch.column), a, patch.columns);
    if (saved_up.at) narrow(saved_up.row(token, patch.column), b, patch.columns);
    if (!hidden.at) continue;
    formula.hidden(a, a, b, patch.column, patch.columns);
    narrow(hidden.row(token, patch.column), a, patch.columns);
  }
}

// The same of x. `up` may be missing (at is null).
template <class Kernel, class T = typename Kernel::Source>
static void hidden_values(const Formula& formula, Operand<T> x, const Weight<T>& gate,
                          const Weight<T>& up, Rows<T> hidden, Rows<T> saved_gate,
                          Rows<T> saved_up, int64_t tokens, int64_t d_model, int64_t d_hidden,
                          float* packed, int threads) {
  Cut<Kernel> cut(tokens, d_hidden, d_model, threads);
  Operand<T> weights[2] = {{gate.at, gate.stride, 1}, {up.at, up.stride, 1}};
  auto finish = [&](const Patch& patch, float** sums) {
    gate_patch(cut, patch, sums, formula, gate, up, hidden, saved_gate, saved_up);
  };
  if (up.at) products<Kernel, 2>(cut, x, weights, packed, threads, finish);
  else products<Kernel, 1>(cut, x, weights, packed, threads, finish);
}

// A matrix as the left operand of a product, or turned as the left one, or as the right one: the
// dimension that is summed over runs along its rows, or across them.
template <class T>
static Operand<std::remove_const_t<T>> along(Rows<T> x) { return {x.at, x.stride, 1}; }
template <class T>
static Operand<std::remove_const_t<T>> across(Rows<T> x) { return {x.at, 1, x.stride}; }

// The bytes that so many products with one left operand pack into.
template <class Kernel>
static int64_t packed_bytes(int count, int64_t rows, int64_t columns, int64_t deep, int threads) {
  return Cut<Kernel>(rows, columns, deep, threads).scratch_bytes(count, threads);
}

// The layer for `tile` tokens at a time, or a few less, so that every time has about as many. In
// scratch memory are their hidden values, and behind these what the products pack.
template <class Kernel, class T = typename Kernel::Source>
struct LayerOfBlocks {
  int64_t tokens, d_model, d_hidden, d_out, tile;
  int threads;

  LayerOfBlocks(int64_t tokens, int64_t d_model, int64_t d_hidden, int64_t d_out, int64_t most,
                int threads)
      : tokens(tokens), d_model(d_model), d_hidden(d_hidden), d_out(d_out),
        tile(tokens ? parts(tokens, parts(tokens, most)) : 0), threads(threads) {}

  int64_t hidden_bytes() const { return parts(tile * d_hidden * sizeof(T), 64) * 64; }

  int64_t scratch_bytes() const {
    if (!tokens) return 0;
    int64_t most = 0;
    // The last tokens are fewer, and may pack more: they may not be cut again.
    for (int64_t rows : {tile, tokens - (tokens - 1) / tile * tile})
      most = std::max({most, packed_bytes<Kernel>(2, rows, d_hidden, d_model, threads),
                       packed_bytes<Kernel>(1, rows, d_out, d_hidden, threads)});
    return hidden_bytes() + most;
  }

  // y = hidden W_down^T + bias. Without `down` the hidden values are the result. Gate and up are
  // saved where there is a place.
  void run(const Formula& formula, Rows<const T> x, const Weight<T>& gate, const Weight<T>& up,
           const Weight<T>& down, Rows<T> y, Rows<T> saved_gate, Rows<T> saved_up,
           char* scratch) const {
    Rows<T> hidden = {(T*)scratch, d_hidden};
    float* packed = (float*)(scratch + hidden_bytes());
    for (int64_t t = 0; t < tokens; t += tile) {
      int64_t rows = std::min(tile, tokens - t);
      Rows<T> out = y.from(t);
      hidden_values<Kernel>(formula, along(x.from(t)), gate, up, down.at ? hidden : out,
                            saved_gate.from(t), saved_up.from(t), rows, d_model, d_hidden, packed,
                            threads);
      if (!down.at) continue;
      if (down.bias)
        for (int64_t r = 0; r < rows; r++) std::memcpy(out.row(r, 0), down.bias, d_out * sizeof(T));
      product<Kernel, T>(along(hidden), along(Rows<const T>{down.at, down.stride}), out,
                         down.bias != nullptr, rows, d_out, d_hidden, packed, threads);
    }
  }
};

// Some rows of a matrix from `r` on, and some columns from `c` on.
template <class T>
static Rows<T> part(Rows<T> x, int64_t r, int64_t c) {
  return {x.at ? x.row(r, c) : nullptr, x.stride};
}

// Some rows of a weight.
template <class T>
static Weight<T> part(const Weight<T>& w, int64_t r) {
  return {w.at ? w.at + r * w.stride : nullptr, w.stride, w.bias ? w.bias + r : nullptr};
}

// sums[c] = the sum of x[r][c] over all r, added to what is there if `add`. With `weights` each row
// is multiplied by its own.
template <class T, class O>
static void column_sums(Rows<const T> x, O* sums, bool add, int64_t rows, int64_t columns,
                        int threads, const float* weights = nullptr) {
  constexpr int64_t ACROSS = 256;
#pragma omp parallel num_threads(threads)
  {
    Share share(parts(columns, ACROSS));
    for (int64_t i = share.begin; i < share.end; i++) {
      alignas(64) float line[ACROSS] = {};
      alignas(64) double all[ACROSS] = {};
      int64_t c = i * ACROSS, n = std::min(ACROSS, columns - c);
      for (int64_t r = add ? -1 : 0; r < rows; r++) {
        if (r < 0) widen(line, sums + c, n);
        else widen(line, x.row(r, c), n);
        double weight = weights && r >= 0 ? weights[r] : 1.0;
        for (int64_t k = 0; k < n; k += LANES)
          for (int l = 0; l < LANES; l++) all[k + l] += weight * line[k + l];
      }
      for (int64_t k = 0; k < n; k++) line[k] = float(all[k]);
      narrow(sums + c, line, n);
    }
  }
}

// Where gradients are written, null where they are not wanted. Those of weights and biases may be
// wider than the operands, as may those of x; of phi's learned parameters they are sums for each
// hidden unit.
template <class T, class O, class X = T>
struct Gradients {
  Rows<X> x;
  Rows<O> gate, up, down;
  O *gate_bias, *up_bias, *down_bias;
  double* learned[2];
  // What each token's output is weighed with, and where these weights' gradients are added, but for
  // what the bias of W_down has in them.
  const float* weights = nullptr;
  float* of_weights = nullptr;

  // Whether there is anything that W_down lies before, or that its gradient needs of there.
  bool beyond_down() const {
    return x.at || gate.at || up.at || gate_bias || up_bias || learned[0] || learned[1] || weights;
  }

  // Those of the tokens from `t` on and the hidden units from `u` on.
  Gradients from(int64_t t, int64_t u) const {
    auto of = [&](auto* at) { return at ? at + u : nullptr; };
    return {x.from(t), gate.from(u), up.from(u), part(down, 0, u), of(gate_bias), of(up_bias),
            down_bias, {of(learned[0]), of(learned[1])}, weights ? weights + t : nullptr,
            of_weights ? of_weights + t : nullptr};
  }
};

// The gradients, for `tile` tokens and `units` hidden units at a time. In scratch memory is what
// lies between the products: `places` matrices, the sums of learned parameters for each thread, and
// what the products pack.
template <class Kernel, class T = typename Kernel::Source>
struct BackwardOfBlocks {
  int64_t tokens, d_model, d_hidden, d_out, tile, units, places;
  int threads;

  int64_t place_bytes() const { return parts(tile * units * sizeof(T), 64) * 64; }
  int64_t learned_bytes() const { return parts(threads * units * sizeof(double), 64) * 64; }

  int64_t scratch_bytes() const {
    if (!tokens) return 0;
    int64_t most = 0;
    // The last of them are fewer, and may pack more: they may be cut otherwise.
    for (int64_t rows : {tile, tokens - (tokens - 1) / tile * tile})
      for (int64_t wide : {units, d_hidden - (d_hidden - 1) / units * units})
        most = std::max({most, packed_bytes<Kernel>(2, rows, wide, d_model, threads),
                         packed_bytes<Kernel>(1, rows, wide, d_out, threads),
                         packed_bytes<Kernel>(1, d_out, wide, rows, threads),
                         packed_bytes<Kernel>(1, wide, d_model, rows, threads),
                         packed_bytes<Kernel>(1, rows, d_model, wide, threads)});
    return places * place_bytes() + 2 * learned_bytes() + most;
  }

  // Gate and up are computed again where they are not saved. Without `down` the gradient is that of
  // the hidden values.
  template <class O, class X>
  void run(const Formula& formula, Rows<const T> x, const Weight<T>& gate, const Weight<T>& up,
           Rows<const T> down, Rows<const T> grad, Rows<const T> saved_gate,
           Rows<const T> saved_up, const Gradients<T, O, X>& wanted, char* scratch) const {
    if (wanted.down_bias)
      column_sums(grad, wanted.down_bias, false, tokens, d_out, threads, wanted.weights);
    int64_t end = wanted.beyond_down() || wanted.down.at ? tokens : 0;
    for (int64_t t = 0; t < end; t += tile)
      for (int64_t u = 0; u < d_hidden; u += units) {
        Formula some = formula;
        formula.at(u, some.parameters);
        step(some, x.from(t), part(gate, u), part(up, u), part(down, 0, u),
             part(grad, t, down.at ? 0 : u), part(saved_gate, t, u), part(saved_up, t, u),
             wanted.from(t, u), std::min(tile, tokens - t), std::min(units, d_hidden - u), t > 0,
             u > 0, scratch);
      }
  }

  // Those of `rows` tokens and `wide` hidden units. Sums over tokens hold something already if
  // `begun`, and those over hidden units, which are the gradient of x, if `x_begun`.
  template <class O, class X>
  void step(const Formula& formula, Rows<const T> x, const Weight<T>& gate, const Weight<T>& up,
            Rows<const T> down, Rows<const T> grad, Rows<const T> a, Rows<const T> b,
            const Gradients<T, O, X>& wanted, int64_t rows, int64_t wide, bool begun, bool x_begun,
            char* scratch) const {
    bool beyond_down = wanted.beyond_down();
    auto place = [&](bool needed) {
      Rows<T> made = {needed ? (T*)scratch : nullptr, units};
      if (needed) scratch += place_bytes();
      return made;
    };
    Rows<T> hidden = place(wanted.down.at);
    Rows<T> d_gate = place(beyond_down), d_up = place(beyond_down && up.at);
    Rows<T> a_again = place(beyond_down && !a.at), b_again = place(a_again.at && up.at);
    double* learned[2];
    for (int k = 0; k < 2; k++, scratch += learned_bytes())
      learned[k] = wanted.learned[k] ? (double*)scratch : nullptr;
    float* packed = (float*)scratch;

    if (!a.at) {
      hidden_values<Kernel>(formula, along(x), gate, up, beyond_down ? Rows<T>{} : hidden, a_again,
                            b_again, rows, d_model, wide, packed, threads);
      a = {a_again.at, units}, b = {b_again.at, units};
    } else if (!beyond_down) {
      gating<T>(formula, a, b, hidden, rows, wide, threads);
    }
    if (beyond_down) {
      Rows<const T> d_hidden_values = grad;
      if (down.at) {
        // Where d_gate will be, which is made of it element by element.
        product<Kernel, T>(along(grad), across(down), d_gate, false, rows, wide, d_out, packed,
                           threads);
        d_hidden_values = {d_gate.at, units};
      }
      for (double* sums : learned)
        if (sums) std::fill(sums, sums + threads * wide, 0.0);
      gating_backward<T>(formula, d_hidden_values, a, b,
                         {d_gate, d_up, hidden, {learned[0], learned[1]}, wanted.weights,
                          wanted.of_weights},
                         rows, wide, threads);
      for (int k = 0; k < 2; k++)
        for (int64_t i = 0; learned[k] && i < wide; i++) {
          double sum = begun ? wanted.learned[k][i] : 0.0;
          for (int j = 0; j < threads; j++) sum += learned[k][j * wide + i];
          wanted.learned[k][i] = sum;
        }
    }
    if (hidden.at)
      product<Kernel, O>(across(grad), across(hidden), wanted.down, begun, d_out, wide, rows,
                         packed, threads);
    auto branch = [&](Rows<T> d, const Weight<T>& weight, Rows<O> sum, O* bias, bool add) {
      if (sum.at)
        product<Kernel, O>(across(d), across(x), sum, begun, wide, d_model, rows, packed, threads);
      if (bias) column_sums(Rows<const T>{d.at, d.stride}, bias, begun, rows, wide, threads);
      if (wanted.x.at)
        product<Kernel, X>(along(d), across(Rows<const T>{weight.at, weight.stride}), wanted.x, add,
                           rows, d_model, wide, packed, threads);
    };
    branch(d_gate, gate, wanted.gate, wanted.gate_bias, x_begun);
    if (up.at) branch(d_up, up, wanted.up, wanted.up_bias, true);
  }
};

}  // namespace gatedffn
