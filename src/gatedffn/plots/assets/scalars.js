"use strict";
// The scalar functions by the names that rows of the table use, in float64, each with its analytic
// derivative. A test holds every one to the library's own definition.
const SCALARS = (() => {
  const SQRT_HALF = Math.sqrt(0.5);
  const SELU_ALPHA = 1.6732632423543772;
  const SELU_SCALE = 1.0507009873554805;
  const TANH_GELU_SCALE = 2 * Math.sqrt(2 / Math.PI);
  const TANH_GELU_CUBIC = 0.044715;
  const XIELU_SLOPE = 0.5;

  // Below 2 the power series, whose terms are all positive; from there the continued fraction.
  function erfc(x) {
    if (x < 0) return 2 - erfc(-x);
    if (x < 2) {
      let term = x;
      let sum = x;
      for (let n = 1; term > sum * 1e-18; n += 1) {
        term *= (2 * x * x) / (2 * n + 1);
        sum += term;
      }
      return 1 - (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
    }
    let fraction = x;
    for (let n = 60; n > 0; n -= 1) fraction = x + n / 2 / fraction;
    return Math.exp(-x * x) / (Math.sqrt(Math.PI) * fraction);
  }

  const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
  const dSigmoid = (x) => sigmoid(x) * sigmoid(-x);
  const dTanh = (x) => 4 * dSigmoid(2 * x);
  const normalCdf = (x) => 0.5 * erfc(-x * SQRT_HALF);
  const normalPdf = (x) => Math.exp(-0.5 * x * x) / Math.sqrt(2 * Math.PI);

  const relu = (x) => Math.max(x, 0);
  const step = (x) => (x > 0 ? 1 : 0);
  const swish = (x, beta) => x * sigmoid(beta * x);
  const dSwish = (x, beta) => sigmoid(beta * x) + beta * x * dSigmoid(beta * x);
  const gelu = (x) => x * normalCdf(x);
  const dGelu = (x) => normalCdf(x) + x * normalPdf(x);
  const elu = (x, alpha) => (x > 0 ? x : alpha * Math.expm1(x));
  const dElu = (x, alpha) => (x > 0 ? 1 : alpha * Math.exp(x));
  const softCap = (x, cap) => cap * Math.tanh(x / cap);
  const dSoftCap = (x, cap) => dTanh(x / cap);
  const clip = (x, limit) => Math.min(Math.max(x, -limit), limit);
  const dClip = (x, limit) => (Math.abs(x) > limit ? 0 : 1);

  const tanhGeluArgument = (x) => TANH_GELU_SCALE * (x + TANH_GELU_CUBIC * x * x * x);
  function dGeluTanh(x) {
    const slope = TANH_GELU_SCALE * (1 + 3 * TANH_GELU_CUBIC * x * x);
    const z = tanhGeluArgument(x);
    return sigmoid(z) + x * dSigmoid(z) * slope;
  }

  function powGate(x, m) {
    if (!(x > 0)) return swish(x, 1);
    return Math.exp((m / (Math.sqrt(x) + 1)) * Math.log(x)) * sigmoid(x);
  }
  function dPowGate(x, m) {
    if (!(x > 0)) return dSwish(x, 1);
    const root = Math.sqrt(x);
    const exponent = m / (root + 1);
    const dExponent = -m / (2 * root * (root + 1) ** 2);
    const power = Math.exp(exponent * Math.log(x));
    const byPower = exponent * Math.exp((exponent - 1) * Math.log(x));
    return sigmoid(x) * (power * (dExponent * Math.log(x) + sigmoid(-x)) + byPower);
  }

  const scalar = (value, derivative, ...parameters) => ({ value, derivative, parameters });
  return {
    identity: scalar((x) => x, () => 1),
    relu: scalar(relu, step),
    relu2: scalar((x) => relu(x) ** 2, (x) => 2 * relu(x)),
    leaky_relu: scalar(
      (x, slope) => (x > 0 ? x : slope * x), (x, slope) => (x > 0 ? 1 : slope), "slope"),
    sigmoid: scalar(sigmoid, dSigmoid),
    tanh: scalar(Math.tanh, dTanh),
    softplus: scalar((x) => relu(x) + Math.log1p(Math.exp(-Math.abs(x))), sigmoid),
    swish: scalar(swish, dSwish, "beta"),
    capped_swish: scalar(
      (x, beta, limit) => swish(Math.min(x, limit), beta),
      (x, beta, limit) => (x > limit ? 0 : dSwish(x, beta)), "beta", "limit"),
    gelu: scalar(gelu, dGelu),
    gelu_tanh: scalar((x) => x * sigmoid(tanhGeluArgument(x)), dGeluTanh),
    elu: scalar(elu, dElu, "alpha"),
    selu: scalar(
      (x) => SELU_SCALE * elu(x, SELU_ALPHA), (x) => SELU_SCALE * dElu(x, SELU_ALPHA)),
    xielu: scalar(
      (x, p, n) =>
        x > 0 ? x * (p * x + XIELU_SLOPE) : n * Math.expm1(x) - (n - XIELU_SLOPE) * x,
      (x, p, n) => (x > 0 ? 2 * p * x : n * Math.expm1(x)) + XIELU_SLOPE, "alpha_p", "alpha_n"),
    situ: scalar(
      (x, cap) => softCap(x, cap) * sigmoid(x),
      (x, cap) => dSoftCap(x, cap) * sigmoid(x) + softCap(x, cap) * dSigmoid(x), "gate_cap"),
    pow_gate: scalar(powGate, dPowGate, "m"),
    expanded_swish: scalar(
      (x, alpha) => x * (sigmoid(x) * (1 + 2 * alpha) - alpha),
      (x, alpha) => dSwish(x, 1) * (1 + 2 * alpha) - alpha, "alpha"),
    expanded_gelu: scalar(
      (x, alpha) => x * (normalCdf(x) * (1 + 2 * alpha) - alpha),
      (x, alpha) => dGelu(x) * (1 + 2 * alpha) - alpha, "alpha"),
    clip: scalar(clip, dClip, "limit"),
    clip_plus_one: scalar((x, limit) => clip(x, limit) + 1, dClip, "limit"),
    soft_cap: scalar(softCap, dSoftCap, "up_cap"),
  };
})();
