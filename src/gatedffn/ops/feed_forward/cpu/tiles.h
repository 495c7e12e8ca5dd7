// The layer in bfloat16 by products of tiles, for any number of tokens.
//
// Tokens lie across a tile, in panels of P: the cell [k / 2][t] holds two neighbours of the summed
// dimension side by side, as the instruction takes them. 32 rows of a weight, read as they lie, meet
// all panels, one after the other. Meanwhile, a little after each step of a product, the next rows
// are fetched, and the vector units finish the sums of the rows before. The hidden values never leave
// the caches.
//
//     many tokens  each thread takes some, and all weights
//     few          all threads take the same tokens, and 32 rows of a weight at a time
#pragma once
#include "products.h"
#ifdef GATEDFFN_TILES

namespace gatedffn {

// The machine's own rounding: it takes subnormal numbers for 0, as the products do anyway.
GATEDFFN_INLINE __m256i narrowed(V x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
GATEDFFN_INLINE V rounded(V x) {
  return (V)_mm512_maskz_slli_epi32(ALL, _mm512_maskz_cvtepu16_epi32(ALL, narrowed(x)), 16);
}

template <int P>
struct Tiles {
  typedef uint32_t Cell;
  static constexpr int UNITS = 32;   // rows of a weight that are taken at once
  static constexpr int STEP = 32;    // values of the summed dimension in a tile
  static constexpr int ACROSS = P / LANES;
  static constexpr int SUMS = UNITS * P, CELLS = STEP / 2 * P;  // of a panel, those of a step
  static constexpr int GROUP = 1024;  // hidden units at a time: their cells stay in L2

  int64_t d_model, d_hidden, d_out, tile, group;
  int threads;
  bool shared;

  Tiles& sized(int64_t d_model_, int64_t d_hidden_, int64_t d_out_, int64_t tokens, int64_t tile_,
               int threads_) {
    d_model = d_model_, d_hidden = d_hidden_, d_out = d_out_, threads = threads_;
    tile = parts(tile_, P) * P;
    // With fewer parts than that, more than half of the threads would have nothing to do.
    shared = threads > 1 && 2 * parts(tokens, tile) <= threads;
    group = shared ? d_hidden : parts(parts(d_hidden, parts(d_hidden, GROUP)), UNITS) * UNITS;
    return *this;
  }

  // The summed dimension, in chunks of which 32 rows of a weight fill two thirds of L1.
  struct Depth {
    int64_t n, steps, chunks;
    explicit Depth(int64_t n) : n(n), steps(parts(n, STEP)), chunks(parts(steps, 16)) {}
    int64_t first(int64_t chunk) const { return steps * chunk / chunks; }
    // Where the cells of a step are: chunk after chunk, and in each panel after panel.
    int64_t at(int64_t step, int64_t panel, int64_t panels) const {
      int64_t chunk = ((step + 1) * chunks - 1) / steps, begin = first(chunk);
      return (begin * panels + panel * (first(chunk + 1) - begin) + step - begin) * CELLS;
    }
  };

  int64_t cells(int64_t n) const { return Depth(n).steps * CELLS * (tile / P); }
  int64_t deepest() const { return std::max(d_model, std::min(group, d_hidden)); }
  bool grouped() const { return group < d_hidden; }
  // Of a thread: a copy of rows, two times the sums of gate and up, and those of all of y.
  int64_t own_bytes() const {
    return UNITS * Depth(deepest()).steps * STEP * sizeof(bf16) +
           4 * tile * UNITS * sizeof(float) +
           (grouped() ? parts(d_out, UNITS) * tile * UNITS * sizeof(float) : 0);
  }
  static constexpr int panel() { return P; }
  int64_t cell_bytes() const { return (cells(d_model) + cells(group)) * sizeof(Cell); }
  int64_t scratch_bytes() const {
    return shared ? cell_bytes() + threads * own_bytes() : threads * (cell_bytes() + own_bytes());
  }

  // Some rows of a weight, as they lie.
  struct Part {
    const bf16* at = nullptr;
    int64_t stride = 0, rows = 0;
    Depth deep = Depth(0);
    bool whole() const { return rows == UNITS && deep.n % STEP == 0; }
  };

  // 32 of them from `row` on, or up to `end`; nothing of a weight that is missing.
  static Part part(const Weight<bf16>& w, int64_t row, int64_t end, int64_t column, int64_t n) {
    if (!w.at) return {};
    return {w.at + row * w.stride + column, w.stride, std::min<int64_t>(end - row, UNITS),
            Depth(n)};
  }

  // The sums of 16 tokens, with the bias, as half of their rows.
  static void turn(V* square, const float* sums, const float* bias, int half) {
    const float* at = sums + half * ACROSS * SQUARE;
    for (int i = 0; i < LANES; i++)
      square[i] = load(at + i * LANES) + set(bias[half * LANES + i]);
    transpose(square);
  }

  // Writes them as rows: out[token][unit + r].
  static void to_rows(Rows<bf16> out, int64_t token, int64_t tokens, int64_t unit, int64_t rows,
                      const float* sums, const float* bias) {
    alignas(64) bf16 lines[LANES][UNITS];
    for (int half = 0; half < 2; half++) {
      V square[LANES];
      turn(square, sums, bias, half);
      for (int i = 0; i < LANES; i++) {
        __m256i line = narrowed(square[i]);
        std::memcpy(lines[i] + half * LANES, &line, sizeof line);
      }
    }
    for (int64_t t = 0; t < std::min<int64_t>(tokens, LANES); t++) {
      if (rows >= UNITS) std::memcpy(out.row(token + t, unit), lines[t], sizeof lines[t]);
      else std::memcpy(out.row(token + t, unit), lines[t], rows * sizeof(bf16));
    }
  }

  // Adds them to rows.
  static void to_sums(const Scattered& sums_of, int64_t token, int64_t tokens, int64_t unit,
                      int64_t rows, const float* sums, const float* bias) {
    for (int half = 0; half < 2 && half * LANES < rows; half++) {
      V square[LANES];
      turn(square, sums, bias, half);
      for (int64_t t = 0; t < std::min<int64_t>(tokens, LANES); t++)
        sums_of.add(token + t, unit + half * LANES, square[t], rows - half * LANES);
    }
  }

  // What is left to do with the sums of 32 rows, in pieces.
  struct Pending {
    const Formula* formula = nullptr;  // of hidden values; null for the rows of y
    float* sums = nullptr;
    int64_t between = 0;  // the sums of two panels
    int64_t unit = 0, rows = 0, token = 0, tokens = 0, panels = 0, done = 0, total = 0;
    Rows<bf16> gate = {}, up = {}, out = {};
    Scattered added = {};  // in place of `out`, where rows are added to
    Cell* cells = nullptr;
    int64_t apart = 0;
    alignas(64) float bias[2][UNITS];

    // The pieces of a panel: gate and up as rows where they are saved, hidden values, rows of out.
    int saved() const { return (gate.at ? ACROSS : 0) + (up.at ? ACROSS : 0); }
    int values() const { return formula ? SUMS / (2 * LANES) : 0; }
    int pieces() const { return saved() + values() + (out.at || added.token ? ACROSS : 0); }

    // Hidden values go to their cells, from the unit on that is there the `unit`-th; null: in place.
    void to_cells(Cell* of, const Depth& deep, int64_t unit) {
      int64_t step = unit / UNITS, here = deep.at(step, 0, panels);
      cells = of ? of + here : nullptr;
      apart = deep.at(step, 1, panels) - here;
    }

    void begin(const Weight<bf16>& first, const Weight<bf16>& second, int64_t row) {
      std::memset(bias, 0, sizeof bias);
      if (first.bias) widen(bias[0], first.bias + row, rows);
      if (second.bias) widen(bias[1], second.bias + row, rows);
      unit = row, done = 0, total = pieces() * panels;
    }

    void piece() {
      int64_t panel = done / pieces(), i = done % pieces();
      done++;
      float *a = sums + panel * between, *b = a + SUMS;
      if (i >= saved() && i < saved() + values()) return make(a, b, i - saved(), panel);
      bool is_up = i >= ACROSS && i < saved(), is_out = i >= saved();
      int64_t half = i % ACROSS, t = panel * P + half * LANES;
      if (is_out) half = (i - saved() - values()), t = panel * P + half * LANES;
      static const float none[UNITS] = {};
      if (is_out && added.token)
        return to_sums(added, token + t, tokens - t, unit, rows, a + half * SQUARE, bias[0]);
      to_rows(is_out ? out : is_up ? up : gate, token + t, tokens - t, unit, rows,
              (is_up ? b : a) + half * SQUARE, is_out && formula ? none : bias[is_up]);
    }

    // Hidden values of two rows and 16 tokens, to their cells or in place.
    void make(float* a, const float* b, int64_t i, int64_t panel) {
      int64_t square = i / (LANES / 2), r = square / ACROSS * LANES + i % (LANES / 2) * 2;
      alignas(64) float left[2 * LANES], right[2 * LANES];
      for (int k = 0; k < 2; k++) {
        V add = set(bias[0][r + k]);
        store(left + k * LANES, rounded(load(a + (2 * i + k) * LANES) + add));
        if (!formula->gated()) continue;
        add = set(bias[1][r + k]);
        store(right + k * LANES, rounded(load(b + (2 * i + k) * LANES) + add));
      }
      formula->across(left, right, unit + r, 2, LANES);
      // What is beyond the hidden units meets zeros, and must be a number.
      for (int k = 0; k < 2; k++)
        if (r + k >= rows) store(left + k * LANES, V{});
      if (!cells) {
        std::memcpy(a + 2 * i * LANES, left, sizeof left);
        return;
      }
      __m256i even = narrowed(load(left)), odd = narrowed(load(left + LANES));
      U line = (U)_mm512_maskz_cvtepu16_epi32(ALL, even) |
               (U)_mm512_maskz_cvtepu16_epi32(ALL, odd) << 16;
      std::memcpy(cells + panel * apart + square % ACROSS * SQUARE + r / 2 * LANES, &line,
                  sizeof line);
    }

    void finish() {
      while (done < total) piece();
    }
  };

  // What a thread works in.
  struct Own {
    Cell *inputs, *hidden;
    bf16* copy;
    float *sums, *all;
    Pending pending[2];
  };

  // Divides own_bytes() that are at `at`.
  void place(Own& own, char* at) const {
    own.copy = (bf16*)at;
    own.sums = (float*)(at + UNITS * Depth(deepest()).steps * STEP * sizeof(bf16));
    own.all = grouped() ? own.sums + 4 * tile * UNITS : nullptr;
  }

  // sums[panel] (+)= w x. Meanwhile the first of `next` is fetched, and what is pending is done in
  // so many steps.
  static void multiply(Own& own, float* sums, int64_t apart, bool add, const Part& w,
                       const Part& next, const Cell* x, int64_t panels, Pending& pending,
                       int64_t within) {
    const bf16* rows = w.at;
    int64_t pitch = w.stride;
    if (!w.whole()) {  // ragged ones are read from a copy that ends with zeros
      rows = own.copy, pitch = w.deep.steps * STEP;
      std::memset(own.copy, 0, UNITS * pitch * sizeof(bf16));
      for (int64_t r = 0; r < w.rows; r++)
        std::memcpy(own.copy + r * pitch, w.at + r * w.stride, w.deep.n * sizeof(bf16));
    }
    int64_t rate = ((pending.total - pending.done) << 8) / within + 1, due = 0;
    for (int64_t chunk = 0; chunk < w.deep.chunks; chunk++) {
      int64_t begin = w.deep.first(chunk), steps = w.deep.first(chunk + 1) - begin;
      const bf16* after = chunk + 1 < w.deep.chunks ? w.at + (begin + steps) * STEP : next.at;
      for (int64_t p = 0; p < panels; p++) {
        float* c = sums + p * apart;
        const Cell* b = x + (begin * panels + p * steps) * CELLS;
        const bf16 *a = rows + begin * STEP, *below = a + LANES * pitch;
        int64_t fetched = p * UNITS / panels, last = (p + 1) * UNITS / panels;
        if (chunk || add) {
          _tile_loadd(0, c, 64);
          _tile_loadd(1, c + ACROSS * SQUARE, 64);
          if (P > 16) {
            _tile_loadd(2, c + SQUARE, 64);
            _tile_loadd(3, c + 3 * SQUARE, 64);
          }
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t s = 0; s < steps; s++, a += STEP, below += STEP, b += CELLS) {
          // Cells are met once by a chunk: read as a stream they leave L1 to the rows.
          _tile_loadd(4, a, pitch * sizeof(bf16));
          _tile_stream_loadd(6, b, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, below, pitch * sizeof(bf16));
          _tile_dpbf16ps(1, 5, 6);
          if (P > 16) {
            _tile_stream_loadd(7, b + SQUARE, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
          for (int64_t r = fetched; r < last; r++)
            __builtin_prefetch(after + r * w.stride + s * STEP);
          for (due += rate; due >= 256 && pending.done < pending.total; due -= 256)
            pending.piece();
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + ACROSS * SQUARE, 64);
        if (P > 16) {
          _tile_stored(2, c + SQUARE, 64);
          _tile_stored(3, c + 3 * SQUARE, 64);
        }
      }
    }
  }

  // 32 rows of a weight, or of two that take the same cells, to multiply.
  struct Task {
    Part first, second;  // `second.at` is null where there is one
    const Cell* x;
    int64_t panels, row;
    int64_t of = 0;  // whose rows they are, where there are several layers
  };

  // Tasks one after the other: `next(task)` says which and whether there is one, `begin(task)` that
  // its cells are read now, and `pend(pending, task)` what becomes of its sums.
  template <class Next, class Begin, class Pend>
  void meet(Own& own, bool add, float* all, Next next, Begin begin, Pend pend) const {
    for (Pending& pending : own.pending) pending.done = pending.total = 0;
    int at = 0;
    Task now, then;
    for (bool there = next(now); there; now = then, at ^= 1) {
      there = next(then);
      begin(now);
      const Part& fetched = there ? then.first : now.first;
      int count = now.second.at ? 2 : 1;
      int64_t steps = now.first.deep.steps * now.panels;
      float* sums = all ? all + now.row / UNITS * now.panels * SUMS
                        : own.sums + at * 2 * (tile / P) * SUMS;
      int64_t apart = all ? SUMS : 2 * SUMS;
      Pending& before = own.pending[at ^ 1];
      multiply(own, sums, apart, add, now.first, count > 1 ? now.second : fetched, now.x,
               now.panels, before, count * steps);
      if (count > 1)
        multiply(own, sums + SUMS, apart, add, now.second, fetched, now.x, now.panels, before,
                 steps);
      before.finish();
      own.pending[at].between = apart;
      own.pending[at].sums = sums;
      pend(own.pending[at], now);
    }
    own.pending[at ^ 1].finish();
  }

  // 16 tokens from `t` on, of which x has `there`, into their panel; beyond them are zeros.
  void pack(Cell* cells, Rows<const bf16> x, int64_t t, int64_t there, int64_t panels) const {
    Depth deep(d_model);
    for (int64_t s = 0; s < deep.steps; s++) {
      V square[LANES];
      for (int i = 0; i < LANES; i++)
        square[i] = i < there ? Pairs::along(x.row(i, s * STEP), d_model - s * STEP) : V{};
      transpose(square);
      Cell* at = cells + deep.at(s, t / P, panels) + t % P / LANES * SQUARE;
      for (int i = 0; i < LANES; i++) std::memcpy(at + i * LANES, &square[i], sizeof(V));
    }
  }

  static void as_it_is(const Task&) {}

  // Gate and up are saved where there is a place. Without `down` the hidden values are the result.
  void run(const Formula& formula, Rows<const bf16> x, const Weight<bf16>& gate,
           const Weight<bf16>& up, const Weight<bf16>& down, Rows<bf16> y, Rows<bf16> saved_gate,
           Rows<bf16> saved_up, int64_t tokens, char* scratch) const {
    int64_t next_tile = 0, next_hidden = 0, next_out = 0;
#pragma omp parallel num_threads(threads)
    {
      Amx::begin();
      Own own;
      int id = omp_get_thread_num();
      char* cells_at = scratch + (shared ? 0 : id * (cell_bytes() + own_bytes()));
      char* own_at = shared ? scratch + cell_bytes() + id * own_bytes() : cells_at + cell_bytes();
      own.inputs = (Cell*)cells_at;
      own.hidden = own.inputs + cells(d_model);
      place(own, own_at);
      for (int64_t mine = 0;;) {
        int64_t t = shared ? mine : __atomic_fetch_add(&next_tile, tile, __ATOMIC_RELAXED);
        if (t >= tokens) break;
        mine += tile;
        int64_t size = std::min(tokens - t, tile), panels = parts(size, P);
        Share share(panels * ACROSS, shared);
        for (int64_t i = share.begin * LANES; i < share.end * LANES; i += LANES)
          pack(own.inputs, x.from(t + i), i, size - i, panels);
        if (shared) {
#pragma omp barrier
          if (id == 0) next_out = 0;
        }
        for (int64_t g = 0; g < d_hidden; g += group) {
          int64_t units = std::min(group, d_hidden - g), block = 0;
          Depth deep(units);
          auto next_units = [&](Task& task) {
            int64_t n = shared ? __atomic_fetch_add(&next_hidden, UNITS, __ATOMIC_RELAXED)
                               : (block += UNITS) - UNITS;
            if (n >= units) return false;
            task = {part(gate, g + n, d_hidden, 0, d_model), part(up, g + n, d_hidden, 0, d_model),
                    own.inputs, panels, g + n};
            return true;
          };
          meet(own, false, nullptr, next_units, as_it_is,
               [&](Pending& pending, const Task& task) {
                 pending.formula = &formula;
                 pending.rows = std::min<int64_t>(d_hidden - task.row, UNITS);
                 pending.token = t, pending.tokens = size, pending.panels = panels;
                 pending.gate = saved_gate, pending.up = saved_up;
                 pending.out = down.at ? Rows<bf16>{} : y;
                 pending.to_cells(down.at ? own.hidden : nullptr, deep, task.row - g);
                 pending.begin(gate, up, task.row);
               });
          if (shared) {
#pragma omp barrier
            if (id == 0) next_hidden = 0;
          }
          if (!down.at) continue;
          bool last = g + group >= d_hidden;
          block = 0;
          auto next_rows = [&](Task& task) {
            int64_t row = shared ? __atomic_fetch_add(&next_out, UNITS, __ATOMIC_RELAXED)
                                 : (block += UNITS) - UNITS;
            if (row >= d_out) return false;
            task = {part(down, row, d_out, g, units), {}, own.hidden, panels, row};
            return true;
          };
          meet(own, g > 0, own.all, next_rows, as_it_is,
               [&](Pending& pending, const Task& task) {
                 pending.formula = nullptr;
                 pending.rows = std::min<int64_t>(d_out - task.row, UNITS);
                 pending.token = t, pending.tokens = size, pending.panels = panels;
                 pending.gate = pending.up = {};
                 pending.out = last ? y : Rows<bf16>{};
                 pending.begin(down, {}, task.row);
               });
        }
        if (shared) {
#pragma omp barrier
        }
      }
      Amx::end();
    }
  }
};

}  // namespace gatedffn
#endif
