// The CPU kernels as C functions: dtypes arrive as numbers, and the templates begin here.
#include "feed_forward/cpu/blocks.h"
#include "feed_forward/cpu/few.h"
#include "feed_forward/cpu/products.h"
#include "feed_forward/cpu/tiles.h"
#include "gating/cpu.h"

using namespace gatedffn;

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

template <class Body>
static void with_dtype(int dtype, Body body) {
  if (dtype == FLOAT32) body(float());
  if (dtype == BFLOAT16) body(bf16());
  if (dtype == FLOAT16) body(f16());
}

// Matrices and projections arrive as their parts, since C's rules for whole structures differ.
#define ROWS(name) void *name, int64_t name##_stride
#define WEIGHT(name) const void *name, int64_t name##_stride, const void* name##_bias
#define AS_ROWS(name) {(T*)name, name##_stride}
#define AS_WEIGHT(name) {(const T*)name, name##_stride, (const T*)name##_bias}

EXPORT int gatedffn_function(const char* name) {
  const Function* found = find_function(name);
  return found ? int(found - FUNCTIONS) : -1;
}

EXPORT void gatedffn_gating(int dtype, const Row* row, ROWS(activated), ROWS(linear),
                            ROWS(hidden), int64_t rows, int64_t columns, int threads) {
  with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    gating<T>(Gate(*row), AS_ROWS(activated), AS_ROWS(linear), AS_ROWS(hidden), rows, columns,
              threads);
  });
}

EXPORT void gatedffn_gating_backward(int dtype, const Row* row, ROWS(grad), ROWS(activated),
                                     ROWS(linear), ROWS(d_activated), ROWS(d_linear), ROWS(hidden),
                                     double* first, double* second, int64_t rows, int64_t columns,
                                     int threads) {
  with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    gating_backward<T>(Gate(*row), AS_ROWS(grad), AS_ROWS(activated), AS_ROWS(linear),
                       {AS_ROWS(d_activated), AS_ROWS(d_linear), AS_ROWS(hidden), {first, second}},
                       rows, columns, threads);
  });
}

EXPORT int64_t gatedffn_few_scratch(int dtype, int64_t tokens, int64_t d_model, int64_t d_hidden) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto type) {
    bytes = few_bytes<decltype(type)>(tokens, d_model, d_hidden);
  });
  return bytes;
}

EXPORT void gatedffn_few(int dtype, const Row* row, ROWS(x), WEIGHT(activated), WEIGHT(linear),
                         WEIGHT(down), ROWS(y), int64_t tokens, int64_t d_model, int64_t d_hidden,
                         int64_t d_out, char* scratch, int threads) {
  with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    few<T>(Gate(*row), AS_ROWS(x), AS_WEIGHT(activated), AS_WEIGHT(linear), AS_WEIGHT(down),
           AS_ROWS(y), tokens, d_model, d_hidden, d_out, scratch, threads);
  });
}

// How a dtype's blocks are multiplied.
template <class T>
struct Blocks {
  typedef Registers<typename CellsOf<T>::Type> Kernel;
};
#ifdef __AMX_BF16__
template <>
struct Blocks<bf16> {
  typedef Amx Kernel;
};
#endif

EXPORT int64_t gatedffn_product_scratch(int dtype, int count, int64_t rows, int64_t columns,
                                        int64_t deep, int threads) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto type) {
    typedef typename Blocks<decltype(type)>::Kernel Kernel;
    bytes = Plan<Kernel>(rows, columns, deep, threads).scratch_bytes(count, threads);
  });
  return bytes;
}

// An operand: where it is, and the strides of what stays and of what is summed over.
#define OPERAND(name) const void *name, int64_t name##_row, int64_t name##_deep
#define AS_OPERAND(name) {(const T*)name, name##_row, name##_deep}

EXPORT void gatedffn_product(int dtype, OPERAND(a), OPERAND(b), ROWS(out), int wide,
                             int add, int64_t rows, int64_t columns, int64_t deep,
                             float* scratch, int threads) {
  with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef typename Blocks<T>::Kernel Kernel;
    if (wide)
      product<Kernel, float>(AS_OPERAND(a), AS_OPERAND(b), {(float*)out, out_stride},
                             add, rows, columns, deep, scratch, threads);
    else
      product<Kernel, T>(AS_OPERAND(a), AS_OPERAND(b), AS_ROWS(out), add, rows,
                         columns, deep, scratch, threads);
  });
}

EXPORT int64_t gatedffn_blocks_scratch(int dtype, int64_t tokens, int64_t d_model,
                                       int64_t d_hidden, int64_t d_out, int threads) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto type) {
    typedef typename Blocks<decltype(type)>::Kernel Kernel;
    bytes = blocks_bytes<Kernel>(tokens, d_model, d_hidden, d_out, threads);
  });
  return bytes;
}

EXPORT void gatedffn_blocks(int dtype, const Row* row, ROWS(x), WEIGHT(activated), WEIGHT(linear),
                            WEIGHT(down), ROWS(y), ROWS(hidden), ROWS(save_activated),
                            ROWS(save_linear), int64_t tokens, int64_t d_model, int64_t d_hidden,
                            int64_t d_out, float* scratch, int threads) {
  with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    blocks<typename Blocks<T>::Kernel, T>(
        Gate(*row), AS_ROWS(x), AS_WEIGHT(activated), AS_WEIGHT(linear), AS_WEIGHT(down),
        AS_ROWS(y), AS_ROWS(hidden), AS_ROWS(save_activated), AS_ROWS(save_linear), tokens, d_model,
        d_hidden, d_out, scratch, threads);
  });
}

EXPORT void gatedffn_blocks_backward(
    int dtype, const Row* row, ROWS(x), WEIGHT(activated), WEIGHT(linear), WEIGHT(down), ROWS(grad),
    ROWS(saved_activated), ROWS(saved_linear), ROWS(d_activated), ROWS(d_linear), ROWS(hidden),
    ROWS(sum_x), ROWS(sum_activated), ROWS(sum_linear), ROWS(sum_down), double* first,
    double* second, int add_x, int wide, int add, int64_t tokens, int64_t d_model, int64_t d_hidden,
    int64_t d_out, float* scratch, int threads) {
  with_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    auto run = [&](auto sum) {
      typedef decltype(sum) O;
      blocks_backward<typename Blocks<T>::Kernel, T, O>(
          Gate(*row), AS_ROWS(x), AS_WEIGHT(activated), AS_WEIGHT(linear), AS_WEIGHT(down),
          AS_ROWS(grad), AS_ROWS(saved_activated), AS_ROWS(saved_linear),
          {AS_ROWS(d_activated), AS_ROWS(d_linear), AS_ROWS(hidden), {first, second}},
          {AS_ROWS(sum_x),
           add_x != 0,
           {(O*)sum_activated, sum_activated_stride},
           {(O*)sum_linear, sum_linear_stride},
           {(O*)sum_down, sum_down_stride},
           add != 0},
          tokens, d_model, d_hidden, d_out, scratch, threads);
    };
    if (wide) run(float());
    else run(T());
  });
}

#ifdef __AMX_BF16__
// Calls body with the layer for so many tokens: one tile of them across, or two.
template <class Body>
static void with_tiles(int64_t tokens, Body body) {
  if (tokens > 16) body(Tiles<32>());
  else body(Tiles<16>());
}

EXPORT int64_t gatedffn_tiles_scratch(int64_t tokens, int64_t d_model, int64_t d_hidden,
                                      int64_t tile, int threads) {
  int64_t bytes = 0;
  with_tiles(tokens, [&](auto layer) {
    bytes = layer.sized(d_model, d_hidden, 0, tile, threads).scratch_bytes();
  });
  return bytes;
}

// Gate and up are written too where `save_*` have a place.
EXPORT void gatedffn_tiles(const Row* row, ROWS(x), WEIGHT(activated), WEIGHT(linear), WEIGHT(down),
                           ROWS(y), ROWS(save_activated), ROWS(save_linear), int64_t tokens,
                           int64_t d_model, int64_t d_hidden, int64_t d_out, int64_t tile,
                           char* scratch, int threads) {
  typedef bf16 T;
  with_tiles(tokens, [&](auto layer) {
    layer.sized(d_model, d_hidden, d_out, tile, threads);
    layer.run(Gate(*row), AS_ROWS(x), AS_WEIGHT(activated), AS_WEIGHT(linear), AS_WEIGHT(down),
              AS_ROWS(y), AS_ROWS(save_activated), AS_ROWS(save_linear), tokens, scratch);
  });
}
#endif
