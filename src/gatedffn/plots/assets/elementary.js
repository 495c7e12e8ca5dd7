// The elementary functions that the scalar functions are made of, in float64. What those are is
// translated from activations/gpu.py, which has these under the same names in elementary.py.
const { abs, expm1, log, log1p, max, min, pow, sqrt } = Math;
const LARGEST = Number.MAX_VALUE;
const SMALLEST = 2 ** -1022;

const full = (value) => value;
const where = (condition, yes, no) => (condition ? yes : no);
const clamp = (low, high, x) => min(high, max(low, x));
const divided = (x, y) => x / y;
const exp_below = Math.exp;
const reciprocal_after_one = (e) => 1 / (1 + e);

// The argument, the sigmoid there, its slope, and the sigmoid of minus the argument.
function sigmoids(x) {
  const e = Math.exp(-abs(x));
  const [tail, rest] = [e / (1 + e), 1 / (1 + e)];
  return x < 0 ? [x, tail, tail * rest, rest] : [x, rest, tail * rest, tail];
}

const tanh_and_slope = (x) => [Math.tanh(x), 4 * sigmoids(2 * x)[2]];

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
    return 1 - (2 / sqrt(Math.PI)) * Math.exp(-x * x) * sum;
  }
  let fraction = x;
  for (let n = 60; n > 0; n -= 1) fraction = x + n / 2 / fraction;
  return Math.exp(-x * x) / (sqrt(Math.PI) * fraction);
}

// The normal distribution: the probability below x, and the density there.
const normal = (x) =>
  [0.5 * erfc(-x * Math.SQRT1_2), Math.exp(-0.5 * x * x) / sqrt(2 * Math.PI)];

const scalar = (both, ...parameters) => ({
  value: (...given) => both(...given)[0],
  derivative: (...given) => both(...given)[1],
  parameters,
});
