// The CPU kernels as C functions: dtypes arrive as numbers, and the templates begin here.
#include "experts/cpu/backward.h"
#include "experts/cpu/forward.h"
#include "feed_forward/cpu/blocks.h"
#include "feed_forward/cpu/few.h"
#include "feed_forward/cpu/few_backward.h"
#include "feed_forward/cpu/products.h"
#include "feed_forward/cpu/tiles.h"
#include "gating/cpu.h"

using namespace gatedffn;

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

template <class Body>
static void with_dtype(int64_t dtype, Body body) {
  if (dtype == FLOAT32) body(float());
  if (dtype == BFLOAT16) body(bf16());
  if (dtype == FLOAT16) body(f16());
}

// What a kernel takes, as kernels.py writes it: addresses, null where one is not given or not
// wanted, then facts. A stride is that of rows, in elements.
struct GatingArguments {
  const Formula* row;
  void *gate, *up, *hidden;
  int64_t gate_stride, up_stride, hidden_stride, rows, columns, dtype, threads;
};

struct GatingBackwardArguments {
  const Formula* row;
  void *grad, *gate, *up, *d_gate, *d_up, *hidden, *sums0, *sums1;
  int64_t grad_stride, gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_stride;
  int64_t rows, columns, dtype, threads;
};

struct LayerArguments {
  const Formula* row;
  void *x, *gate, *up, *down, *gate_bias, *up_bias, *down_bias, *y, *saved_gate, *saved_up;
  void* scratch;
  int64_t x_stride, gate_stride, up_stride, down_stride, y_stride, saved_gate_stride;
  int64_t saved_up_stride, tokens, d_model, d_hidden, d_out, dtype, threads;
};

struct TiledArguments : LayerArguments {
  int64_t tile;  // tokens that are worked on at a time; tiles.h also has the processor's tiles
};

struct BackwardArguments {
  const Formula* row;
  void *x, *gate, *up, *down, *gate_bias, *up_bias, *grad, *saved_gate, *saved_up;
  void *sum_x, *sum_gate, *sum_up, *sum_down, *sum_gate_bias, *sum_up_bias, *sum_down_bias;
  double *sums0, *sums1;  // for each hidden unit, of phi's parameters
  void* scratch;
  int64_t x_stride, gate_stride, up_stride, down_stride, grad_stride, saved_gate_stride;
  int64_t saved_up_stride, sum_x_stride, sum_gate_stride, sum_up_stride, sum_down_stride;
  int64_t wide;  // whether the sums of weights and biases are of float32
  int64_t tokens, d_model, d_hidden, d_out, dtype, threads;
  int64_t tile, units, places;  // tokens and hidden units at a time, and matrices of them in scratch
};

// Of an operand: the strides of what stays and of what is summed over.
struct ProductArguments {
  void *a, *b, *out, *scratch;
  int64_t a_row, a_deep, b_row, b_deep, out_stride, wide, add, rows, columns, deep, dtype, threads;
};

// Weights have strides of experts, rows and columns. `index` is int64, `weights` float32.
struct ExpertsArguments {
  const Formula* row;
  void *x, *gate, *up, *down, *gate_bias, *up_bias, *down_bias, *index, *weights, *y;
  void *saved_gate, *saved_up, *scratch;
  int64_t x_stride, gate_expert, gate_row, gate_deep, up_expert, up_row, up_deep, down_expert;
  int64_t down_row, down_deep, gate_bias_expert, gate_bias_step, up_bias_expert, up_bias_step;
  int64_t down_bias_expert, weigh_input, tokens, slots, experts;
  int64_t d_model, d_hidden, d_out, dtype, threads;
};

struct ExpertsBackwardArguments {
  const Formula* row;
  void *x, *gate, *up, *down, *gate_bias, *up_bias, *down_bias, *index, *weights, *grad;
  void *saved_gate, *saved_up, *sum_x, *sum_gate, *sum_up, *sum_down;
  void *sum_gate_bias, *sum_up_bias, *sum_down_bias, *sum_weights;
  double *sums0, *sums1;  // for each expert and hidden unit, of phi's parameters
  void* scratch;
  int64_t x_stride, gate_expert, gate_row, gate_deep, up_expert, up_row, up_deep, down_expert;
  int64_t down_row, down_deep, gate_bias_expert, gate_bias_step, up_bias_expert, up_bias_step;
  int64_t down_bias_expert, weigh_input, tokens, slots, experts;
  int64_t d_model, d_hidden, d_out, dtype, threads;
  int64_t grad_stride, saved_gate_stride, saved_up_stride, sum_x_stride;
  int64_t sum_gate_expert, sum_gate_row, sum_up_expert, sum_up_row, sum_down_expert, sum_down_row;
  int64_t few;    // the most tokens of an expert that few_backward.h takes
  int64_t saved;  // whether gate and up are kept
};

// The size of a kernel's arguments; -1 where there is no such kernel.
EXPORT int64_t gatedffn_size(const char* kernel) {
  static const struct {
    const char* name;
    int64_t size;
  } SIZES[] = {
      {"gating", sizeof(GatingArguments)},
      {"gating_backward", sizeof(GatingBackwardArguments)},
      {"few", sizeof(LayerArguments)},
      {"blocks", sizeof(TiledArguments)},
#ifdef GATEDFFN_TILES
      {"tiles", sizeof(TiledArguments)},
#endif
      {"few_backward", sizeof(BackwardArguments)},
      {"blocks_backward", sizeof(BackwardArguments)},
      {"experts_backward", sizeof(ExpertsBackwardArguments)},
      {"product", sizeof(ProductArguments)},
      {"experts", sizeof(ExpertsArguments)},
      {"formula", sizeof(Formula)},
  };
  for (const auto& of : SIZES)
    if (!std::strcmp(of.name, kernel)) return of.size;
  return -1;
}

EXPORT int gatedffn_function(const char* name) {
  const Function* found = find_function(name);
  return found ? int(found - FUNCTIONS) : -1;
}

#define ROWS(name) {(T*)call->name, call->name##_stride}
#define WEIGHT(name) {(const T*)call->name, call->name##_stride, (const T*)call->name##_bias}

EXPORT void gatedffn_gating(const GatingArguments* call) {
  with_dtype(call->dtype, [&](auto type) {
    typedef decltype(type) T;
    gating<T>(*call->row, ROWS(gate), ROWS(up), ROWS(hidden), call->rows, call->columns,
              call->threads);
  });
}

EXPORT void gatedffn_gating_backward(const GatingBackwardArguments* call) {
  with_dtype(call->dtype, [&](auto type) {
    typedef decltype(type) T;
    gating_backward<T>(*call->row, ROWS(grad), ROWS(gate), ROWS(up),
                       {ROWS(d_gate),
                        ROWS(d_up),
                        ROWS(hidden),
                        {(double*)call->sums0, (double*)call->sums1}},
                       call->rows, call->columns, call->threads);
  });
}

EXPORT int64_t gatedffn_few_scratch(const LayerArguments* call) {
  int64_t bytes = 0;
  with_dtype(call->dtype, [&](auto type) {
    bytes = few_bytes<decltype(type)>(call->tokens, call->d_model, call->d_hidden);
  });
  return bytes;
}

EXPORT void gatedffn_few(const LayerArguments* call) {
  with_dtype(call->dtype, [&](auto type) {
    typedef decltype(type) T;
    few<T>(*call->row, ROWS(x), WEIGHT(gate), WEIGHT(up), WEIGHT(down), ROWS(y), ROWS(saved_gate),
           ROWS(saved_up), call->tokens, call->d_model, call->d_hidden, call->d_out,
           (char*)call->scratch, call->threads);
  });
}

// How a dtype's blocks are multiplied.
template <class T>
struct Blocks {
  typedef Registers<typename CellsOf<T>::Type> Kernel;
};
#ifdef GATEDFFN_TILES
template <>
struct Blocks<bf16> {
  typedef Amx Kernel;
};
#endif

EXPORT int64_t gatedffn_product_scratch(const ProductArguments* call) {
  int64_t bytes = 0;
  with_dtype(call->dtype, [&](auto type) {
    typedef typename Blocks<decltype(type)>::Kernel Kernel;
    bytes = packed_bytes<Kernel>(1, call->rows, call->columns, call->deep, call->threads);
  });
  return bytes;
}

EXPORT void gatedffn_product(const ProductArguments* call) {
  with_dtype(call->dtype, [&](auto type) {
    typedef decltype(type) T;
    auto run = [&](auto sum) {
      typedef decltype(sum) O;
      product<typename Blocks<T>::Kernel, O>(
          {(const T*)call->a, call->a_row, call->a_deep},
          {(const T*)call->b, call->b_row, call->b_deep}, {(O*)call->out, call->out_stride},
          call->add, call->rows, call->columns, call->deep, (float*)call->scratch, call->threads);
    };
    if (call->wide) run(float());
    else run(T());
  });
}

// Calls body with the layer that takes these arguments.
template <class Body>
static void with_blocks(const TiledArguments* call, Body body) {
  with_dtype(call->dtype, [&](auto type) {
    body(LayerOfBlocks<typename Blocks<decltype(type)>::Kernel, decltype(type)>(
             call->tokens, call->d_model, call->d_hidden, call->d_out, call->tile, call->threads),
         type);
  });
}

EXPORT int64_t gatedffn_blocks_scratch(const TiledArguments* call) {
  int64_t bytes = 0;
  with_blocks(call, [&](auto layer, auto) { bytes = layer.scratch_bytes(); });
  return bytes;
}

EXPORT void gatedffn_blocks(const TiledArguments* call) {
  with_blocks(call, [&](auto layer, auto type) {
    typedef decltype(type) T;
    layer.run(*call->row, ROWS(x), WEIGHT(gate), WEIGHT(up), WEIGHT(down), ROWS(y),
              ROWS(saved_gate), ROWS(saved_up), (char*)call->scratch);
  });
}

#define STACK(name, bias_step)                                                     \
  {(const T*)call->name, call->name##_expert, call->name##_row, call->name##_deep, \
   (const T*)call->name##_bias, call->name##_bias_expert, bias_step}

// Calls body with the experts that take these arguments.
template <class Body>
static void with_experts(const ExpertsArguments* call, Body body) {
  with_dtype(call->dtype, [&](auto type) {
    typedef decltype(type) T;
    body(Experts<typename Blocks<T>::Kernel>{
        {STACK(gate, call->gate_bias_step), STACK(up, call->up_bias_step), STACK(down, 1),
         call->tokens, call->slots, call->experts, call->d_model, call->d_hidden, call->d_out,
         int(call->threads)},
        call->row, ROWS(x), (const int64_t*)call->index, (const float*)call->weights,
        {(T*)call->y, call->d_out}, {(T*)call->saved_gate, call->d_hidden},
        {(T*)call->saved_up, call->d_hidden}, call->weigh_input != 0});
  });
}

EXPORT int64_t gatedffn_experts_scratch(const ExpertsArguments* call) {
  int64_t bytes = 0;
  with_experts(call, [&](const auto& experts) { bytes = experts.scratch_bytes(); });
  return bytes;
}

EXPORT void gatedffn_experts(const ExpertsArguments* call) {
  with_experts(call, [&](const auto& experts) { experts.run((char*)call->scratch); });
}

// Calls body with the gradients that take these arguments.
template <class Body>
static void with_backward(const BackwardArguments* call, Body body) {
  with_dtype(call->dtype, [&](auto type) {
    body(BackwardOfBlocks<typename Blocks<decltype(type)>::Kernel>{
             call->tokens, call->d_model, call->d_hidden, call->d_out, call->tile, call->units,
             call->places, int(call->threads)},
         type);
  });
}

// Runs them; those of weights and biases are of the type O.
template <class O, class Layer, class T>
static void run_backward(const BackwardArguments* call, const Layer& layer, T) {
  Gradients<T, O> wanted = {ROWS(sum_x),
                            {(O*)call->sum_gate, call->sum_gate_stride},
                            {(O*)call->sum_up, call->sum_up_stride},
                            {(O*)call->sum_down, call->sum_down_stride},
                            (O*)call->sum_gate_bias,
                            (O*)call->sum_up_bias,
                            (O*)call->sum_down_bias,
                            {call->sums0, call->sums1}};
  layer.run(*call->row, ROWS(x), WEIGHT(gate), WEIGHT(up), ROWS(down), ROWS(grad),
            ROWS(saved_gate), ROWS(saved_up), wanted, (char*)call->scratch);
}

EXPORT int64_t gatedffn_blocks_backward_scratch(const BackwardArguments* call) {
  int64_t bytes = 0;
  with_backward(call, [&](auto layer, auto) { bytes = layer.scratch_bytes(); });
  return bytes;
}

EXPORT void gatedffn_blocks_backward(const BackwardArguments* call) {
  with_backward(call, [&](auto layer, auto type) {
    if (call->wide) run_backward<float>(call, layer, type);
    else run_backward<decltype(type)>(call, layer, type);
  });
}

// The same for few tokens, whose gradients are never wide.
template <class Body>
static void with_few_backward(const BackwardArguments* call, Body body) {
  with_dtype(call->dtype, [&](auto type) {
    body(BackwardOfFew<decltype(type)>{call->tokens, call->d_model, call->d_hidden, call->d_out,
                                       int(call->threads)},
         type);
  });
}

EXPORT int64_t gatedffn_few_backward_scratch(const BackwardArguments* call) {
  int64_t bytes = 0;
  with_few_backward(call, [&](auto layer, auto) { bytes = layer.scratch_bytes(); });
  return bytes;
}

EXPORT void gatedffn_few_backward(const BackwardArguments* call) {
  with_few_backward(call, [&](auto layer, auto type) {
    run_backward<decltype(type)>(call, layer, type);
  });
}

// Calls body with the experts' gradients that take these arguments.
template <class Body>
static void with_experts_backward(const ExpertsBackwardArguments* call, Body body) {
  with_dtype(call->dtype, [&](auto type) {
    body(BackwardOfExperts<typename Blocks<decltype(type)>::Kernel>{
             call->tokens, call->slots, call->experts, call->d_model, call->d_hidden, call->d_out,
             call->few, call->saved != 0, call->weigh_input != 0, int(call->threads)},
         type);
  });
}

EXPORT int64_t gatedffn_experts_backward_scratch(const ExpertsBackwardArguments* call) {
  int64_t bytes = 0;
  with_experts_backward(call, [&](const auto& experts, auto) { bytes = experts.scratch_bytes(); });
  return bytes;
}

#define STACK_GRADIENTS(name, rows)                             \
  {(T*)call->name, call->name##_expert, call->name##_row, (T*)call->name##_bias, call->rows}

EXPORT void gatedffn_experts_backward(const ExpertsBackwardArguments* call) {
  with_experts_backward(call, [&](const auto& experts, auto type) {
    typedef decltype(type) T;
    experts.run(*call->row,
                {ROWS(x), STACK(gate, call->gate_bias_step), STACK(up, call->up_bias_step),
                 STACK(down, 1), ROWS(grad), ROWS(saved_gate), ROWS(saved_up),
                 (const int64_t*)call->index, (const float*)call->weights},
                {ROWS(sum_x), STACK_GRADIENTS(sum_gate, d_hidden),
                 STACK_GRADIENTS(sum_up, d_hidden), STACK_GRADIENTS(sum_down, d_out),
                 {call->sums0, call->sums1}, (float*)call->sum_weights},
                (char*)call->scratch);
  });
}

#ifdef GATEDFFN_TILES
// Calls body with the layer for so many tokens: one tile of them across, or two.
template <class Body>
static void with_tiles(const TiledArguments* call, Body body) {
  auto sized = [&](auto layer) {
    body(layer.sized(call->d_model, call->d_hidden, call->d_out, call->tokens, call->tile,
                     call->threads));
  };
  if (call->tokens > 16) sized(Tiles<32>());
  else sized(Tiles<16>());
}

EXPORT int64_t gatedffn_tiles_scratch(const TiledArguments* call) {
  int64_t bytes = 0;
  with_tiles(call, [&](const auto& layer) { bytes = layer.scratch_bytes(); });
  return bytes;
}

EXPORT void gatedffn_tiles(const TiledArguments* call) {
  typedef bf16 T;
  with_tiles(call, [&](const auto& layer) {
    layer.run(*call->row, ROWS(x), WEIGHT(gate), WEIGHT(up), WEIGHT(down), ROWS(y),
              ROWS(saved_gate), ROWS(saved_up), call->tokens, (char*)call->scratch);
  });
}
#endif
