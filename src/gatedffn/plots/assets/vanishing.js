"use strict";
// Rows of the table as functions, and where their derivatives are 0.

// What a row is drawn with: its own parameters, but for those of `given`, by name.
const parametersOf = (row, given = {}) =>
  Object.fromEntries(row.parameters.map((p) => [p.name, given[p.name] ?? p.default]));

function bound(name, values) {
  const { value, derivative, parameters } = SCALARS[name];
  const given = parameters.map((p) => values[p]);
  return { value: (x) => value(x, ...given), derivative: (x) => derivative(x, ...given) };
}

// phi, psi (1 where there is no up branch) and the hidden value along gate = up = x.
function functionsOf(row, given) {
  const values = parametersOf(row, given);
  const phi = bound(row.phi, values);
  if (!row.gated) return { phi, along: phi };
  const psi = bound(row.psi, values);
  const along = {
    value: (x) => phi.value(x) * psi.value(x),
    derivative: (x) => phi.derivative(x) * psi.value(x) + phi.value(x) * psi.derivative(x),
  };
  return { phi, psi, along };
}

const SCAN = { reach: 16, steps: 4096, far: 1e12, small: 1e-9 };

// Points (x, value, kind), stretches (low, high) and the sides on which the slope tends to 0.
function findZeros(f) {
  const { reach, steps, far, small } = SCAN;
  const at = (i) => -reach + (2 * reach * i) / steps;
  const slopes = Array.from({ length: steps + 1 }, (_, i) => f.derivative(at(i)));
  const points = [];
  const stretches = [];
  const kind = (before, after) =>
    before < 0 && after > 0 ? "minimum" : before > 0 && after < 0 ? "maximum" : "inflection";
  const add = (x, before, after) =>
    points.push({ x, value: f.value(x), kind: kind(before, after) });
  // The last x where `inside` holds, on the way from a, where it does, to b.
  const bisect = (inside, a, b) => {
    for (let n = 0; n < 80; n += 1) {
      const middle = 0.5 * (a + b);
      if (inside(middle)) a = middle;
      else b = middle;
    }
    return a;
  };
  const flat = (x) => f.derivative(x) === 0;
  for (let i = 0; i <= steps; i += 1) {
    if (slopes[i] === 0) {
      const first = i;
      while (i < steps && slopes[i + 1] === 0) i += 1;
      if (first === i) {
        add(at(i), slopes[Math.max(i - 1, 0)], slopes[Math.min(i + 1, steps)]);
      } else {
        stretches.push({
          low: first === 0 ? -Infinity : bisect(flat, at(first), at(first - 1)),
          high: i === steps ? Infinity : bisect(flat, at(i), at(i + 1)),
        });
      }
    } else if (i < steps && slopes[i] * slopes[i + 1] < 0) {
      const root = bisect((x) => f.derivative(x) < 0 === slopes[i] < 0, at(i), at(i + 1));
      if (Math.abs(f.derivative(root)) < small) add(root, slopes[i], slopes[i + 1]);
    }
  }
  const tends = (x) => Math.abs(f.derivative(x)) < small;
  return {
    points,
    stretches,
    left: tends(-far) && !stretches.some((s) => s.low === -Infinity),
    right: tends(far) && !stretches.some((s) => s.high === Infinity),
  };
}

function number(x, digits = 4) {
  const rounded = Number(x.toFixed(10)) + 0;
  const fixed = Number.isInteger(rounded) ? String(rounded) : rounded.toFixed(digits);
  const text = Number(fixed) === 0 ? "0" : fixed;
  return text.replace("-", "\u2212");
}

function sentence(found, variable, letter) {
  const parts = found.points.map(
    (p) => `${p.kind} at ${variable} = ${number(p.x)}, ${letter} = ${number(p.value)}`);
  for (const { low, high } of found.stretches) {
    if (low === -Infinity) parts.push(`flat for ${variable} \u2264 ${number(high)}`);
    else if (high === Infinity) parts.push(`flat for ${variable} > ${number(low)}`);
    else parts.push(`flat for ${number(low)} \u2264 ${variable} \u2264 ${number(high)}`);
  }
  const sides = [found.left && "\u2212\u221e", found.right && "\u221e"].filter(Boolean);
  if (sides.length) parts.push(`tends to 0 for ${variable} \u2192 ${sides.join(", ")}`);
  return parts.join("; ") || "nowhere";
}
