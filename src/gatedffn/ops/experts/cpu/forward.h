// The experts' forward, in two phases for a group of experts at a time: every thread makes hidden
// values of some units, then every thread some rows of the output for all experts of the group.
//
// Tokens are gathered on the way in. What an expert makes of them is added, times the routing weight,
// to float32 sums in the order of experts and pairs, whatever the threads, and rounded once at the
// end. An expert's tokens, or `most()` of them, are a part; their number says which core it takes.
#pragma once
#include "../../feed_forward/cpu/blocks.h"
#include "../../feed_forward/cpu/few.h"
#include "../../feed_forward/cpu/tiles.h"
#include "routing.h"

namespace gatedffn {

constexpr int64_t GROUP_BYTES = 1 << 20;     // of hidden values, for each thread: they stay in L2
constexpr int64_t LARGEST_GROUP = 8 << 20;
constexpr int64_t PART_BYTES = 1 << 20;      // of the tokens of a part, and of their hidden values
constexpr int64_t MOST_OF_PART = 256;
// Tokens up to which a core is the fastest: that for few tokens, and one tile across.
constexpr int64_t FEW_BESIDE_TILES = 4, FEW_BESIDE_BLOCKS = 32, ONE_TILE = 16;
constexpr int64_t JOBS = 8;  // of each thread in the second phase

constexpr int GATHERED = 32;  // tokens at most that lie as rows
constexpr int TILE_ROWS = 32;

enum class Core { FEW, BLOCKS, ONE_TILE, TILES };

// Some tokens of an expert.
struct ExpertPart {
  int64_t expert, first, count;  // pairs, as they are sorted
  Core core;
  int64_t job, jobs;  // of the first phase
  int64_t left;       // of them, to do
  char *hidden;       // hidden values as the second product reads them
  char *rows;         // and as rows, where they are turned when all are there
};

// Bytes of a part.
struct PartBytes {
  int64_t inputs = 0, work = 0;  // of a thread
  int64_t hidden = 0, rows = 0;

  void cover(const PartBytes& o) {
    inputs = std::max(inputs, o.inputs), work = std::max(work, o.work);
    hidden = std::max(hidden, o.hidden), rows = std::max(rows, o.rows);
  }
};

// What threads take of their jobs: each its own share first, then the others'.
struct Jobs {
  struct alignas(64) Taken {
    int64_t count;
  };
  Taken* taken;  // of each thread
  int64_t all = 0;

  int64_t claim() {
    int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t i = 0; i < threads; i++) {
      int64_t whose = (id + i) % threads, begin = all * whose / threads;
      int64_t end = all * (whose + 1) / threads;
      if (__atomic_load_n(&taken[whose].count, __ATOMIC_RELAXED) >= end - begin) continue;
      int64_t job = begin + __atomic_fetch_add(&taken[whose].count, 1, __ATOMIC_RELAXED);
      if (job < end) return job;
    }
    return -1;
  }
};

template <class Kernel, class T = typename Kernel::Source>
struct Experts {
  const Formula* formula;
  Rows<const T> x;
  Stack<T> gate, up, down;
  const int64_t* index;
  const float* weights;
  Rows<T> y, saved_gate, saved_up;
  bool weigh_input;
  int64_t tokens, slots, experts, d_model, d_hidden, d_out;
  int threads;

#ifdef __AMX_BF16__
  static constexpr bool HAS_TILES = std::is_same<Kernel, Amx>::value;
#else
  static constexpr bool HAS_TILES = false;
#endif
  static constexpr bool IN_PLACE = sizeof(T) == sizeof(float);  // y is where the sums are

  // What a thread works in.
  struct Own {
    T *lines, *biases[2];  // tokens that are gathered, biases that are
    char *inputs, *work;   // the tokens of a part as its core reads them
    int64_t part;          // whose they are, or -1
    const T* gathered[2];
  };

  // Which core takes so many tokens.
  Core core(int64_t count) const {
    if (!gate.by_rows() || !up.by_rows() || !down.by_rows()) return Core::BLOCKS;
    if (HAS_TILES && count > FEW_BESIDE_TILES)
      return count > ONE_TILE ? Core::TILES : Core::ONE_TILE;
    return count > FEW_BESIDE_BLOCKS ? Core::BLOCKS : Core::FEW;
  }

  // The most tokens of a part: they stay in L2, as do their hidden values, and can be packed.
  int64_t most() const {
    int64_t longest = std::max(d_model, d_hidden), cells = parts(longest, Kernel::PER_CELL);
    int64_t count = std::min<int64_t>(PART_BYTES / (d_model * sizeof(T)), PACKED / cells);
    return std::max<int64_t>(32, std::min(count, MOST_OF_PART) / 32 * 32);
  }

  int64_t pairs() const { return tokens * slots; }
  int64_t group_bytes() const { return std::min(GROUP_BYTES * threads, LARGEST_GROUP); }
  int64_t out_rows() const { return std::max<int64_t>(64, parts(parts(d_out, threads * JOBS), 32) * 32); }

  Cut<Kernel> hidden_cut(int64_t count) const { return {count, d_hidden, d_model, threads}; }
  Cut<Kernel> out_cut(int64_t count) const {
    return {count, std::min(d_out, out_rows()), d_hidden, 1};
  }

  // Calls body with the layer of tiles.
  template <class Body>
  void with_tiles(Core core, Body body) const {
#ifdef __AMX_BF16__
    if constexpr (HAS_TILES) {
      auto whole = [&](auto tiles) {
        tiles.d_model = d_model, tiles.d_hidden = tiles.group = d_hidden, tiles.d_out = d_out;
        tiles.tile = core == Core::TILES ? most() : int64_t(ONE_TILE);
        tiles.threads = 1, tiles.shared = true;
        body(tiles);
      };
      if (core == Core::TILES) whole(Tiles<32>());
      else whole(Tiles<16>());
    }
#endif
  }

  PartBytes bytes(int64_t count) const {
    PartBytes needed;
    switch (core(count)) {
      case Core::FEW:
        with_form<T>(count, d_model, [&](auto form) {
          needed.inputs = form.prepared_bytes(d_model, count);
          needed.hidden = lines(form.prepared_bytes(d_hidden, count));
        });
        needed.rows = lines(count * d_hidden * sizeof(T));
        break;
      case Core::BLOCKS: {
        Cut<Kernel> first = hidden_cut(count), second = out_cut(count);
        int64_t height = first.panels(count) * LANES;
        int64_t floats = std::max(first.right_size() + 2 * height * first.width,
                                  second.right_size() + height * second.width);
        needed.inputs = lines(first.packed_size(count) * sizeof(float));
        needed.work = floats * sizeof(float);
        needed.hidden = lines(second.packed_size(count) * sizeof(float));
        needed.rows = lines(count * d_hidden * sizeof(T));
        break;
      }
      default:
        with_tiles(core(count), [&](auto tiles) {
          int64_t across = parts(count, tiles.panel()) * tiles.panel();
          needed.work = tiles.own_bytes();
          tiles.tile = across;
          needed.inputs = tiles.cells(d_model) * sizeof(float);
          needed.hidden = tiles.cells(d_hidden) * sizeof(float);
        });
    }
    return needed;
  }

  // The most that any part needs.
  PartBytes largest() const {
    PartBytes all;
    int64_t end = std::min(most(), pairs());
    for (int64_t count = 1; count <= end; count++) {
      all.cover(bytes(count));
      if (count == 32) count = std::max(count, end - 1);  // beyond that more tokens need more
    }
    return all;
  }

  int64_t own_bytes(const PartBytes& part) const {
    return lines(GATHERED * d_model * sizeof(T)) + 2 * lines(d_hidden * sizeof(T)) +
           lines(part.inputs) + lines(part.work);
  }
  int64_t sums_bytes() const { return IN_PLACE ? 0 : lines(tokens * d_out * sizeof(float) + 64); }
  int64_t parts_most() const { return std::min(experts, pairs()) + pairs() / most(); }
  int64_t parts_bytes() const { return lines((parts_most() + 1) * sizeof(ExpertPart)); }
  int64_t held_bytes(const PartBytes& part) const {
    return std::max(group_bytes(), part.hidden + part.rows);
  }

  int64_t scratch_bytes() const {
    PartBytes part = largest();
    return Routing::bytes(tokens, slots, experts) + parts_bytes() + sums_bytes() +
           held_bytes(part) + threads * (2 * sizeof(Jobs::Taken) + own_bytes(part));
  }

  // Cuts what is routed here into parts; returns their number. Behind them is one that ends jobs.
  int64_t cut(const Routing& routing, ExpertPart* made) const {
    int64_t n = 0;
    for (int64_t e = 0; e < experts; e++) {
      int64_t count = routing.count(e), times = parts(count, most());
      for (int64_t i = 0; i < times; i++) {
        int64_t begin = count * i / times, end = count * (i + 1) / times;
        made[n++] = {e, routing.starts[e] + begin, end - begin, core(end - begin), 0, 0, 0,
                     nullptr, nullptr};
      }
    }
    return n;
  }

  // Units of a job of the first phase.
  int64_t units(const ExpertPart& part) const {
    if (part.core == Core::FEW) return ROWS;
    return part.core == Core::BLOCKS ? hidden_cut(part.count).width : TILE_ROWS;
  }

  // The parts from `first` on that are worked on together, in `held` bytes; returns the end.
  int64_t group(ExpertPart* all, int64_t first, int64_t count, char* memory, int64_t held) const {
    int64_t p = first, jobs = 0;
    for (; p < count; p++) {
      PartBytes needed = bytes(all[p].count);
      held -= needed.hidden + needed.rows;
      if (held < 0) break;
      all[p].hidden = memory, all[p].rows = memory + needed.hidden;
      memory += needed.hidden + needed.rows;
      all[p].job = jobs;
      all[p].left = all[p].jobs = parts(d_hidden, units(all[p]));
      jobs += all[p].jobs;
    }
    return p;
  }

  // Tokens of a part from `t` on as rows that follow each other.
  void gather(const Own& own, const Routing& routing, const ExpertPart& part, int64_t t,
              int64_t count) const {
    for (int64_t i = 0; i < count; i++) {
      int64_t pair = part.first + t + i;
      const T* from = x.row(routing.token[pair], 0);
      T* to = own.lines + i * d_model;
      std::memcpy(to, from, d_model * sizeof(T));
      if (!weigh_input) continue;
      alignas(64) float some[BLOCK];
      for (int64_t k = 0; k < d_model; k += BLOCK) {
        int64_t n = std::min(BLOCK, d_model - k);
        widen(some, to + k, n);
        for (int64_t j = 0; j < n; j += LANES)
          store(some + j, load(some + j) * set(routing.weight[pair]));
        narrow(to + k, some, n);
      }
    }
  }

  // The tokens and biases of a part, as this thread needs them.
  void prepare(Own& own, const Routing& routing, const ExpertPart& part, int64_t number) const {
    if (own.part == number) return;
    own.part = number;
    own.gathered[0] = gate.gather_bias(own.biases[0], part.expert, d_hidden);
    own.gathered[1] = up.gather_bias(own.biases[1], part.expert, d_hidden);
    Rows<const T> some = {own.lines, d_model};
    auto rows_from = [&](int64_t t) {
      int64_t there = std::max<int64_t>(0, std::min<int64_t>(LANES, part.count - t));
      gather(own, routing, part, t, there);
      return there;
    };
    switch (part.core) {
      case Core::FEW:
        gather(own, routing, part, 0, part.count);
        with_form<T>(part.count, d_model, [&](auto form) {
          form.prepare(own.inputs, some, d_model, part.count, false);
        });
        break;
      case Core::BLOCKS: {
        Cut<Kernel> cut = hidden_cut(part.count);
        int64_t panels = cut.panels(part.count);
        for (int64_t p = 0; p < panels; p++) {
          int64_t there = rows_from(p * LANES);
          for (int64_t chunk = 0; chunk < cut.chunks; chunk++)
            pack_panel(cut, (float*)own.inputs, chunk, p, panels, along(some), 0, there);
        }
        break;
      }
      default:
        with_tiles(part.core, [&](auto tiles) {
          int64_t panels = parts(part.count, tiles.panel());
          for (int64_t t = 0; t < panels * tiles.panel(); t += LANES) {
            int64_t there = rows_from(t);
            tiles.pack((uint32_t*)own.inputs, some, t, there, panels);
          }
        });
    }
  }

  // What is left of a part when one of its jobs is done: with the last of them its hidden values are
  // there, and are turned to what the second product reads.
  void finish(ExpertPart& part) const {
    if (__atomic_sub_fetch(&part.left, 1, __ATOMIC_ACQ_REL)) return;
    Rows<const T> hidden = {(T*)part.rows, d_hidden};
    if (part.core == Core::BLOCKS)
      pack_left(out_cut(part.count), (float*)part.hidden, along(hidden), 0, part.count, false);
    else
      with_form<T>(part.count, d_model, [&](auto form) {
        form.prepare(part.hidden, hidden, d_hidden, part.count, false);
      });
  }

  // The first phase: jobs of parts from `first` on.
  void make_hidden(Own& own, const Routing& routing, ExpertPart* all, int64_t first,
                   Jobs& jobs) const {
    int64_t job = jobs.claim(), p = first;
    auto find = [&](int64_t job) {
      while (job >= all[p].job + all[p].jobs) p++;
      while (job < all[p].job) p--;
      return p;
    };
    while (job >= 0) {
      ExpertPart& part = all[find(job)];
      if (part.core != Core::FEW && part.core != Core::BLOCKS) {
        with_tiles(part.core, [&](auto tiles) {
          hidden_of_tiles(tiles, own, routing, all, find, [&] { return jobs.claim(); }, job);
        });
        continue;
      }
      prepare(own, routing, part, p);
      Weight<T> gate_of = gate.of(part.expert, own.gathered[0]);
      Weight<T> up_of = up.of(part.expert, own.gathered[1]);
      Rows<T> hidden = {(T*)part.rows, d_hidden};
      Rows<T> saved[2] = {saved_gate.from(part.first), saved_up.from(part.first)};
      int64_t step = units(part), unit = (job - part.job) * step;
      int64_t count = std::min(step, d_hidden - unit);
      if (part.core == Core::FEW) {
        with_form<T>(part.count, d_model, [&](auto form) {
          some_hidden<decltype(form)>(*formula, gate_of, up_of, unit, count, own.inputs, d_model,
                                      part.count, hidden, saved[0], saved[1]);
        });
      } else {
        Cut<Kernel> cut = hidden_cut(part.count);
        Operand<T> operands[2] = {gate.operand(part.expert), up.operand(part.expert)};
        float* right = (float*)own.work;
        float* sums[2] = {right + cut.right_size()};
        sums[1] = sums[0] + cut.panels(part.count) * LANES * cut.width;
        const float* left = (float*)own.inputs;
        if (up.at) meet_columns<2>(cut, left, part.count, operands, unit, count, right, sums);
        else meet_columns<1>(cut, left, part.count, operands, unit, count, right, sums);
        gate_patch(cut, {0, part.count, unit, count}, sums, *formula, gate_of, up_of, hidden,
                   saved[0], saved[1]);
      }
      finish(part);
      job = jobs.claim();
    }
  }

  // Jobs of parts that take the same tiles, until one does not.
  template <class Layer, class Find, class Claim>
  void hidden_of_tiles(const Layer& tiles, Own& own, const Routing& routing, ExpertPart* all,
                       Find find, Claim claim, int64_t& job) const {
    typename Layer::Own place;
    tiles.place(place, own.work);
    place.inputs = (uint32_t*)own.inputs;
    Core core = all[find(job)].core;
    auto next = [&](typename Layer::Task& task) {
      if (job < 0) return false;
      int64_t p = find(job);
      const ExpertPart& part = all[p];
      if (part.core != core) return false;
      int64_t unit = (job - part.job) * Layer::UNITS;
      task = {tiles.part(gate.of(part.expert), unit, d_hidden, 0, d_model),
              tiles.part(up.of(part.expert), unit, d_hidden, 0, d_model), place.inputs,
              parts(part.count, Layer::panel()), unit, p};
      job = claim();
      return true;
    };
    auto begin = [&](const typename Layer::Task& task) {
      prepare(own, routing, all[task.of], task.of);
    };
    tiles.meet(place, false, nullptr, next, begin, [&](auto& pending, const auto& task) {
      const ExpertPart& part = all[task.of];
      pending.formula = formula;
      pending.rows = task.first.rows, pending.tokens = part.count, pending.panels = task.panels;
      pending.gate = saved_gate.from(part.first), pending.up = saved_up.from(part.first);
      pending.to_cells((uint32_t*)part.hidden, typename Layer::Depth(d_hidden), task.row);
      pending.begin(gate.of(part.expert, own.gathered[0]), up.of(part.expert, own.gathered[1]),
                    task.row);
    });
  }

  // The second phase: some rows of the output, of parts up to `end`.
  void add_rows(Own& own, const Scattered& sums, const ExpertPart* all, int64_t first, int64_t end,
                int64_t row, int64_t row_end) const {
    for (int64_t p = first; p < end;) {
      const ExpertPart& part = all[p];
      if (part.core != Core::FEW && part.core != Core::BLOCKS) {
        with_tiles(part.core, [&](auto tiles) {
          p = rows_of_tiles(tiles, own, sums, all, p, end, row, row_end);
        });
        continue;
      }
      Weight<T> weight = down.of(part.expert);
      Scattered to = sums.from(part.first);
      if (part.core == Core::FEW) {
        with_form<T>(part.count, d_model, [&](auto form) {
          alignas(64) float made[TOKENS][ROWS];
          for (int64_t r = row; r < row_end; r += ROWS) {
            int64_t count = std::min<int64_t>(ROWS, row_end - r);
            form.product(made, weight.at + r * weight.stride, weight.stride, count, part.hidden,
                         d_hidden, part.count);
            add(to, made[0], ROWS, weight.bias, part.count, r, count);
          }
        });
      } else {
        Cut<Kernel> cut = out_cut(part.count);
        Operand<T> operand = down.operand(part.expert);
        float* right = (float*)own.work;
        float* made = right + cut.right_size();
        for (int64_t r = row; r < row_end; r += cut.width) {
          int64_t count = std::min(cut.width, row_end - r);
          meet_columns<1>(cut, (float*)part.hidden, part.count, &operand, r, count, right, &made);
          add(to, made, cut.width, weight.bias, part.count, r, count);
        }
      }
      p++;
    }
  }

  // Adds what was made of tokens, `columns` numbers of each, with the bias.
  static void add(const Scattered& to, const float* made, int64_t stride, const T* bias,
                  int64_t count, int64_t column, int64_t columns) {
    for (int64_t c = 0; c < columns; c += LANES) {
      int n = int(std::min<int64_t>(LANES, columns - c));
      V more = bias ? load_some(bias + column + c, n) : V{};
      for (int64_t t = 0; t < count; t++)
        to.add(t, column + c, load(made + t * stride + c) + more, n);
    }
  }

  // Parts from p on that take the same tiles; returns the next one.
  template <class Layer>
  int64_t rows_of_tiles(const Layer& tiles, Own& own, const Scattered& sums, const ExpertPart* all,
                        int64_t p, int64_t end, int64_t begin_row, int64_t row_end) const {
    typename Layer::Own place;
    tiles.place(place, own.work);
    Core core = all[p].core;
    int64_t row = begin_row;
    auto next = [&](typename Layer::Task& task) {
      if (row >= row_end) p++, row = begin_row;
      if (p >= end || all[p].core != core) return false;
      task = {tiles.part(down.of(all[p].expert), row, row_end, 0, d_hidden), {},
              (const uint32_t*)all[p].hidden, parts(all[p].count, Layer::panel()), row, p};
      row += Layer::UNITS;
      return true;
    };
    tiles.meet(place, false, nullptr, next, Layer::as_it_is, [&](auto& pending, const auto& task) {
      const ExpertPart& part = all[task.of];
      pending.formula = nullptr;
      pending.rows = task.first.rows, pending.tokens = part.count, pending.panels = task.panels;
      pending.added = sums.from(part.first);
      pending.begin(down.of(part.expert), {}, task.row);
    });
    return p;
  }

  void run(char* scratch) const {
    Routing routing(tokens, slots, experts, scratch);
    PartBytes most_bytes = largest();
    char* at = scratch + Routing::bytes(tokens, slots, experts);
    auto take = [&](int64_t bytes) { return (at += bytes) - bytes; };
    auto* all = (ExpertPart*)take(parts_bytes());
    Rows<float> sums = {IN_PLACE ? (float*)y.at : (float*)at, d_out};
    take(sums_bytes());
    int64_t held = held_bytes(most_bytes), group_end = 0;
    char* memory = take(held);
    auto* taken = (Jobs::Taken*)take(2 * threads * sizeof(Jobs::Taken));
    Jobs of_hidden = {taken}, of_rows = {taken + threads};
    routing.sort(index, weights);
    int64_t count = cut(routing, all), width = out_rows();
    Scattered added = {sums, routing.token, weigh_input ? nullptr : routing.weight};
#pragma omp parallel num_threads(threads)
    {
      Kernel::begin();
      char* mine = at + omp_get_thread_num() * own_bytes(most_bytes);
      Own own = {};
      own.lines = (T*)mine, mine += lines(GATHERED * d_model * sizeof(T));
      for (T*& bias : own.biases) bias = (T*)mine, mine += lines(d_hidden * sizeof(T));
      own.inputs = mine, own.work = mine + lines(most_bytes.inputs), own.part = -1;
      int64_t first = 0, end;
      do {
#pragma omp single
        {
          group_end = group(all, first, count, memory, held);
          of_hidden.all = group_end > first ? all[group_end - 1].job + all[group_end - 1].jobs : 0;
          of_rows.all = parts(d_out, width);
          for (int i = 0; i < 2 * threads; i++) taken[i].count = 0;
        }
        end = group_end;
        make_hidden(own, routing, all, first, of_hidden);
#pragma omp barrier
        for (int64_t job; (job = of_rows.claim()) >= 0;) {
          int64_t row = job * width, row_end = std::min(row + width, d_out);
          for (int64_t t = 0; first == 0 && t < tokens; t++)
            std::memset(sums.row(t, row), 0, (row_end - row) * sizeof(float));
          add_rows(own, added, all, first, end, row, row_end);
          for (int64_t t = 0; !IN_PLACE && end == count && t < tokens; t++)
            narrow(y.row(t, row), sums.row(t, row), row_end - row);
        }
#pragma omp barrier
        first = end;
      } while (first < count);
      Kernel::end();
    }
  }
};

}  // namespace gatedffn
