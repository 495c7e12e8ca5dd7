// The scalar functions of reference.py in float32 vectors: each one once, as a value and a slope
// that share their work. A caller that asks for one of them pays for no more, as all is inlined.
#pragma once

#include <cfloat>
#include <cstring>

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

// `x` with the infinities moved to the largest numbers, so that 0 * x is 0
GATEDFFN_INLINE V finite(V x) { return clamp(-FLT_MAX, FLT_MAX, x); }

// `x * factor`, where a factor that has vanished wins over an infinite `x`
GATEDFFN_INLINE V damped(V x, V factor) { return select(factor == 0.0f, V{}, x * factor); }

GATEDFFN_INLINE V relu(V x) { return max(0.0f, x); }

GATEDFFN_INLINE V step(V x) { return select(x > 0.0f, set(1.0f), select(x <= 0.0f, V{}, x)); }

// How many parameters a function takes.
template <int N>
struct Takes {
  static constexpr int parameters = N;
};

struct Identity : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    value = x;
    slope = set(1.0f);
  }
};

struct Relu : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    value = relu(x);
    slope = step(x);
  }
};

struct Relu2 : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    value = relu(x) * relu(x);
    slope = 2.0f * relu(x);
  }
};

struct LeakyRelu : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    value = select(x > 0.0f, x, min(0.0f, x) * p[0]);
    slope = step(x) + (1.0f - step(x)) * p[0];
  }
  GATEDFFN_INLINE V by(int, V x, const V*) { return min(0.0f, x); }
};

struct SigmoidGate : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    Sigmoid s = sigmoids(x);
    value = s.at;
    slope = s.slope;
  }
};

struct TanhGate : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    Tanh t = tanh_and_slope(x);
    value = t.at;
    slope = t.slope;
  }
};

struct Softplus : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    V e = exp_below(-abs(x));
    value = softplus(x);
    slope = select(x < 0.0f, e, set(1.0f)) * reciprocal_after_one(e);
  }
};

GATEDFFN_INLINE void swish(V x, Sigmoid s, V& value, V& slope) {
  value = damped(x, s.at);
  slope = s.at + s.x * s.slope;
}

struct Swish : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    swish(x, sigmoids(finite(x) * p[0]), value, slope);
  }
  GATEDFFN_INLINE V by(int, V x, const V* p) {
    x = finite(x);
    return x * (x * sigmoids(x * p[0]).slope);
  }
};

struct CappedSwish : Takes<2> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    Swish::at(min(p[1], x), p, value, slope);
    slope = select(x > p[1], V{}, slope);
  }
  GATEDFFN_INLINE V by(int k, V x, const V* p) { return Swish::by(k, min(p[1], x), p); }
};

GATEDFFN_INLINE void gelu(V x, V& value, V& slope) {
  Normal at = normal(x);
  value = damped(x, at.cdf);
  slope = at.cdf + finite(x) * at.pdf;
}

struct Gelu : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) { gelu(x, value, slope); }
};

struct GeluTanh : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    const float scale = 1.59576912f, cubic = 0.0713548163f;  // 0.044715 times the scale
    V near = clamp(-10.03f, 10.03f, x);  // the sigmoid is 0 or 1 there
    V square = near * near;
    Sigmoid s = sigmoids(near * (scale + cubic * square));
    value = damped(x, s.at);
    slope = s.at + near * s.slope * (scale + 3.0f * cubic * square);
  }
};

GATEDFFN_INLINE void elu(V x, V alpha, V& value, V& slope) {
  V below = min(0.0f, x);
  value = select(x > 0.0f, x, alpha * expm1(below));
  slope = select(x > 0.0f, set(1.0f), alpha * exp_below(below));
}

struct Elu : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) { elu(x, p[0], value, slope); }
};

struct Selu : Takes<0> {
  GATEDFFN_INLINE void at(V x, const V*, V& value, V& slope) {
    const float scale = 1.05070099f, alpha = 1.67326324f;
    elu(x, set(alpha), value, slope);
    value *= scale;
    slope *= scale;
  }
};

struct Xielu : Takes<2> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    V below = min(0.0f, x), curve = p[1] * expm1(below);
    // Written so that at minus infinity no infinity is subtracted from another.
    value = select(x > 0.0f, x * (p[0] * x + 0.5f), curve - (p[1] - 0.5f) * below);
    slope = select(x > 0.0f, 2.0f * p[0] * x, curve) + 0.5f;
  }
  GATEDFFN_INLINE V by(int k, V x, const V*) {
    if (k == 0) return relu(x) * relu(x);
    V below = min(0.0f, x);
    // Near 0 the difference would cancel.
    return select(below > -0.34f, below * below * exp_rest(below), expm1(below) - below);
  }
};

struct SoftCap : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    Tanh t = tanh_and_slope(x / p[0]);
    value = p[0] * t.at;
    slope = t.slope;
  }
};

struct Situ : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    V cap, d_cap;
    SoftCap::at(x, p, cap, d_cap);
    Sigmoid s = sigmoids(x);
    value = cap * s.at;
    slope = s.at * (d_cap + cap * s.opposite);
  }
};

struct PowGate : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    // x^exponent sigmoid(x) above 0, with exponent = m / (sqrt(x) + 1)
    V g = select(x > 0.0f, clamp(FLT_MIN, FLT_MAX, x), set(1.0f));
    V root = sqrt(g), exponent = p[0] / (root + 1.0f);
    V d_exponent = -exponent / (2.0f * root * (root + 1.0f));
    V power = pow(g, exponent);
    Sigmoid s = sigmoids(x);
    V by_exponent = power * (d_exponent * log(g) + s.opposite);
    V by_base = exponent * pow(g, exponent - 1.0f);
    swish(min(0.0f, x), s, value, slope);
    value = select(x > 0.0f, power * s.at, value);
    slope = select(x > 0.0f, s.at * (by_exponent + by_base), slope);
  }
};

struct ExpandedSwish : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    V more = 1.0f + 2.0f * p[0];
    Sigmoid s = sigmoids(x);
    swish(x, s, value, slope);
    value = damped(x, s.at * more - p[0]);
    slope = slope * more - p[0];
  }
  GATEDFFN_INLINE V by(int, V x, const V*) { return x * tanh(0.5f * x); }
};

struct ExpandedGelu : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    V more = 1.0f + 2.0f * p[0];
    gelu(x, value, slope);
    value = damped(x, normal(x).cdf * more - p[0]);
    slope = slope * more - p[0];
  }
  GATEDFFN_INLINE V by(int, V x, const V*) { return x * normal_erf(x); }
};

struct Clip : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    value = max(-p[0], min(p[0], x));
    slope = select(abs(x) > p[0], V{}, select(is_nan(x), x, set(1.0f)));
  }
};

struct ClipPlusOne : Takes<1> {
  GATEDFFN_INLINE void at(V x, const V* p, V& value, V& slope) {
    Clip::at(x, p, value, slope);
    value += 1.0f;
  }
};

// The loops.

template <class F>
GATEDFFN_INLINE void load_parameters(V* values, const Parameter* p, int64_t i) {
  for (int k = 0; k < F::parameters; k++)
    values[k] = p[k].step ? load(p[k].at + i) : set(*p[k].at);
}

template <class F>
void value_of(float* out, const float* x, const Parameter* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    V parameters[2], value, slope;
    load_parameters<F>(parameters, p, i);
    F::at(load(x + i), parameters, value, slope);
    store(out + i, value);
  }
}

template <class F>
void both_of(float* values, float* slopes, const float* x, const Parameter* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    V parameters[2], value, slope;
    load_parameters<F>(parameters, p, i);
    F::at(load(x + i), parameters, value, slope);
    store(values + i, value);
    store(slopes + i, slope);
  }
}

template <class F, int K>
void by_parameter(float* out, const float* x, const Parameter* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    V parameters[2];
    load_parameters<F>(parameters, p, i);
    store(out + i, F::by(K, load(x + i), parameters));
  }
}

template <class F, int... K>
constexpr Function function(const char* name) {
  return {name, F::parameters, value_of<F>, both_of<F>, {by_parameter<F, K>...}};
}

}  // namespace

// With each: the parameters by which it can be differentiated.
static const Function FUNCTIONS[] = {
    function<Identity>("identity"),
    function<Relu>("relu"),
    function<Relu2>("relu2"),
    function<LeakyRelu, 0>("leaky_relu"),
    function<SigmoidGate>("sigmoid"),
    function<TanhGate>("tanh"),
    function<Softplus>("softplus"),
    function<Swish, 0>("swish"),
    function<CappedSwish, 0>("capped_swish"),
    function<Gelu>("gelu"),
    function<GeluTanh>("gelu_tanh"),
    function<Elu>("elu"),
    function<Selu>("selu"),
    function<Xielu, 0, 1>("xielu"),
    function<Situ>("situ"),
    function<PowGate>("pow_gate"),
    function<ExpandedSwish, 0>("expanded_swish"),
    function<ExpandedGelu, 0>("expanded_gelu"),
    function<Clip>("clip"),
    function<ClipPlusOne>("clip_plus_one"),
    function<SoftCap>("soft_cap"),
};

static inline const Function* find_function(const char* name) {
  for (const Function& function : FUNCTIONS)
    if (std::strcmp(function.name, name) == 0) return &function;
  return nullptr;
}

}  // namespace gatedffn
