// Weights of all experts, and which tokens go to each.
#pragma once
#include "../../feed_forward/cpu/products.h"

namespace gatedffn {

// A projection of every expert: the strides of experts, rows and columns, and those of its bias.
template <class T>
struct Stack {
  const T* at;  // null where there is none, as of the bias
  int64_t expert, row, deep;  // as of one that lies by rows where there is none
  const T* bias;
  int64_t bias_expert, bias_step;

  bool by_rows() const { return deep == 1; }
  // That of one expert. `gathered` is its bias where the numbers are not neighbours.
  Weight<T> of(int64_t e, const T* gathered = nullptr) const {
    if (!at) return {};
    return {at + e * expert, row, bias && bias_step == 1 ? bias + e * bias_expert : gathered};
  }
  Operand<T> operand(int64_t e) const { return {at ? at + e * expert : nullptr, row, deep}; }
  // Makes it; null where it is not needed.
  const T* gather_bias(T* to, int64_t e, int64_t count) const {
    if (!bias || bias_step == 1) return nullptr;
    for (int64_t i = 0; i < count; i++) to[i] = bias[e * bias_expert + i * bias_step];
    return to;
  }
};

// The pairs of a token and a slot by expert, and within it in their order. Slots whose expert is not
// here are left out.
struct Routing {
  int64_t tokens, slots, experts;
  int64_t* starts;  // of each expert, and the end
  int32_t *token, *slot;  // of each pair; slots count through all tokens
  float* weight;

  static int64_t bytes(int64_t tokens, int64_t slots, int64_t experts) {
    return lines((experts + 1) * sizeof(int64_t) + 3 * tokens * slots * sizeof(float));
  }

  Routing(int64_t tokens, int64_t slots, int64_t experts, char* scratch)
      : tokens(tokens), slots(slots), experts(experts), starts((int64_t*)scratch),
        token((int32_t*)(starts + experts + 1)), slot(token + tokens * slots),
        weight((float*)(slot + tokens * slots)) {}

  void sort(const int64_t* index, const float* weights) {
    std::fill(starts, starts + experts + 1, 0);
    int64_t count = tokens * slots;
    for (int64_t i = 0; i < count; i++)
      if (uint64_t(index[i]) < uint64_t(experts)) starts[index[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) starts[e + 1] += starts[e];
    // Each start is moved to its end, which is the next one's start.
    for (int64_t i = 0; i < count; i++)
      if (uint64_t(index[i]) < uint64_t(experts)) {
        int64_t p = starts[index[i]]++;
        token[p] = int32_t(i / slots), slot[p] = int32_t(i), weight[p] = weights[i];
      }
    for (int64_t e = experts; e > 0; e--) starts[e] = starts[e - 1];
    starts[0] = 0;
  }
  int64_t count(int64_t e) const { return starts[e + 1] - starts[e]; }
};

}  // namespace gatedffn
