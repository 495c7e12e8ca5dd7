// The layer and its gradients by products of blocks: each is one call, whatever it is made of.
#pragma once
#include "../../gating/cpu.h"
#include "products.h"

namespace gatedffn {

// The hidden values: both projections of x, rounded as T and saved where there is a place, and what
// the gate makes of them. `up` may be missing (at is null).
template <class Kernel, class T = typename Kernel::Source>
static void hidden_values(const Formula& formula, Operand<T> x, const Weight<T>& gate,
                          const Weight<T>& up, Rows<T> hidden, Rows<T> saved_gate,
                          Rows<T> saved_up, int64_t tokens, int64_t d_model, int64_t d_hidden,
                          float* packed, int threads) {
  Cut<Kernel> cut(tokens, d_hidden, d_model, threads);
  Operand<T> weights[2] = {{gate.at, gate.stride, 1}, {up.at, up.stride, 1}};
  auto finish = [&](const Patch& patch, float** sums) {
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
      formula.hidden(a, a, b, patch.column, patch.columns);
      narrow(hidden.row(token, patch.column), a, patch.columns);
    }
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

// Where gradients are added up; those of weights may be wider than the operands.
template <class T, class O>
struct Sums {
  Rows<T> x;
  bool add_x;
  Rows<O> gate, up, down;
  bool add;
};

// The most that one of the products of the gradients packs into.
template <class Kernel>
static int64_t blocks_backward_bytes(int64_t tokens, int64_t d_model, int64_t d_hidden,
                                     int64_t d_out, int threads) {
  return std::max({packed_bytes<Kernel>(1, tokens, d_hidden, d_out, threads),
                   packed_bytes<Kernel>(1, d_out, d_hidden, tokens, threads),
                   packed_bytes<Kernel>(1, d_hidden, d_model, tokens, threads),
                   packed_bytes<Kernel>(1, tokens, d_model, d_hidden, threads)});
}

// The gradients of some tokens and some hidden units. `wanted` has places for what is between the
// products; of the sums, those that are not wanted have none.
template <class Kernel, class T, class O>
static void blocks_backward(const Formula& formula, Rows<const T> x, Rows<const T> gate,
                            Rows<const T> up, Rows<const T> down, Rows<const T> grad,
                            Rows<const T> saved_gate, Rows<const T> saved_up, Wanted<T> wanted,
                            Sums<T, O> sums, int64_t tokens, int64_t d_model, int64_t d_hidden,
                            int64_t d_out, float* packed, int threads) {
  Rows<const T> d_value = grad;
  if (down.at) {
    // Where d_gate will be, which is made of it element by element.
    product<Kernel, T>(along(grad), across(down), wanted.d_gate, false, tokens, d_hidden, d_out,
                       packed, threads);
    d_value = {wanted.d_gate.at, wanted.d_gate.stride};
  }
  gating_backward<T>(formula, d_value, saved_gate, saved_up, wanted, tokens, d_hidden, threads);
  if (sums.down.at)
    product<Kernel, O>(across(grad), across(wanted.hidden), sums.down, sums.add, d_out, d_hidden,
                       tokens, packed, threads);
  auto branch = [&](Rows<T> d, Rows<const T> weight, Rows<O> sum) {
    if (sum.at)
      product<Kernel, O>(across(d), across(x), sum, sums.add, d_hidden, d_model, tokens, packed,
                         threads);
    if (sums.x.at)
      product<Kernel, T>(along(d), across(weight), sums.x, sums.add_x, tokens, d_model, d_hidden,
                         packed, threads);
    sums.add_x = true;
  };
  branch(wanted.d_gate, gate, sums.gate);
  if (up.at) branch(wanted.d_up, up, sums.up);
}

}  // namespace gatedffn
