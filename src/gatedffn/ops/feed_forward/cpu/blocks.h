// The layer and its gradients by products of blocks: each is one call, whatever it is made of.
#pragma once
#include "../../gating/cpu.h"
#include "products.h"

namespace gatedffn {

// The hidden values: both projections of x, rounded as T and saved where there is a place, and what
// the gate makes of them. `linear` may be missing (at is null).
template <class Kernel, class T = typename Kernel::Source>
static void hidden_values(const Gate& gate, Operand<T> x, const Weight<T>& activated,
                          const Weight<T>& linear, Rows<T> hidden, Rows<T> save_activated,
                          Rows<T> save_linear, int64_t tokens, int64_t d_model, int64_t d_hidden,
                          float* scratch, int threads) {
  Plan<Kernel> plan(tokens, d_hidden, d_model, threads);
  Operand<T> weights[2] = {{activated.at, activated.stride, 1}, {linear.at, linear.stride, 1}};
  auto finish = [&](const Block& block, float** sums) {
    alignas(64) float biases[2][Plan<Kernel>::WIDEST] = {};
    if (activated.bias) widen(biases[0], activated.bias + block.column, block.columns);
    if (linear.bias) widen(biases[1], linear.bias + block.column, block.columns);
    for (int64_t r = 0; r < block.rows; r++) {
      float *a = sums[0] + r * plan.width, *b = linear.at ? sums[1] + r * plan.width : nullptr;
      int64_t token = block.row + r;
      if (activated.bias) plus(a, biases[0], block.columns);
      if (linear.bias) plus(b, biases[1], block.columns);
      round_as<T>(a, block.columns);
      if (b) round_as<T>(b, block.columns);
      if (save_activated.at) narrow(save_activated.row(token, block.column), a, block.columns);
      if (save_linear.at) narrow(save_linear.row(token, block.column), b, block.columns);
      gate.hidden(a, a, b, block.column, block.columns);
      narrow(hidden.row(token, block.column), a, block.columns);
    }
  };
  if (linear.at) products<Kernel, 2>(plan, x, weights, scratch, threads, finish);
  else products<Kernel, 1>(plan, x, weights, scratch, threads, finish);
}

// A matrix as the left operand of a product, or turned as the left one, or as the right one: the
// dimension that is summed over runs along its rows, or across them.
template <class T>
static Operand<T> along(const T* at, int64_t stride) { return {at, stride, 1}; }
template <class T>
static Operand<T> across(const T* at, int64_t stride) { return {at, 1, stride}; }

// The most that one of the layer's products, or of its gradients', packs into.
template <class Kernel>
static int64_t blocks_bytes(int64_t tokens, int64_t d_model, int64_t d_hidden, int64_t d_out,
                            int threads) {
  const int64_t sizes[][3] = {
      {tokens, d_hidden, d_model}, {tokens, d_out, d_hidden}, {tokens, d_hidden, d_out},
      {d_out, d_hidden, tokens},   {d_hidden, d_model, tokens}, {tokens, d_model, d_hidden}};
  int64_t most = 0;
  for (const auto& size : sizes) {
    // Only the first of them are two that share an operand.
    int count = &size == sizes ? 2 : 1;
    int64_t bytes = Plan<Kernel>(size[0], size[1], size[2], threads).scratch_bytes(count, threads);
    if (bytes > most) most = bytes;
  }
  return most;
}

// y = hidden W_down^T + bias. Without `down` the hidden values are the result.
template <class Kernel, class T>
static void blocks(const Gate& gate, Rows<const T> x, Weight<T> activated, Weight<T> linear,
                   Weight<T> down, Rows<T> y, Rows<T> hidden, Rows<T> save_activated,
                   Rows<T> save_linear, int64_t tokens, int64_t d_model, int64_t d_hidden,
                   int64_t d_out, float* scratch, int threads) {
  hidden_values<Kernel>(gate, along(x.at, x.stride), activated, linear, down.at ? hidden : y,
                        save_activated, save_linear, tokens, d_model, d_hidden, scratch, threads);
  if (!down.at) return;
  if (down.bias)
    for (int64_t t = 0; t < tokens; t++) std::memcpy(y.row(t, 0), down.bias, d_out * sizeof(T));
  product<Kernel, T>(along((const T*)hidden.at, hidden.stride), along(down.at, down.stride), y,
                     down.bias != nullptr, tokens, d_out, d_hidden, scratch, threads);
}

// Where gradients are added up; those of weights may be wider than the operands.
template <class T, class O>
struct Sums {
  Rows<T> x;
  bool add_x;
  Rows<O> activated, linear, down;
  bool add;
};

// The gradients of some tokens and some hidden units. `wanted` has places for what is between the
// products; of the sums, those that are not wanted have none.
template <class Kernel, class T, class O>
static void blocks_backward(const Gate& gate, Rows<const T> x, Weight<T> activated,
                            Weight<T> linear, Weight<T> down, Rows<const T> grad,
                            Rows<const T> saved_activated, Rows<const T> saved_linear,
                            Wanted<T> wanted, Sums<T, O> sums, int64_t tokens, int64_t d_model,
                            int64_t d_hidden, int64_t d_out, float* scratch, int threads) {
  Rows<const T> d_value = grad;
  if (down.at) {
    // Where d_activated will be, which is made of it element by element.
    product<Kernel, T>(along(grad.at, grad.stride), across(down.at, down.stride), wanted.activated,
                       false, tokens, d_hidden, d_out, scratch, threads);
    d_value = {wanted.activated.at, wanted.activated.stride};
  }
  gating_backward<T>(gate, d_value, saved_activated, saved_linear, wanted, tokens, d_hidden,
                     threads);
  if (sums.down.at)
    product<Kernel, O>(across(grad.at, grad.stride),
                       across((const T*)wanted.hidden.at, wanted.hidden.stride), sums.down,
                       sums.add, d_out, d_hidden, tokens, scratch, threads);
  auto branch = [&](Rows<T> d, const Weight<T>& weight, Rows<O> sum) {
    const T* at = d.at;
    if (sum.at)
      product<Kernel, O>(across(at, d.stride), across(x.at, x.stride), sum, sums.add, d_hidden,
                         d_model, tokens, scratch, threads);
    if (sums.x.at)
      product<Kernel, T>(along(at, d.stride), across(weight.at, weight.stride), sums.x, sums.add_x,
                         tokens, d_model, d_hidden, scratch, threads);
    sums.add_x = true;
  };
  branch(wanted.activated, activated, sums.activated);
  if (linear.at) branch(wanted.linear, linear, sums.linear);
}

}  // namespace gatedffn
