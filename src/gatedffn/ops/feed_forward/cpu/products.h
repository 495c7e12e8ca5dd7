// Matrix products for any number of tokens: what a thread works on lies packed in its caches.
//
// c[i][j] = sum over k of a[i][k] b[k][j], for operands with any strides, best where one is 1. Both
// are packed into squares of LANES by LANES cells, so that every read of the inner loop is of
// whole lines; a cell is a float, or two neighbours of the summed dimension in bfloat16.
//
//     all threads pack some rows of `a`
//     a thread takes some columns: it packs a chunk of them, meets it with all of these rows, and
//     so on for every chunk of the summed dimension; then it hands on the finished patch
#pragma once
#include <algorithm>

#include "../../cpu.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace gatedffn {

constexpr int SQUARE = LANES * LANES;
constexpr int AT_A_TIME = 512;  // rows of the left operand that are packed at most
// Cells of it that are: a quarter of what scratch memory keeps.
constexpr int64_t PACKED = 4 << 20;

// An operand: the stride of what stays (i or j), and that of the summed dimension.
template <class T>
struct Operand {
  const T* at;
  int64_t row, deep;
};

// Cells of one value, as float32.
template <class T>
struct Values {
  typedef T Source;
  static constexpr int PER_CELL = 1;

  // LANES cells that lie one after another; `there` of them exist.
  static V along(const T* at, int64_t there) {
    if (there >= LANES) return load(at);
    return there > 0 ? load_some(at, int(there)) : V{};
  }
  static V across(const T* at, int64_t, int64_t there, int64_t) { return along(at, there); }
  // What one cell adds to the sums of LANES others.
  static V join(V sum, const void* cell, V x) {
    float value;
    std::memcpy(&value, cell, sizeof value);
    return sum + set(value) * x;
  }
};

// Cells of two neighbours in bfloat16.
struct Pairs {
  typedef bf16 Source;
  static constexpr int PER_CELL = 2;

  static V along(const bf16* at, int64_t there) {
    if (there >= 2 * LANES) return load((const float*)at);
    bf16 some[2 * LANES] = {};
    for (int64_t i = 0; i < there; i++) some[i] = at[i];
    return load((const float*)some);
  }
  // One of `deep_there` values of the summed dimension and the next one, side by side.
  static V across(const bf16* at, int64_t deep, int64_t there, int64_t deep_there) {
    V even = Values<bf16>::along(at, there);
    V odd = deep_there > 1 ? Values<bf16>::along(at + deep, there) : V{};
    return (V)((U)even >> 16 | (U)odd);
  }
#ifdef __AVX512BF16__
  static V join(V sum, const void* cell, V x) {
    int32_t pair;
    std::memcpy(&pair, cell, sizeof pair);
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(pair));
  }
#endif
};

// Products of cells by sums in registers.
template <class Cells>
struct Registers : Cells {
  static constexpr int ROWS = LANES / 2, VECTORS = 3;  // sums that fit into the registers
  static constexpr int MOST_VECTORS = 12;              // of a thread at a time
  // Cells of a chunk: few enough for L1, and sums of short sums are more exact.
  static constexpr int DEEP = 64;
  static constexpr int TALL = 1;        // squares of rows that `meet` takes
  static constexpr bool ALONG = false;  // how rows lie in a square

  static void begin() {}
  static void end() {}

  template <int N>
  static void multiply(float* sums, int64_t stride, const float* a, const float* b, int64_t apart,
                       int64_t steps, bool first) {
    V sum[ROWS][N] = {};
    for (int64_t k = 0; k < steps * LANES; k += 2, a += 2 * LANES, b += 2 * LANES) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        V right[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) right[v] = load(b + v * apart + i * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
          for (int v = 0; v < N; v++)
            sum[r][v] = Cells::join(sum[r][v], a + i * LANES + r, right[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) {
        float* at = sums + r * stride + v * LANES;
        store(at, first ? sum[r][v] : load(at) + sum[r][v]);
      }
  }

  // sums[rows][columns] += a b for LANES rows and up to VECTORS lines of columns of one chunk.
  static void meet(float* sums, int64_t stride, const float* a, int64_t, const float* b,
                   int64_t apart, int64_t vectors, int64_t steps, bool first) {
    for (int half = 0; half < 2; half++, sums += ROWS * stride, a += ROWS) {
      if (vectors == 3) multiply<3>(sums, stride, a, b, apart, steps, first);
      else if (vectors == 2) multiply<2>(sums, stride, a, b, apart, steps, first);
      else multiply<1>(sums, stride, a, b, apart, steps, first);
    }
  }
};

#ifdef GATEDFFN_TILES
// Products of tiles, which are squares of cells.
struct Amx : Pairs {
  static constexpr int TALL = 2, VECTORS = 2, MOST_VECTORS = 8;
  static constexpr int DEEP = 128;
  static constexpr bool ALONG = true;

  static void begin() {
    struct {
      uint8_t palette = 1, start = 0, zero[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    // GCC's header tells it of 8 bytes that are read, and stores to the others may be dropped.
    __asm__ volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  static void end() { _tile_release(); }

  static void meet(float* sums, int64_t stride, const float* a, int64_t a_apart, const float* b,
                   int64_t apart, int64_t vectors, int64_t steps, bool first) {
    float* below = sums + LANES * stride;
    int64_t bytes = stride * sizeof(float);
    const float *a2 = a + a_apart, *b2 = b + apart;
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, bytes);
      _tile_loadd(2, below, bytes);
      if (vectors > 1) {
        _tile_loadd(1, sums + LANES, bytes);
        _tile_loadd(3, below + LANES, bytes);
      }
    }
    if (vectors > 1) {
      for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, a + s * SQUARE, 64);
        _tile_loadd(6, b + s * SQUARE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b2 + s * SQUARE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a2 + s * SQUARE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(6, b + s * SQUARE, 64);
        _tile_loadd(4, a + s * SQUARE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a2 + s * SQUARE, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(2, below, bytes);
    if (vectors > 1) {
      _tile_stored(1, sums + LANES, bytes);
      _tile_stored(3, below + LANES, bytes);
    }
  }
};
#endif

// Lines of up to LANES numbers that lie apart. Apart is also the code: GCC takes minutes for it inside.
template <class T>
__attribute__((noinline)) static void gather(T* out, const T* x, int64_t row, int64_t deep,
                                             int64_t there, int64_t lines) {
  for (int64_t k = 0; k < lines; k++)
    for (int64_t r = 0; r < LANES && r < there; r++) out[k * LANES + r] = x[k * deep + r * row];
}

// LANES rows of an operand into squares, one for every LANES cells of the summed dimension: lines
// that run along it, or across it.
template <class Kernel, bool ALONG>
static void pack(float* out, Operand<typename Kernel::Source> x, int64_t first, int64_t there,
                 int64_t begin, int64_t size, int64_t steps) {
  const auto* at = x.at + first * x.row + begin * x.deep;
  constexpr int PER = Kernel::PER_CELL;
  for (int64_t s = 0; s < steps; s++, out += SQUARE) {
    V square[LANES];
    int64_t left = size - s * LANES * PER;
    if (x.deep == 1) {
      for (int r = 0; r < LANES; r++)
        square[r] = r < there ? Kernel::along(at + r * x.row + s * LANES * PER, left) : V{};
    } else {
      typename Kernel::Source gathered[PER][LANES];
      for (int c = 0; c < LANES; c++) {
        const auto* line = at + (s * LANES + c) * PER * x.deep;
        int64_t deep = x.deep, lines = left - c * PER;
        if (x.row != 1 && lines > 0) {  // neither way are numbers beside each other
          gather(gathered[0], line, x.row, deep, there, lines < PER ? lines : PER);
          line = gathered[0], deep = LANES;
        }
        square[c] = lines > 0 ? Kernel::across(line, deep, there, lines) : V{};
      }
    }
    if ((x.deep == 1) != ALONG) transpose(square);
    for (int r = 0; r < LANES; r++) store(out + r * LANES, square[r]);
  }
}

// The same for all rows of a chunk that lie across its lines: line by line, as memory is read, and
// the next chunk is fetched meanwhile.
template <class Kernel>
static void pack_lines(float* out, Operand<typename Kernel::Source> x, int64_t first,
                       int64_t there, int64_t begin, int64_t size, int64_t steps) {
  constexpr int PER = Kernel::PER_CELL;
  const auto* line = x.at + first + begin * x.deep;
  int64_t chunk = steps * LANES * PER, panel = steps * SQUARE;
  for (int64_t c = 0; c < steps * LANES; c++, line += PER * x.deep, out += LANES)
    for (int64_t r = 0; r < there; r += LANES) {
      int64_t left = size - c * PER;
      V cells = left > 0 ? Kernel::across(line + r, x.deep, there - r, left) : V{};
      for (int i = 0; i < PER && left > chunk; i++)
        __builtin_prefetch(line + r + (chunk + i) * x.deep);
      store(out + r / LANES * panel, cells);
    }
}

static inline void plus(float* to, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(to + i, load(to + i) + load(x + i));
}

static inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
static inline int64_t lines(int64_t bytes) { return parts(bytes, 64) * 64; }

// How a product is cut.
template <class Kernel>
struct Cut {
  int64_t rows, columns, deep;
  int64_t height, width;  // rows that are packed at a time, columns of a thread at a time
  int64_t chunks, steps;  // of the summed dimension, and squares in each

  Cut(int64_t rows, int64_t columns, int64_t deep, int threads)
      : rows(rows), columns(columns), deep(deep) {
    int64_t tall = Kernel::TALL * LANES, vectors = parts(columns, LANES);
    int64_t cells = parts(deep, Kernel::PER_CELL), most = PACKED / cells / tall * tall;
    if (most > AT_A_TIME) most = AT_A_TIME;
    if (most < tall) most = tall;
    height = parts(parts(rows, parts(rows, most)), tall) * tall;
    // As many jobs for every thread, of about the same width.
    int64_t jobs = parts(parts(vectors, Kernel::MOST_VECTORS), threads) * threads;
    width = parts(vectors, jobs) * LANES;
    // Very long sums are made of longer ones, or there would be too many to add.
    int64_t chunk = Kernel::DEEP;
    while (chunk < 256 && cells > chunk * chunk) chunk *= 2;
    chunks = parts(cells, chunk);
    steps = parts(parts(cells, chunks), LANES);
  }
  static constexpr int WIDEST = Kernel::MOST_VECTORS * LANES;
  int64_t chunk() const { return steps * LANES * Kernel::PER_CELL; }
  int64_t panel() const { return steps * SQUARE; }  // LANES rows of a chunk
  static int64_t panels(int64_t rows) {
    return parts(rows, Kernel::TALL * LANES) * Kernel::TALL;
  }
  // The cells of so many rows that are packed, at most `height`.
  int64_t packed_size(int64_t rows) const { return chunks * panels(rows) * panel(); }
  int64_t left_size() const { return packed_size(height); }
  int64_t right_size() const { return steps * LANES * width; }
  int64_t patch_size() const { return height * width; }
  int64_t scratch_bytes(int count, int threads) const {
    return (left_size() + threads * (right_size() + count * patch_size())) * sizeof(float);
  }
};

// What a thread finishes of a result at a time.
struct Patch {
  int64_t row, rows, column, columns;
};

// `there` rows of a left operand from `row` on, in one chunk, into their panel.
template <class Kernel>
static void pack_panel(const Cut<Kernel>& cut, float* left, int64_t chunk, int64_t at,
                       int64_t panels, Operand<typename Kernel::Source> a, int64_t row,
                       int64_t there) {
  int64_t begin = chunk * cut.chunk();
  pack<Kernel, Kernel::ALONG>(left + (chunk * panels + at) * cut.panel(), a, row, there, begin,
                              cut.deep - begin, cut.steps);
}

// All rows from `row` on.
template <class Kernel>
static void pack_left(const Cut<Kernel>& cut, float* left, Operand<typename Kernel::Source> a,
                      int64_t row, int64_t rows, bool shared = true) {
  int64_t panels = cut.panels(rows);
  Share share(cut.chunks * panels, shared);
  for (int64_t i = share.begin; i < share.end; i++) {
    int64_t first = i % panels * LANES;
    pack_panel(cut, left, i / panels, i % panels, panels, a, row + first, rows - first);
  }
}

// COUNT products of rows that are packed and some columns, each into its patch: rows of cut.width
// floats. `right` is where columns are packed.
template <int COUNT, class Kernel>
static void meet_columns(const Cut<Kernel>& cut, const float* left, int64_t rows,
                         const Operand<typename Kernel::Source>* b, int64_t column,
                         int64_t columns, float* right, float** patches) {
  int64_t vectors = parts(columns, LANES), panels = cut.panels(rows), panel = cut.panel();
  for (int which = 0; which < COUNT; which++)
    for (int64_t chunk = 0; chunk < cut.chunks; chunk++) {
      int64_t begin = chunk * cut.chunk();
      if (b[which].row == 1)
        pack_lines<Kernel>(right, b[which], column, columns, begin, cut.deep - begin, cut.steps);
      for (int64_t v = 0; v < vectors && b[which].row != 1; v++)
        pack<Kernel, false>(right + v * panel, b[which], column + v * LANES,
                            columns - v * LANES, begin, cut.deep - begin, cut.steps);
      for (int64_t v = 0; v < vectors; v += Kernel::VECTORS)
        for (int64_t p = 0; p < panels; p += Kernel::TALL)
          Kernel::meet(patches[which] + p * LANES * cut.width + v * LANES, cut.width,
                       left + (chunk * panels + p) * panel, panel, right + v * panel, panel,
                       vectors - v < Kernel::VECTORS ? vectors - v : Kernel::VECTORS, cut.steps,
                       chunk == 0);
    }
}

// COUNT products with one left operand: finish(patch, sums) is given those of each, as rows of
// cut.width floats.
template <class Kernel, int COUNT, class Finish>
static void products(const Cut<Kernel>& cut, Operand<typename Kernel::Source> a,
                     const Operand<typename Kernel::Source>* b, float* scratch, int threads,
                     Finish finish) {
  int64_t next = 0;
  int64_t own = cut.right_size() + COUNT * cut.patch_size();
#pragma omp parallel num_threads(threads)
  {
    Kernel::begin();
    float* right = scratch + cut.left_size() + omp_get_thread_num() * own;
    float* patches[COUNT];
    for (int i = 0; i < COUNT; i++) patches[i] = right + cut.right_size() + i * cut.patch_size();
    for (int64_t row = 0; row < cut.rows; row += cut.height) {
      int64_t rows = cut.rows - row < cut.height ? cut.rows - row : cut.height;
      pack_left(cut, scratch, a, row, rows);
#pragma omp barrier
      for (;;) {
        int64_t column = __atomic_fetch_add(&next, cut.width, __ATOMIC_RELAXED);
        if (column >= cut.columns) break;
        int64_t columns = cut.columns - column < cut.width ? cut.columns - column : cut.width;
        meet_columns<COUNT>(cut, scratch, rows, b, column, columns, right, patches);
        finish(Patch{row, rows, column, columns}, patches);
      }
#pragma omp barrier
#pragma omp single
      next = 0;
    }
    Kernel::end();
  }
}

// out = a b, added to what is there if `add`; O may be wider than the operands.
template <class Kernel, class O>
static void product(Operand<typename Kernel::Source> a, Operand<typename Kernel::Source> b,
                    Rows<O> out, bool add, int64_t rows, int64_t columns, int64_t deep,
                    float* scratch, int threads) {
  Cut<Kernel> cut(rows, columns, deep, threads);
  products<Kernel, 1>(cut, a, &b, scratch, threads, [&](const Patch& patch, float** sums) {
    alignas(64) float there[Cut<Kernel>::WIDEST];
    for (int64_t r = 0; r < patch.rows; r++) {
      float* sum = sums[0] + r * cut.width;
      O* at = out.row(patch.row + r, patch.column);
      if (add) {
        widen(there, at, patch.columns);
        plus(sum, there, patch.columns);
      }
      narrow(at, sum, patch.columns);
    }
  });
}

}  // namespace gatedffn
