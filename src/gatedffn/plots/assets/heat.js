"use strict";
// A gated variant over gate and up: colours on a canvas, level lines and marks as SVG over it.

const HEAT = { margin: { left: 52, right: 12, top: 12, bottom: 44 }, cells: 160 };
// Purple below 0, orange above, and the paper's own colour at 0.
const SHADES = {
  light: { zero: [247, 247, 247], low: [[128, 115, 172], [45, 0, 75]], high: [[224, 130, 20], [127, 59, 8]] },
  dark: { zero: [30, 34, 40], low: [[112, 96, 190], [196, 186, 255]], high: [[190, 105, 15], [255, 205, 130]] },
};

function shade(t, shades) {
  const [half, full] = t < 0 ? shades.low : shades.high;
  const s = Math.min(Math.abs(t), 1);
  const [from, to, part] = s < 0.5 ? [shades.zero, half, 2 * s] : [half, full, 2 * s - 1];
  return from.map((c, i) => Math.round(c + (to[i] - c) * part));
}

// 1, 2 and 5 times powers of ten on both sides of 0, the largest few below the largest value.
function levels(largest) {
  const unit = 10 ** Math.floor(Math.log10(largest));
  const sizes = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5].map((factor) => factor * unit);
  const kept = sizes.filter((v) => v > largest / 60 && v < largest).map((v) => Number(v.toPrecision(3)));
  return [...kept.map((v) => -v).reverse(), 0, ...kept];
}

// Marching squares: the pieces of the level line through each cell, as pairs of places in the SVG.
function levelPieces(f, xs, ys, h, level) {
  const pieces = [];
  const cross = (a, b, p, q) => p + ((q - p) * (level - a)) / (b - a);
  for (let j = 0; j + 1 < ys.length; j += 1) {
    for (let i = 0; i + 1 < xs.length; i += 1) {
      const [a, b, c, d] = [h(i, j), h(i + 1, j), h(i + 1, j + 1), h(i, j + 1)];
      const ends = [];
      const add = (x, y) => ends.push(`${f.px(x).toFixed(2)} ${f.py(y).toFixed(2)}`);
      if (a < level !== b < level) add(cross(a, b, xs[i], xs[i + 1]), ys[j]);
      if (b < level !== c < level) add(xs[i + 1], cross(b, c, ys[j], ys[j + 1]));
      if (c < level !== d < level) add(cross(d, c, xs[i], xs[i + 1]), ys[j + 1]);
      if (d < level !== a < level) add(xs[i], cross(a, d, ys[j], ys[j + 1]));
      for (let k = 0; k + 1 < ends.length; k += 2) pieces.push([ends[k], ends[k + 1]]);
    }
  }
  return pieces;
}

// Joins the pieces end to end, so that dashes run on from cell to cell.
function joined(pieces) {
  const at = new Map();
  for (const piece of pieces) {
    for (const end of piece) at.set(end, [...(at.get(end) ?? []), piece]);
  }
  const used = new Set();
  const walk = (end) => {
    const line = [];
    for (;;) {
      const next = at.get(end).find((piece) => !used.has(piece));
      if (!next) return line;
      used.add(next);
      end = next[0] === end ? next[1] : next[0];
      line.push(end);
    }
  };
  let path = "";
  for (const piece of pieces) {
    if (used.has(piece)) continue;
    used.add(piece);
    const line = [...walk(piece[0]).reverse(), ...piece, ...walk(piece[1])];
    path += `M${line.join("L")}`;
  }
  return path;
}

// A pixel has the colour of its middle, from a ramp: there are too many to mix each anew.
function paint(canvas, size, f, phi, psi, largest, shades) {
  canvas.width = canvas.height = size;
  const image = new ImageData(f.width, f.height);
  const half = 500;
  const ramp = Array.from({ length: 2 * half + 1 }, (_, i) => shade(i / half - 1, shades));
  const columns = Array.from({ length: f.width }, (_, i) => phi.value(f.vx(f.left + i + 0.5)));
  let at = 0;
  for (let j = 0; j < f.height; j += 1) {
    const up = psi.value(f.vy(f.top + j + 0.5));
    for (const column of columns) {
      const place = Math.round(half * (1 + (column * up) / largest));
      const [r, g, b] = ramp[Math.min(Math.max(place, 0), 2 * half)];
      image.data[at] = r;
      image.data[at + 1] = g;
      image.data[at + 2] = b;
      image.data[at + 3] = 255;
      at += 4;
    }
  }
  canvas.getContext("2d").putImageData(image, f.left, f.top);
}

// Where the level lines cross a path (t in 0..1 to gate and up), one place for each level.
function crossings(list, path, h) {
  const places = [];
  for (const level of list.filter((v) => v !== 0)) {
    let before = null;
    for (let t = 0; t <= 1; t += 0.002) {
      const [g, u] = path(t);
      const now = h(g, u);
      if (before !== null && before < level !== now < level) {
        places.push({ level, g, u });
        break;
      }
      before = now;
    }
  }
  return places;
}

// A value on each level line, along whichever paths leave the most labels apart from each other.
function levelLabels(into, f, h, reach, list) {
  const tries = [
    [(t) => [0.96 * t * reach, 0.96 * t * reach], (t) => [0.96 * t * reach, -0.96 * t * reach]],
    [(t) => [(1.9 * t - 0.95) * reach, 0.7 * reach], (t) => [(1.9 * t - 0.95) * reach, -0.7 * reach]],
  ];
  const apart = (a, b) => Math.hypot(f.px(a.g) - f.px(b.g), f.py(a.u) - f.py(b.u)) > 20;
  const kept = tries.map((paths) => {
    const chosen = [];
    for (const place of paths.flatMap((path) => crossings(list, path, h)).reverse()) {
      const same = chosen.some((other) => other.level === place.level);
      if (!same && chosen.every((other) => apart(place, other))) chosen.push(place);
    }
    return chosen;
  });
  const best = kept[1].length > kept[0].length ? kept[1] : kept[0];
  for (const { level, g, u } of best) {
    into.append(svg("text", { class: "level", x: f.px(g), y: f.py(u) + 4, "text-anchor": "middle" }, short(level)));
  }
}

// Lines, not a tint: a tint would read as a value.
function hatching() {
  const pattern = svg("pattern", { id: "hatch", width: 9, height: 9, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  pattern.append(svg("line", { class: "hatch", x1: 0, y1: 0, x2: 0, y2: 9 }));
  return pattern;
}

// Draws the row; returns what the pointer needs: the frame, phi and psi.
function drawHeat(canvas, over, row, { phi, psi }, zeros, dark) {
  const reach = row.reach;
  const side = widthOf(over);
  const f = frame(side, side, [-reach, reach], [-reach, reach], HEAT.margin);
  const n = HEAT.cells;
  const grid = Array.from({ length: n + 1 }, (_, i) => -reach + (2 * reach * i) / n);
  const gates = grid.map(phi.value);
  const ups = grid.map(psi.value);
  const size = (values) => Math.max(...values.map(Math.abs));
  const largest = size(gates) * size(ups);
  const shades = dark ? SHADES.dark : SHADES.light;
  paint(canvas, side, f, phi, psi, largest, shades);
  const corners = [[1, 1], [-1, 1], [-1, -1], [1, -1]].map(([a, b]) => {
    const [g, u] = [a * reach, b * reach];
    return `${number(phi.value(g) * psi.value(u), 2)} at gate ${short(g)} and up ${short(u)}`;
  });
  begin(over, [side, side], `${row.label} over gate and up; read it with the arrow keys`, `Hidden value ${corners.join(", ")}.`);
  over.append(hatching());
  drawAxes(over, f, { x: "gate g", y: "up u" }, false);
  const list = levels(largest);
  for (const level of list) {
    const kind = level < 0 ? "levelline below" : level === 0 ? "levelline nought" : "levelline";
    const pieces = levelPieces(f, grid, grid, (i, j) => gates[i] * ups[j], level);
    over.append(svg("path", { class: kind, d: joined(pieces) }));
  }
  levelLabels(over, f, (g, u) => phi.value(g) * psi.value(u), reach, list);
  for (const p of zeros.points.filter((p) => Math.abs(p.x) < reach)) {
    over.append(svg("line", { class: "mark", x1: f.px(p.x), x2: f.px(p.x), y1: f.top, y2: f.top + f.height }));
  }
  for (const s of zeros.stretches) {
    const [low, high] = [Math.max(s.low, -reach), Math.min(s.high, reach)];
    if (low >= high) continue;
    over.append(svg("rect", { class: "flat", x: f.px(low), width: f.px(high) - f.px(low), y: f.top, height: f.height }));
  }
  const silent = grid.filter((_, i) => ups[i] === 0);
  if (silent.length > 1) {
    const [low, high] = [silent[0], silent[silent.length - 1]];
    over.append(svg("rect", { class: "flat", x: f.left, width: f.width, y: f.py(high), height: f.py(low) - f.py(high) }));
  }
  over.append(svg("line", { class: "cursor", id: "heat-v" }), svg("line", { class: "cursor", id: "heat-h" }));
  return { side, f, phi, psi, largest, shades, reach, silent };
}

// The colours beside their values.
function drawBar(into, { side, largest, shades }) {
  const steps = 60;
  const width = widthOf(into);
  begin(into, [width, side], `colours from ${short(-largest)} to ${short(largest)}`);
  const f = frame(width, side, [0, 1], [-largest, largest], { ...HEAT.margin, left: 24, right: 44 });
  for (let i = 0; i < steps; i += 1) {
    const t = 1 - (2 * (i + 0.5)) / steps;
    const height = f.height / steps;
    into.append(svg("rect", { x: f.left, width: f.width, y: f.top + i * height, height: height + 0.6, fill: `rgb(${shade(t, shades)})` }));
  }
  into.append(svg("rect", { class: "frame", x: f.left, y: f.top, width: f.width, height: f.height }));
  for (const v of ticks(-largest, largest, 6)) {
    into.append(svg("text", { x: f.left + f.width + 5, y: f.py(v) + 4 }, short(v)));
  }
  const middle = f.top + f.height / 2;
  into.append(svg("text", { class: "label", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, "hidden value h"));
}
