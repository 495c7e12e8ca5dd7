// How the tokens of experts are cut into parts, which core takes each, and the memory for it.
#pragma once
#include "../../feed_forward/cpu/blocks.h"
#include "../../feed_forward/cpu/few.h"
#include "../../feed_forward/cpu/tiles.h"
#include "routing.h"

namespace gatedffn {

constexpr int64_t GROUP_BYTES = 1 << 20;  // of hidden values, for each thread: they stay in L2
constexpr int64_t LARGEST_GROUP = 8 << 20;
constexpr int64_t PART_BYTES = 1 << 20;  // of a part's tokens where they are packed, and
constexpr int64_t MOST_OF_PART = 256;    // how many these are at most
// Tokens of an expert up to which the core for few of them is the fastest, 32 at a time. Processor
// milliseconds of an expert (2048, 768), one core with AVX-512 or as it says, beside other work:
//
//     tokens            1     2     3     8    16    32    64   256
//     bfloat16 few    0.62  0.59  0.66  1.05  1.71  3.15
//              tiles  0.66  0.59  0.59  0.62  0.67  0.79
//     float32  few                      1.81  2.07  2.71  5.79  20.6
//              blocks                   4.65  4.66  5.96  9.51  26.6
//     float16  few                      1.86  2.56  4.47  7.49  27.9
//              blocks                   4.51  4.48  6.36  7.64  20.6
//     AVX2: float32 few, blocks              6.3, 11.3   15.5, 18.7   48.9, 55.2
//           bfloat16                         5.6, 9.2    19.0, 16.4   66.1, 48.2
//
// So without tiles only what is converted for each of them is packed instead.
constexpr int64_t FEW_BESIDE_TILES = 2, FEW_CONVERTED = 32, ONE_TILE = 16;
constexpr int64_t JOBS = 8;  // of each thread in the second phase
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
struct ExpertParts {
  Stack<T> gate, up, down;
  int64_t tokens, slots, experts, d_model, d_hidden, d_out;
  int threads;

#ifdef GATEDFFN_TILES
  static constexpr bool HAS_TILES = std::is_same<Kernel, Amx>::value;
#else
  static constexpr bool HAS_TILES = false;
#endif
  static constexpr bool IN_PLACE = sizeof(T) == sizeof(float);  // y is where the sums are

  // Which core takes an expert of so many tokens.
  Core core(int64_t count) const {
    if (!gate.by_rows() || !up.by_rows() || !down.by_rows()) return Core::BLOCKS;
    if (HAS_TILES && count > FEW_BESIDE_TILES)
      return count > ONE_TILE ? Core::TILES : Core::ONE_TILE;
    return is_converted<T>() && count > FEW_CONVERTED ? Core::BLOCKS : Core::FEW;
  }

  // The most tokens of a part of a core: what is packed stays in L2.
  int64_t most(Core core) const {
    if (core == Core::FEW) return TOKENS;
    if (core == Core::ONE_TILE) return ONE_TILE;
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
#ifdef GATEDFFN_TILES
    if constexpr (HAS_TILES) {
      auto whole = [&](auto tiles) {
        tiles.d_model = d_model, tiles.d_hidden = tiles.group = d_hidden, tiles.d_out = d_out;
        tiles.tile = most(core);
        tiles.threads = 1, tiles.shared = true;
        body(tiles);
      };
      if (core == Core::TILES) whole(Tiles<32>());
      else whole(Tiles<16>());
    }
#endif
  }

  PartBytes bytes(Core core, int64_t count) const {
    PartBytes needed;
    switch (core) {
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
        with_tiles(core, [&](auto tiles) {
          int64_t across = parts(count, tiles.panel()) * tiles.panel();
          needed.work = tiles.own_bytes();
          tiles.tile = across;
          needed.inputs = tiles.cells(d_model) * sizeof(float);
          needed.hidden = tiles.cells(d_hidden) * sizeof(float);
        });
    }
    return needed;
  }

  // The most that any part needs: beyond few tokens, more tokens need more.
  PartBytes largest() const {
    PartBytes all;
    for (int64_t count = 1; count <= std::min<int64_t>(TOKENS, pairs()); count++)
      if (core(count) == Core::FEW) all.cover(bytes(Core::FEW, count));
    int64_t count = pairs();
    for (int64_t of : {std::min(count, ONE_TILE), count})
      if (Core which = core(of); which != Core::FEW)
        all.cover(bytes(which, std::min(of, most(which))));
    return all;
  }

  int64_t own_bytes(const PartBytes& part) const {
    return lines(TOKENS * d_model * sizeof(T)) + 2 * lines(d_hidden * sizeof(T)) +
           lines(part.inputs) + lines(part.work);
  }
  int64_t sums_bytes() const { return IN_PLACE ? 0 : lines(tokens * d_out * sizeof(float) + 64); }
  int64_t parts_most() const { return std::min(experts, pairs()) + pairs() / TOKENS; }
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
      int64_t count = routing.count(e);
      Core which = core(count);
      int64_t times = parts(count, most(which));
      for (int64_t i = 0; i < times; i++) {
        int64_t begin = count * i / times, end = count * (i + 1) / times;
        made[n++] = {e, routing.starts[e] + begin, end - begin, which, 0, 0, 0,
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
      PartBytes needed = bytes(all[p].core, all[p].count);
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
};

}  // namespace gatedffn
