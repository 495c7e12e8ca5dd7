// The gradients of gated experts: each expert's tokens go through the layer's own gradients.
//
// The experts with most tokens come first. Those of about as many are a group: each thread takes one
// after the other by itself, so that none waits, and the gradients of the tokens have places of
// their own; then these are added up, in the same order for any number of threads. An expert with
// too many tokens for that is taken by all threads, some tokens at a time.
#pragma once
#include "../../feed_forward/cpu/few_backward.h"
#include "routing.h"

namespace gatedffn {

// What is kept are gate and up of all pairs, sorted as these are. Weights lie by rows.
template <class T>
struct ExpertsOperands {
  Rows<const T> x;
  Stack<T> gate, up, down;
  Rows<const T> grad, saved_gate, saved_up;
  const int64_t* index;
  const float* weights;
};

// Where the gradients of a projection of every expert are written, null where they are not wanted:
// those of its biases, of `rows` each, lie beside each other.
template <class T>
struct StackGradients {
  T* at;
  int64_t expert, row;  // strides
  T* bias;
  int64_t rows;
  Rows<T> of(int64_t e) const { return {at ? at + e * expert : nullptr, row}; }
  T* bias_of(int64_t e) const { return bias ? bias + e * rows : nullptr; }
};

// Those of learned parameters are for each expert and hidden unit; those of the routing weights are
// added to what is there.
template <class T>
struct ExpertsGradients {
  Rows<T> x;
  StackGradients<T> gate, up, down;
  double* learned[2];
  float* weights;
};

template <class Kernel, class T = typename Kernel::Source>
struct BackwardOfExperts {
  int64_t tokens, slots, experts, d_model, d_hidden, d_out;
  int64_t few;    // the most tokens of an expert that few_backward.h takes
  bool saved;     // gate and up are kept
  bool weigh_input;  // rather than the experts' output
  int threads;

  static constexpr bool EXACT = sizeof(T) == sizeof(float);
  static constexpr int64_t OF_TILE = 3 << 19;     // numbers of an expert's tokens at a time
  static constexpr int64_t OF_PLACE = 2 << 20;    // bytes of a matrix of hidden values
  static constexpr int64_t OF_SUMS = 8 << 20;     // bytes of a large expert's sums in float32
  static constexpr int64_t OF_THREADS = 40 << 20;  // bytes that threads by themselves work in
  static constexpr int GROUP = 2;                 // tiles of tokens in a group of experts

  static int64_t even(int64_t n, int64_t most) {
    return parts(n, parts(n, std::max<int64_t>(most, 1)));
  }
  int64_t pairs() const { return tokens * slots; }  // at most
  int64_t widest() const { return std::max(d_model, d_out); }
  int64_t tile() const {
    return std::min(pairs(), std::max<int64_t>(64, OF_TILE / widest() / 32 * 32));
  }
  int64_t group() const { return std::min(pairs(), GROUP * tile()); }

  // Hidden units at a time: as many for all numbers of tokens that are packed alike.
  int64_t units(int64_t rows, bool in_sums = false) const {
    int64_t most = OF_PLACE / (parts(rows, LANES) * LANES * sizeof(T));
    if (in_sums) most = std::min<int64_t>(most, OF_SUMS / (12 * widest()));
    return std::min(d_hidden, parts(even(d_hidden, most), 32) * 32);
  }

  BackwardOfBlocks<Kernel> blocks(int64_t rows, int64_t units, int threads) const {
    return {rows, d_model, d_hidden, d_out, rows, units, saved ? 3 : 5, threads};
  }
  BackwardOfFew<T> fewer(int64_t rows, int threads) const {
    return {rows, d_model, d_hidden, d_out, threads};
  }

  // Of some tokens of an expert: x, the gradient that comes in, and those of the weights; and what
  // biases are gathered to.
  int64_t rows_bytes(int64_t rows) const {
    return lines(rows * d_model * sizeof(T)) + lines(rows * d_out * sizeof(T)) +
           lines(rows * sizeof(float)) + 2 * bias_bytes();
  }
  int64_t bias_bytes() const { return saved ? 0 : lines(d_hidden * sizeof(T)); }
  int64_t bytes(int64_t rows, int threads) const {
    return rows_bytes(rows) +
           lines(rows <= few ? fewer(rows, threads).scratch_bytes()
                             : blocks(rows, units(rows), threads).scratch_bytes());
  }
  int64_t sums_bytes() const {
    if (EXACT || pairs() <= tile()) return 0;
    int64_t wide = units(tile(), true);
    return lines(4 * wide * (2 * d_model + d_out)) + lines(4 * (2 * wide + d_out));
  }
  int64_t listed_bytes() const { return 2 * lines(experts * sizeof(int64_t)); }
  int64_t x_bytes() const { return EXACT ? 0 : lines(tokens * d_model * sizeof(float)); }
  int64_t group_bytes() const { return lines(group() * d_model * sizeof(float)); }

  int64_t scratch_bytes() const {
    int64_t together = 0, one = 0, most = tile();
    // Between these numbers products are cut alike, and the last one takes most.
    for (int64_t rows = 1; rows <= most;) {
      together = std::max(together, bytes(rows, threads));
      one = std::max(one, bytes(rows, 1));
      if (rows == most) break;
      rows = std::min(most, rows < few ? rows + 1 : (rows / LANES + 1) * LANES);
    }
    if (pairs() > most) {
      auto layer = blocks(most, units(most, !EXACT), threads);
      for (int64_t last = LANES; last < most + LANES; last += LANES) {
        layer.tokens = most + std::min(last, most);
        together = std::max(together, sums_bytes() + rows_bytes(most) + layer.scratch_bytes());
      }
    }
    return Routing::bytes(tokens, slots, experts) + listed_bytes() + x_bytes() + group_bytes() +
           std::max(together, std::min(threads * one, OF_THREADS));
  }

  void run(const Formula& formula, const ExpertsOperands<T>& of, const ExpertsGradients<T>& wanted,
           char* scratch) const {
    Running all = {*this, formula, of, wanted, {tokens, slots, experts, scratch}};
    all.begin(scratch + Routing::bytes(tokens, slots, experts));
    int64_t i = 0;
    for (; i < all.touched && all.count(i) > tile(); i++) all.large(all.order[i]);
    while (i < all.touched) i = all.some(i);
    all.end();
  }

  // A call.
  struct Running {
    const BackwardOfExperts& sizes;
    const Formula& formula;
    const ExpertsOperands<T>& of;
    const ExpertsGradients<T>& wanted;
    Routing routing;
    int64_t *order = nullptr, *place = nullptr;  // the experts by tokens, and where a group has the first one of each
    int64_t touched = 0;
    Rows<float> x = {}, places = {};  // the gradients of x: of each token, and of the pairs of a group
    char* memory = nullptr;
    bool through_x = false;  // whether the latter are needed

    int64_t count(int64_t i) const { return routing.count(order[i]); }

    void begin(char* scratch) {
      auto take = [&](int64_t bytes) {
        char* at = scratch;
        scratch += bytes;
        return at;
      };
      const auto& s = sizes;
      routing.sort(of.index, of.weights);
      order = (int64_t*)take(s.listed_bytes()), place = order + s.listed_bytes() / 16;
      char* sums = take(s.x_bytes());
      if constexpr (EXACT) x = wanted.x;
      else x = {wanted.x.at ? (float*)sums : nullptr, s.d_model};
      through_x = wanted.x.at || (s.weigh_input && wanted.weights);
      places = {(float*)take(s.group_bytes()), s.d_model};
      memory = scratch;
      for (int64_t e = 0; e < s.experts; e++) order[e] = e;
      std::sort(order, order + s.experts, [&](int64_t a, int64_t b) {
        int64_t first = routing.count(a), second = routing.count(b);
        return first != second ? first > second : a < b;
      });
      for (touched = 0; touched < s.experts && count(touched);) touched++;
#pragma omp parallel num_threads(s.threads)
      {
        Share tokens(x.at ? s.tokens : 0), none(s.experts - touched);
        for (int64_t t = tokens.begin; t < tokens.end; t++)
          std::memset(x.row(t, 0), 0, s.d_model * sizeof(float));
        for (int64_t i = none.begin; i < none.end; i++) clear(order[touched + i]);
      }
    }

    // The gradients of an expert without tokens.
    void clear(int64_t e) const {
      const auto& s = sizes;
      auto zeros = [&](const StackGradients<T>& made, int64_t rows, int64_t columns) {
        for (int64_t r = 0; made.at && r < rows; r++)
          std::memset(made.of(e).row(r, 0), 0, columns * sizeof(T));
        if (made.bias) std::memset(made.bias_of(e), 0, rows * sizeof(T));
      };
      zeros(wanted.gate, s.d_hidden, s.d_model);
      zeros(wanted.up, s.d_hidden, s.d_model);
      zeros(wanted.down, s.d_out, s.d_hidden);
      for (double* learned : wanted.learned)
        if (learned) std::fill_n(learned + e * s.d_hidden, s.d_hidden, 0.0);
    }

    // The rows that some pairs of an expert have, in memory of their own.
    struct Gathered {
      Rows<T> x, grad;
      float* of_weights;
      Weight<T> gate, up;  // with their biases
      char* behind;
    };

    Gathered gather(int64_t e, int64_t first, int64_t rows, char* at, int threads) const {
      const auto& s = sizes;
      Gathered made;
      made.x = {(T*)at, s.d_model};
      at += lines(rows * s.d_model * sizeof(T));
      made.grad = {(T*)at, s.d_out};
      at += lines(rows * s.d_out * sizeof(T));
      made.of_weights = (float*)at;
      at += lines(rows * sizeof(float));
      // They are needed where gate and up are computed again.
      auto weight = [&](const Stack<T>& stack) {
        T* to = (T*)at;
        at += s.bias_bytes();
        return stack.of(e, s.saved ? nullptr : stack.gather_bias(to, e, s.d_hidden));
      };
      made.gate = weight(of.gate), made.up = weight(of.up), made.behind = at;
#pragma omp parallel num_threads(threads)
      {
        Share mine(rows);
        for (int64_t r = mine.begin; r < mine.end; r++) {
          int64_t token = routing.token[first + r];
          std::memcpy(made.grad.row(r, 0), of.grad.row(token, 0), s.d_out * sizeof(T));
          if (!s.weigh_input)
            std::memcpy(made.x.row(r, 0), of.x.row(token, 0), s.d_model * sizeof(T));
          else weigh(made.x.row(r, 0), of.x.row(token, 0), routing.weight[first + r]);
          made.of_weights[r] = 0.0f;
        }
      }
      return made;
    }

    void weigh(T* to, const T* from, float weight) const {
      int64_t n = sizes.d_model, i = 0;
      for (; i + LANES <= n; i += LANES) store(to + i, load(from + i) * set(weight));
      if (i < n) store_some(to + i, load_some(from + i, int(n - i)) * set(weight), int(n - i));
    }

    // Where the gradients of an expert go; those of its tokens go to `to`.
    Gradients<T, T, float> gradients(int64_t e, int64_t first, Rows<float> to,
                                     float* of_weights) const {
      const auto& w = wanted;
      double* learned[2];
      for (int k = 0; k < 2; k++)
        learned[k] = w.learned[k] ? w.learned[k] + e * sizes.d_hidden : nullptr;
      bool weighed = !sizes.weigh_input;
      return {through_x ? to : Rows<float>{}, w.gate.of(e), w.up.of(e), w.down.of(e),
              w.gate.bias_of(e), w.up.bias_of(e), w.down.bias_of(e), {learned[0], learned[1]},
              weighed ? routing.weight + first : nullptr,
              weighed && w.weights ? of_weights : nullptr};
    }

    // Adds what some pairs give to the gradients of the routing weights.
    void weights(int64_t e, int64_t first, int64_t rows, const Gathered& at, Rows<float> d_x,
                 bool with_bias) const {
      if (!wanted.weights) return;
      const T* bias = with_bias ? of.down.of(e).bias : nullptr;
      for (int64_t r = 0; r < rows; r++) {
        float sum = at.of_weights[r];
        const T* x_row = of.x.row(routing.token[first + r], 0);
        if (sizes.weigh_input) sum = dot(d_x.row(r, 0), x_row, sizes.d_model);
        else if (bias) sum += dot(at.grad.row(r, 0), bias, sizes.d_out);
        wanted.weights[routing.slot[first + r]] += sum;
      }
    }

    Rows<const T> down(int64_t e) const {
      Weight<T> weight = of.down.of(e);
      return {weight.at, weight.stride};
    }

    // An expert, all its tokens at once.
    void one(int64_t e, char* own, Rows<float> to, int threads) const {
      int64_t first = routing.starts[e], rows = routing.count(e);
      Gathered at = gather(e, first, rows, own, threads);
      auto run = [&](const auto& layer) {
        layer.run(formula, Rows<const T>{at.x.at, at.x.stride}, at.gate, at.up, down(e),
                  Rows<const T>{at.grad.at, at.grad.stride}, of.saved_gate.from(first),
                  of.saved_up.from(first), gradients(e, first, to, at.of_weights), at.behind);
      };
      if (rows <= sizes.few) run(sizes.fewer(rows, threads));
      else run(sizes.blocks(rows, sizes.units(rows), threads));
      weights(e, first, rows, at, to, true);
    }

    // x[token] += the gradients of some pairs, in their order.
    void add(int64_t first, int64_t rows, Rows<float> from) const {
      if (!x.at) return;
      Share share(parts(sizes.d_model, LANES));
      int64_t begin = share.begin * LANES, end = std::min(share.end * LANES, sizes.d_model);
      for (int64_t r = 0; r < rows; r++) {
        float* to = x.row(routing.token[first + r], 0);
        const float* given = from.row(r, 0);
        float weight = sizes.weigh_input ? routing.weight[first + r] : 1.0f;
        int64_t c = begin;
        for (; c + LANES <= end; c += LANES)
          store(to + c, load(to + c) + load(given + c) * set(weight));
        for (; c < end; c++) to[c] += given[c] * weight;
      }
    }

    // A group of experts from the i-th on; returns where the next one begins.
    int64_t some(int64_t i) const {
      const auto& s = sizes;
      int64_t end = i, pairs = 0, own = 0;
      for (; end < touched && pairs + count(end) <= s.group(); end++) {
        place[end] = pairs, pairs += count(end);
        own = std::max(own, s.bytes(count(end), 1));
      }
      if (end < touched && end - i > s.threads) end -= (end - i) % s.threads;
      bool alone = end - i >= s.threads && s.threads * own <= OF_THREADS;
      int64_t next = i;
      if (!alone)
        for (int64_t j = i; j < end; j++) one(order[j], memory, places.from(place[j]), s.threads);
#pragma omp parallel num_threads(s.threads)
      {
        char* mine = memory + omp_get_thread_num() * own;
        while (alone) {
          int64_t j = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (j >= end) break;
          one(order[j], mine, places.from(place[j]), 1);
        }
#pragma omp barrier
        for (int64_t j = i; j < end; j++)
          add(routing.starts[order[j]], count(j), places.from(place[j]));
      }
      return end;
    }

    // An expert with more than a tile of tokens: its sums over them are of float32.
    void large(int64_t e) const {
      const auto& s = sizes;
      int64_t tile = s.tile(), wide = s.units(tile, !EXACT), first = routing.starts[e];
      int64_t all = routing.count(e);
      char* own = memory + s.sums_bytes();
      float* sums = (float*)memory;
      float* biases = sums + lines(4 * wide * (2 * s.d_model + s.d_out)) / 4;
      auto layer = s.blocks(tile, wide, s.threads);
      Gradients<T, T, float> exact = gradients(e, first, {}, nullptr);
      for (int64_t u = 0; u < s.d_hidden; u += wide) {
        int64_t units = std::min(wide, s.d_hidden - u);
        Formula these = formula;
        formula.at(u, these.parameters);
        Gradients<T, float, float> summed = {
            {}, {sums, s.d_model}, {sums + wide * s.d_model, s.d_model},
            {sums + 2 * wide * s.d_model, wide}, biases, biases + wide, biases + 2 * wide, {},
            nullptr, nullptr};
        auto missing = [](auto* there, auto*& at) {
          if (!there) at = nullptr;
        };
        auto tiles = [&](auto sum) {
          for (int64_t t = 0; t < all; t += tile) {
            int64_t rows = std::min(tile, all - t);
            Gathered at = gather(e, first + t, rows, own, s.threads);
            auto given = gradients(e, first + t, places, at.of_weights).from(0, u);
            sum.x = given.x, sum.weights = given.weights, sum.of_weights = given.of_weights;
            for (int k = 0; k < 2; k++) sum.learned[k] = given.learned[k];
            if (sum.down_bias && u == 0)
              column_sums(Rows<const T>{at.grad.at, at.grad.stride}, sum.down_bias, t > 0, rows,
                          s.d_out, s.threads, sum.weights);
            if (sum.beyond_down() || sum.down.at)
              layer.step(these, Rows<const T>{at.x.at, at.x.stride}, part(at.gate, u),
                         part(at.up, u), part(down(e), 0, u),
                         Rows<const T>{at.grad.at, at.grad.stride},
                         part(of.saved_gate, first + t, u), part(of.saved_up, first + t, u), sum,
                         rows, units, t > 0, false, at.behind);
            weights(e, first + t, rows, at, places, u == 0);
#pragma omp parallel num_threads(s.threads)
            add(first + t, rows, places);
          }
        };
        if constexpr (EXACT) {
          tiles(exact.from(0, u));
          continue;
        }
        missing(exact.gate.at, summed.gate.at), missing(exact.up.at, summed.up.at);
        missing(exact.down.at, summed.down.at);
        missing(exact.gate_bias, summed.gate_bias), missing(exact.up_bias, summed.up_bias);
        missing(exact.down_bias, summed.down_bias);
        tiles(summed);
        Gradients<T, T, float> to = exact.from(0, u);
        round(to.gate, summed.gate, units, s.d_model);
        round(to.up, summed.up, units, s.d_model);
        round(to.down, summed.down, s.d_out, units);
        round({to.gate_bias, 0}, {summed.gate_bias, 0}, 1, units);
        round({to.up_bias, 0}, {summed.up_bias, 0}, 1, units);
        if (u == 0) round({to.down_bias, 0}, {summed.down_bias, 0}, 1, s.d_out);
      }
    }

    void round(Rows<T> to, Rows<float> from, int64_t rows, int64_t columns) const {
      if (!to.at) return;
#pragma omp parallel num_threads(sizes.threads)
      {
        Share mine(rows);
        for (int64_t r = mine.begin; r < mine.end; r++)
          narrow(to.row(r, 0), from.row(r, 0), columns);
      }
    }

    void end() const {
      if (!EXACT) round(wanted.x, x, sizes.tokens, sizes.d_model);
    }
  };
};

}  // namespace gatedffn
