// The layer in bfloat16 by products of tiles, for any number of tokens.
//
// Every weight is read once for a few hundred tokens, gate and up together, as it lies in memory;
// the hidden values stay in cache, in the very layout that the product with W_down reads.
//
// Tokens lie across a tile, in panels of P: the cell [k / 2][t] holds two neighbours of the summed
// dimension side by side, as the instruction takes them.
#pragma once
#include "products.h"
#ifdef __AMX_BF16__

namespace gatedffn {

// Writes the columns of block[UNITS][P] as rows: out[token][first + r], rounded as T.
template <class T>
static void to_rows(Rows<T> out, int64_t token, int64_t tokens, int64_t first, int64_t rows,
                    const float* block, int P) {
  for (int64_t t = 0; t < tokens; t += LANES)
    for (int64_t r = 0; r < rows; r += LANES) {
      V square[LANES];
      for (int i = 0; i < LANES; i++)
        square[i] = r + i < rows ? load(block + (r + i) * P + t) : set(0.0f);
      transpose(square);
      for (int i = 0; i < LANES && t + i < tokens; i++) {
        T* at = out.row(token + t + i, first + r);
        if (rows - r < LANES) store_some(at, square[i], int(rows - r));
        else store(at, square[i]);
      }
    }
}

template <int P>
struct Tiles {
  typedef uint32_t Cell;
  static constexpr int PER_CELL = 2;
  static constexpr int STEP = 32;    // values of the summed dimension in a tile
  static constexpr int UNITS = 32;   // rows of a weight that a thread takes at once
  static constexpr int DEEP = 256;   // of the summed dimension: rows and tokens fit into L1

  int64_t d_model, d_hidden, d_out, tile;
  int threads;

  Tiles& sized(int64_t d_model_, int64_t d_hidden_, int64_t d_out_, int64_t tile_, int threads_) {
    d_model = d_model_, d_hidden = d_hidden_, d_out = d_out_, threads = threads_;
    tile = (tile_ + P - 1) / P * P;  // whole panels
    return *this;
  }

  static int64_t cells(int64_t n) { return (n + STEP - 1) / STEP * STEP / PER_CELL; }
  int64_t input_bytes() const { return cells(d_model) * tile * sizeof(Cell); }
  int64_t hidden_bytes() const { return cells(d_hidden) * tile * sizeof(Cell); }
  int64_t block_bytes() const { return tile * UNITS * sizeof(float); }
  int64_t scratch_bytes() const {
    return input_bytes() + hidden_bytes() + 2 * threads * block_bytes();
  }

  // out[p][r][t] = w[r] . x[p][t] for `count` rows; panels of x are `apart` cells from each other.
  static void multiply(float* out, const bf16* w, int64_t stride, int64_t count, const Cell* x,
                    int64_t n, int64_t panels, int64_t apart) {
    alignas(64) bf16 chunk[DEEP / 32 + 1][UNITS][32];  // tile after tile, 64 bytes a row
    for (int64_t begin = 0; begin < n; begin += DEEP) {
      int64_t size = n - begin < DEEP ? n - begin : DEEP, steps = (size + 31) / 32;
      const bf16* next = begin + DEEP < n ? w + begin + DEEP : w + UNITS * stride;
      // A copy pays when it is read for several panels; otherwise only ragged ends need one.
      bool copied = panels > 1 || count < UNITS || size % 32;
      if (count < UNITS || size % 32) std::memset(chunk, 0, sizeof chunk);
      for (int64_t r = 0; copied && r < count; r++) {
        const bf16* row = w + r * stride + begin;
        for (int64_t k = 0; k < size / 32; k++) std::memcpy(chunk[k][r], row + k * 32, 64);
        std::memcpy(chunk[size / 32][r], row + size / 32 * 32, size % 32 * sizeof(bf16));
      }
      const bf16* upper = copied ? chunk[0][0] : w + begin;
      int64_t apart_rows = copied ? 32 : stride, apart_steps = copied ? UNITS * 32 : 32;
      const bf16* lower = upper + 16 * apart_rows;
      for (int64_t p = 0; p < panels; p++) {
        float* sums = out + p * UNITS * P;
        const Cell* tokens = x + p * apart + begin / 2 * P;
        if (begin) {
          _tile_loadd(0, sums, P * 4);
          _tile_loadd(1, sums + 16 * P, P * 4);
          if (P > 16) {
            _tile_loadd(2, sums + 16, P * 4);
            _tile_loadd(3, sums + 16 * P + 16, P * 4);
          }
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t k = 0; k < steps; k++) {
          // A share of what comes next for each of the panels.
          for (int64_t r = p * UNITS / panels; r < (p + 1) * UNITS / panels; r++)
            __builtin_prefetch(next + r * stride + k * 32);
          _tile_loadd(4, upper + k * apart_steps, apart_rows * 2);
          _tile_loadd(6, tokens + k * 16 * P, P * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, lower + k * apart_steps, apart_rows * 2);
          _tile_dpbf16ps(1, 5, 6);
          if (P > 16) {
            _tile_loadd(7, tokens + k * 16 * P + 16, P * 4);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
        _tile_stored(0, sums, P * 4);
        _tile_stored(1, sums + 16 * P, P * 4);
        if (P > 16) {
          _tile_stored(2, sums + 16, P * 4);
          _tile_stored(3, sums + 16 * P + 16, P * 4);
        }
      }
    }
  }

  // Two rows of hidden values to their cells; they are rounded already, so that their lower halves
  // are zeros. `odd` is null past the end.
  static void put(Cell* at, int64_t row, const float* even, const float* odd) {
    I word = (I)load(even) >> 16 & 0xffff;
    if (odd) word |= (I)load(odd);
    std::memcpy(at + row / 2 * P, &word, sizeof word);
  }

  // x[tokens][d_model] into panels; what is beyond the tokens or the width is 0.
  void pack(Cell* panels, Rows<const bf16> x, int64_t tokens) const {
    int64_t apart = cells(d_model) * P, across = (tokens + P - 1) / P * P / LANES;
    Share share(across);
    for (int64_t s = share.begin; s < share.end; s++) {
      int64_t t = s * LANES;
      Cell* at = panels + t / P * apart + t % P;
      for (int64_t k = 0; k < cells(d_model); k += LANES) {
        V square[LANES];
        int64_t there = d_model - k * PER_CELL;
        for (int i = 0; i < LANES; i++)
          square[i] = t + i < tokens && there > 0 ? Pairs::along(x.row(t + i, 2 * k), there) : V{};
        transpose(square);
        for (int i = 0; i < LANES && k + i < cells(d_model); i++)
          std::memcpy(at + (k + i) * P, &square[i], sizeof(V));
      }
    }
  }

  void clear_end(Cell* panels, int64_t n, int64_t count) const {
    int64_t from = n / PER_CELL, apart = cells(n) * P;
    for (int64_t p = 0; p < count; p++)
      std::memset(panels + p * apart + from * P, 0, (cells(n) - from) * P * sizeof(Cell));
  }

  // block[p][r][t] for the rows from `first` on: the product, the bias, and the rounding.
  void meet(float* block, const Weight<bf16>& weight, int64_t first, int64_t rows, const Cell* x,
            int64_t n, int64_t panels) const {
    multiply(block, weight.at + first * weight.stride, weight.stride, rows, x, n,
                         panels, cells(n) * P);
    float add[UNITS];
    if (weight.bias) widen(add, weight.bias + first, rows);
    for (int64_t p = 0; p < panels; p++) {
      float* at = block + p * UNITS * P;
      if (weight.bias)
        for (int64_t r = 0; r < rows; r++)
          for (int t = 0; t < P; t += LANES)
            store(at + r * P + t, load(at + r * P + t) + set(add[r]));
      round_as<bf16>(at, rows * P);
    }
  }

  // Gate and up are saved where there is a place. Without `down` the hidden values are the result.
  void run(const Formula& formula, Rows<const bf16> x, const Weight<bf16>& gate,
           const Weight<bf16>& up, const Weight<bf16>& down, Rows<bf16> y, Rows<bf16> saved_gate,
           Rows<bf16> saved_up, int64_t tokens, char* scratch) const {
    Cell* inputs = (Cell*)scratch;
    Cell* hidden = (Cell*)(scratch + input_bytes());
    float* blocks = (float*)(scratch + input_bytes() + hidden_bytes());
    int64_t next_hidden = 0, next_out = 0;
#pragma omp parallel num_threads(threads)
    {
      Amx::begin();
      float* a = blocks + 2 * omp_get_thread_num() * tile * UNITS;
      float* b = a + tile * UNITS;
      for (int64_t t = 0; t < tokens; t += tile) {
        int64_t size = tokens - t < tile ? tokens - t : tile, panels = (size + P - 1) / P;
        pack(inputs, {x.row(t, 0), x.stride}, size);
        if (omp_get_thread_num() == 0) {
          next_out = 0;
          if (down.at) clear_end(hidden, d_hidden, panels);
        }
#pragma omp barrier
        for (;;) {
          int64_t r = __atomic_fetch_add(&next_hidden, UNITS, __ATOMIC_RELAXED);
          if (r >= d_hidden) break;
          int64_t rows = d_hidden - r < UNITS ? d_hidden - r : UNITS;
          meet(a, gate, r, rows, inputs, d_model, panels);
          if (up.at) meet(b, up, r, rows, inputs, d_model, panels);
          for (int64_t p = 0; p < panels; p++) {
            float *left = a + p * UNITS * P, *right = b + p * UNITS * P;
            int64_t first = t + p * P, count = size - p * P < P ? size - p * P : P;
            if (saved_gate.at) to_rows(saved_gate, first, count, r, rows, left, P);
            if (saved_up.at) to_rows(saved_up, first, count, r, rows, right, P);
            formula.across(left, right, r, rows, P);
            if (!down.at) {
              to_rows(y, first, count, r, rows, left, P);
              continue;
            }
            round_as<bf16>(left, rows * P);
            Cell* cell = hidden + p * cells(d_hidden) * P;
            for (int64_t i = 0; i < rows; i += 2)
              for (int v = 0; v < P; v += LANES)
                put(cell + v, r + i, left + i * P + v,
                       i + 1 < rows ? left + (i + 1) * P + v : nullptr);
          }
        }
#pragma omp barrier
        if (omp_get_thread_num() == 0) next_hidden = 0;
        while (down.at) {
          int64_t r = __atomic_fetch_add(&next_out, UNITS, __ATOMIC_RELAXED);
          if (r >= d_out) break;
          int64_t rows = d_out - r < UNITS ? d_out - r : UNITS;
          meet(a, down, r, rows, hidden, d_hidden, panels);
          for (int64_t p = 0; p < panels; p++)
            to_rows(y, t + p * P, size - p * P < P ? size - p * P : P, r, rows,
                    a + p * UNITS * P, P);
        }
#pragma omp barrier
      }
      Amx::end();
    }
  }
};

}  // namespace gatedffn
#endif
