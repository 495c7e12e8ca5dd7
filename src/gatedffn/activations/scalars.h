// Generated from gpu.py, which has the comments, by python -m gatedffn.docs.
#pragma once

namespace gatedffn {

namespace {

constexpr float SELU_ALPHA = 1.6732632423543772f;
constexpr float SELU_SCALE = 1.0507009873554805f;
constexpr float TANH_GELU_SCALE = 1.5957691216057308f;
constexpr float TANH_GELU_CUBIC = 0.044715f;
constexpr float TANH_GELU_END = 30.0f;
constexpr float XIELU_SLOPE = 0.5f;
constexpr float HARD_SWISH_END = 3.0f;

GATEDFFN_INLINE Both identity(V x) {
  return {x, full(1.0f, x)};
}

GATEDFFN_INLINE V step(V x) {
  return where(x > 0.0f, 1.0f, where(x <= 0.0f, 0.0f, x));
}

GATEDFFN_INLINE Both relu(V x) {
  return {max(0.0f, x), step(x)};
}

GATEDFFN_INLINE Both relu2(V x) {
  V above = max(0.0f, x);
  return {above * above, 2.0f * above};
}

GATEDFFN_INLINE Both leaky_relu(V x, V slope) {
  V above = step(x);
  return {where(x > 0.0f, x, min(0.0f, x) * slope), above + (1.0f - above) * slope};
}

GATEDFFN_INLINE V leaky_relu_by_slope(V x, V slope) {
  return min(0.0f, x);
}

GATEDFFN_INLINE Both sigmoid(V x) {
  auto [_0, at, slope, _3] = sigmoids(x);
  return {at, slope};
}

GATEDFFN_INLINE Both tanh(V x) {
  auto [at, slope] = tanh_and_slope(x);
  return {at, slope};
}

GATEDFFN_INLINE Both softplus(V x) {
  V e = exp_below(-abs(x));
  V slope = where(x < 0.0f, e, 1.0f) * reciprocal_after_one(e);
  return {max(0.0f, x) + log1p(e), slope};
}

GATEDFFN_INLINE V damped(V x, V factor) {
  return where(factor == 0.0f, 0.0f, x * factor);
}

GATEDFFN_INLINE V finite(V x) {
  return clamp(-LARGEST, LARGEST, x);
}

GATEDFFN_INLINE Both swish(V x, V beta) {
  auto [z, at, bend, _3] = sigmoids(finite(x) * beta);
  return {damped(x, at), at + z * bend};
}

GATEDFFN_INLINE V swish_by_beta(V x, V beta) {
  V within = finite(x);
  auto [_0, _1, bend, _3] = sigmoids(within * beta);
  return within * (within * bend);
}

GATEDFFN_INLINE Both capped_swish(V x, V beta, V limit) {
  auto [value, slope] = swish(min(limit, x), beta);
  return {value, where(x > limit, 0.0f, slope)};
}

GATEDFFN_INLINE V capped_swish_by_beta(V x, V beta, V limit) {
  return swish_by_beta(min(limit, x), beta);
}

GATEDFFN_INLINE Both mish(V x) {
  V e = exp_below(-abs(x));
  V top = where(x < 0.0f, e * (e + 2.0f), 1.0f + 2.0f * e);
  V rest = where(x < 0.0f, 2.0f, 2.0f * e * e);
  V at = divided(top, top + rest);
  V tail = divided(rest, top + rest);
  V rise = where(x < 0.0f, e, 1.0f) * reciprocal_after_one(e);
  return {damped(x, at), at + finite(x) * rise * tail * (1.0f + at)};
}

GATEDFFN_INLINE Both hard_swish(V x) {
  V at = clamp(0.0f, 2.0f * HARD_SWISH_END, x + HARD_SWISH_END) / (2.0f * HARD_SWISH_END);
  V between = (2.0f * x + HARD_SWISH_END) / (2.0f * HARD_SWISH_END);
  V below = where(x <= -HARD_SWISH_END, 0.0f, between);
  return {damped(x, at), where(x >= HARD_SWISH_END, 1.0f, below)};
}

GATEDFFN_INLINE Both gelu(V x) {
  auto [cdf, pdf] = normal(x);
  return {damped(x, cdf), cdf + finite(x) * pdf};
}

GATEDFFN_INLINE Both gelu_tanh(V x) {
  V near = clamp(-TANH_GELU_END, TANH_GELU_END, x);
  V square = near * near;
  V z = near * (square * (TANH_GELU_SCALE * TANH_GELU_CUBIC) + TANH_GELU_SCALE);
  V by_x = square * (3.0f * (TANH_GELU_SCALE * TANH_GELU_CUBIC)) + TANH_GELU_SCALE;
  auto [_0, at, bend, _3] = sigmoids(z);
  return {damped(x, at), at + near * bend * by_x};
}

GATEDFFN_INLINE Both elu(V x, V alpha) {
  V below = min(0.0f, x);
  V value = where(x > 0.0f, x, expm1(below) * alpha);
  return {value, where(x > 0.0f, 1.0f, exp_below(below) * alpha)};
}

GATEDFFN_INLINE Both selu(V x) {
  auto [value, slope] = elu(x, set(SELU_ALPHA));
  return {value * SELU_SCALE, slope * SELU_SCALE};
}

GATEDFFN_INLINE Both xielu(V x, V alpha_p, V alpha_n) {
  V below = min(0.0f, x);
  V curve = alpha_n * expm1(below);
  V negative = curve - (alpha_n - XIELU_SLOPE) * below;
  V value = where(x > 0.0f, x * (alpha_p * x + XIELU_SLOPE), negative);
  return {value, where(x > 0.0f, 2.0f * alpha_p * x, curve) + XIELU_SLOPE};
}

GATEDFFN_INLINE V xielu_by_alpha_p(V x, V alpha_p, V alpha_n) {
  V above = max(0.0f, x);
  return above * above;
}

GATEDFFN_INLINE V xielu_by_alpha_n(V x, V alpha_p, V alpha_n) {
  V below = min(0.0f, x);
  V near = below * below * exp_rest(below);
  return where(below > -0.34f, near, expm1(below) - below);
}

GATEDFFN_INLINE Both soft_cap(V x, V up_cap) {
  auto [at, slope] = tanh_and_slope(x / up_cap);
  return {up_cap * at, slope};
}

GATEDFFN_INLINE Both situ(V x, V gate_cap) {
  auto [cap, bend] = soft_cap(x, gate_cap);
  auto [_0, at, _2, opposite] = sigmoids(x);
  return {cap * at, at * (bend + cap * opposite)};
}

GATEDFFN_INLINE Both pow_gate(V x, V m) {
  V g = where(x > 0.0f, clamp(SMALLEST, LARGEST, x), 1.0f);
  V root = sqrt(g);
  V exponent = divided(m, root + 1.0f);
  V by_root = divided(-exponent, 2.0f * root * (root + 1.0f));
  V power = pow(g, exponent);
  auto [z, at, bend, opposite] = sigmoids(x);
  V by_exponent = power * (by_root * log(g) + opposite);
  V by_base = exponent * pow(g, exponent - 1.0f);
  V value = where(x > 0.0f, power * at, damped(x, at));
  return {value, where(x > 0.0f, at * (by_exponent + by_base), at + z * bend)};
}

GATEDFFN_INLINE Both expanded_swish(V x, V alpha) {
  V more = 1.0f + 2.0f * alpha;
  auto [z, at, bend, _3] = sigmoids(x);
  return {damped(x, at * more - alpha), (at + z * bend) * more - alpha};
}

GATEDFFN_INLINE V expanded_swish_by_alpha(V x, V alpha) {
  auto [at, _1] = tanh_and_slope(0.5f * x);
  return x * at;
}

GATEDFFN_INLINE Both expanded_gelu(V x, V alpha) {
  V more = 1.0f + 2.0f * alpha;
  auto [cdf, pdf] = normal(x);
  return {damped(x, cdf * more - alpha), (cdf + finite(x) * pdf) * more - alpha};
}

GATEDFFN_INLINE V expanded_gelu_by_alpha(V x, V alpha) {
  return x * normal_erf(x);
}

GATEDFFN_INLINE Both clip(V x, V limit) {
  V slope = where(abs(x) > limit, 0.0f, where(x != x, x, 1.0f));
  return {max(-limit, min(limit, x)), slope};
}

GATEDFFN_INLINE Both clip_plus_one(V x, V limit) {
  auto [value, slope] = clip(x, limit);
  return {value + 1.0f, slope};
}

}  // namespace

static const Function FUNCTIONS[] = {
    {"identity", 0, value_of<identity>, both_of<identity>, {}},
    {"relu", 0, value_of<relu>, both_of<relu>, {}},
    {"relu2", 0, value_of<relu2>, both_of<relu2>, {}},
    {"leaky_relu", 1, value_of<leaky_relu>, both_of<leaky_relu>, {by_parameter<leaky_relu_by_slope>}},
    {"sigmoid", 0, value_of<sigmoid>, both_of<sigmoid>, {}},
    {"tanh", 0, value_of<tanh>, both_of<tanh>, {}},
    {"softplus", 0, value_of<softplus>, both_of<softplus>, {}},
    {"swish", 1, value_of<swish>, both_of<swish>, {by_parameter<swish_by_beta>}},
    {"capped_swish", 2, value_of<capped_swish>, both_of<capped_swish>, {by_parameter<capped_swish_by_beta>, nullptr}},
    {"mish", 0, value_of<mish>, both_of<mish>, {}},
    {"hard_swish", 0, value_of<hard_swish>, both_of<hard_swish>, {}},
    {"gelu", 0, value_of<gelu>, both_of<gelu>, {}},
    {"gelu_tanh", 0, value_of<gelu_tanh>, both_of<gelu_tanh>, {}},
    {"elu", 1, value_of<elu>, both_of<elu>, {nullptr}},
    {"selu", 0, value_of<selu>, both_of<selu>, {}},
    {"xielu", 2, value_of<xielu>, both_of<xielu>, {by_parameter<xielu_by_alpha_p>, by_parameter<xielu_by_alpha_n>}},
    {"situ", 1, value_of<situ>, both_of<situ>, {nullptr}},
    {"pow_gate", 1, value_of<pow_gate>, both_of<pow_gate>, {nullptr}},
    {"expanded_swish", 1, value_of<expanded_swish>, both_of<expanded_swish>, {by_parameter<expanded_swish_by_alpha>}},
    {"expanded_gelu", 1, value_of<expanded_gelu>, both_of<expanded_gelu>, {by_parameter<expanded_gelu_by_alpha>}},
    {"clip", 1, value_of<clip>, both_of<clip>, {nullptr}},
    {"clip_plus_one", 1, value_of<clip_plus_one>, both_of<clip_plus_one>, {nullptr}},
    {"soft_cap", 1, value_of<soft_cap>, both_of<soft_cap>, {nullptr}},
};

}  // namespace gatedffn
