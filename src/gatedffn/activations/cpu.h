// The scalar functions of reference.py in float32 vectors: loops over the functions that scalars.h
// has. A caller that asks for a value or a slope pays for no more, as all is inlined.
#pragma once

#include <cfloat>
#include <cstring>
#include <utility>

#include "simd.h"

namespace gatedffn {

// A number for all elements (step 0), or one for each (step 1).
struct Parameter {
  const float* at;
  int64_t step;
};

// Loops over `n` elements in whole vectors: every buffer has room up to the next multiple of
// LANES. An output may be the input itself.
struct Function {
  const char* name;
  int parameters;
  void (*value)(float* out, const float* x, const Parameter* p, int64_t n);
  void (*both)(float* value, float* slope, const float* x, const Parameter* p, int64_t n);
  // The derivatives by the parameters, null where there is none.
  void (*by[2])(float* out, const float* x, const Parameter* p, int64_t n);
};

namespace {

struct Both {
  V value, slope;
};

// What scalars.h uses beside the elementary functions of simd.h.

constexpr float LARGEST = FLT_MAX, SMALLEST = FLT_MIN;

GATEDFFN_INLINE V full(float value, V) { return set(value); }

template <class A>
GATEDFFN_INLINE V divided(A x, V y) {
  return x / y;
}

template <class A, class B>
GATEDFFN_INLINE V where(I mask, A yes, B no) {
  return select(mask, set(yes), set(no));
}

// The function F at the elements from `i` on: how many parameters it takes is in its type.

GATEDFFN_INLINE V loaded(Parameter p, int64_t i) { return p.step ? load(p.at + i) : set(*p.at); }

template <auto F, size_t... K>
GATEDFFN_INLINE auto at(const float* x, const Parameter* p, int64_t i, std::index_sequence<K...>) {
  return F(load(x + i), loaded(p[K], i)...);
}

template <class Result, class... Parameters>
constexpr auto places(Result (*)(V, Parameters...)) {
  return std::make_index_sequence<sizeof...(Parameters)>();
}

// The loops.

template <auto F>
void value_of(float* out, const float* x, const Parameter* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(out + i, at<F>(x, p, i, places(F)).value);
}

template <auto F>
void both_of(float* values, float* slopes, const float* x, const Parameter* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    Both both = at<F>(x, p, i, places(F));
    store(values + i, both.value);
    store(slopes + i, both.slope);
  }
}

template <auto F>
void by_parameter(float* out, const float* x, const Parameter* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(out + i, at<F>(x, p, i, places(F)));
}

}  // namespace

}  // namespace gatedffn

#include "scalars.h"

namespace gatedffn {

static inline const Function* find_function(const char* name) {
  for (const Function& function : FUNCTIONS)
    if (std::strcmp(function.name, name) == 0) return &function;
  return nullptr;
}

}  // namespace gatedffn
