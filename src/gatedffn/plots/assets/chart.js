"use strict";
// Curves over one number as SVG: axes, lines with gaps at jumps, zeros, and a readout line.

function svg(tag, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Round numbers between low and high, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const size = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
  const first = Math.ceil(low / size - 1e-9);
  const last = Math.floor(high / size + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * size);
}

const short = (x) => String(Number(x.toPrecision(6))).replace("-", "\u2212");

// The rectangle of a plot inside its SVG, and the map from numbers to it.
function frame(width, height, x, y, margin) {
  const box = { left: margin.left, top: margin.top };
  box.width = width - margin.left - margin.right;
  box.height = height - margin.top - margin.bottom;
  return {
    ...box,
    x,
    y,
    px: (v) => box.left + (box.width * (v - x[0])) / (x[1] - x[0]),
    py: (v) => box.top + (box.height * (y[1] - v)) / (y[1] - y[0]),
    vx: (p) => x[0] + ((x[1] - x[0]) * (p - box.left)) / box.width,
    vy: (p) => y[1] - ((y[1] - y[0]) * (p - box.top)) / box.height,
  };
}

function drawAxes(into, f, labels, grid = true) {
  const bottom = f.top + f.height;
  for (const v of ticks(f.x[0], f.x[1], 6)) {
    const at = f.px(v);
    if (grid) into.append(svg("line", { class: v === 0 ? "zero" : "grid", x1: at, x2: at, y1: f.top, y2: bottom }));
    into.append(svg("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, short(v)));
  }
  for (const v of ticks(f.y[0], f.y[1], 6)) {
    const at = f.py(v);
    if (grid) into.append(svg("line", { class: v === 0 ? "zero" : "grid", y1: at, y2: at, x1: f.left, x2: f.left + f.width }));
    into.append(svg("text", { x: f.left - 7, y: at + 4, "text-anchor": "end" }, short(v)));
  }
  into.append(svg("rect", { class: "frame", x: f.left, y: f.top, width: f.width, height: f.height }));
  const middle = f.top + f.height / 2;
  into.append(svg("text", { class: "label", x: f.left + f.width / 2, y: bottom + 35, "text-anchor": "middle" }, labels.x));
  into.append(svg("text", { class: "label", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, labels.y));
}

// The path of a curve; a step far larger than those beside it is a jump, and is left out.
function curvePath(f, xs, ys) {
  const step = (i) => Math.abs(ys[i] - ys[i - 1]);
  let path = "";
  for (let i = 0; i < xs.length; i += 1) {
    const beside = Math.max(i > 1 ? step(i - 1) : 0, i + 1 < xs.length ? step(i + 1) : 0);
    const jump = i > 0 && step(i) > 0.005 * (f.y[1] - f.y[0]) && step(i) > 8 * beside;
    path += `${i === 0 || jump ? "M" : "L"}${f.px(xs[i]).toFixed(2)} ${f.py(ys[i]).toFixed(2)}`;
  }
  return path;
}

// Room for all curves, but no more than `most`: one steep curve must not flatten the others.
function span(all, most) {
  let [low, high] = [0, 0];
  for (const ys of all) for (const y of ys) [low, high] = [Math.min(low, y), Math.max(high, y)];
  [low, high] = [Math.max(low, most[0]), Math.min(high, most[1])];
  if (high - low < 0.2) high = low + 1;
  const air = 0.06 * (high - low);
  return [low - air, high + air];
}

const CHART = { width: 560, height: 380, margin: { left: 58, right: 12, top: 12, bottom: 46 }, samples: 801 };

// A chart of `curves` ({row, f, zeros}) into the SVG `into`; returns its frame.
function drawChart(into, curves, { x, most, labels, part, title }) {
  const xs = Array.from({ length: CHART.samples }, (_, i) => x[0] + ((x[1] - x[0]) * i) / (CHART.samples - 1));
  const all = curves.map(({ f }) => xs.map(f[part]));
  const f = frame(CHART.width, CHART.height, x, span(all, most), CHART.margin);
  into.replaceChildren();
  into.setAttribute("aria-label", title);
  into.setAttribute("viewBox", `0 0 ${CHART.width} ${CHART.height}`);
  const clip = `clip-${into.id}`;
  const shape = svg("clipPath", { id: clip });
  shape.append(svg("rect", { x: f.left, y: f.top, width: f.width, height: f.height }));
  into.append(shape);
  drawAxes(into, f, labels);
  const lines = svg("g", { "clip-path": `url(#${clip})` });
  curves.forEach(({ row, zeros }, i) => {
    const look = `--light:${row.style.light};--dark:${row.style.dark}`;
    lines.append(svg("path", { class: "curve", style: look, "stroke-dasharray": row.style.dashes, d: curvePath(f, xs, all[i]) }));
    for (const p of zeros.points) {
      if (p.x < x[0] || p.x > x[1]) continue;
      lines.append(svg("circle", { class: "dot", style: look, cx: f.px(p.x), cy: f.py(part === "value" ? p.value : 0), r: 4 }));
    }
  });
  into.append(lines, svg("line", { class: "cursor", y1: f.top, y2: f.top + f.height, visibility: "hidden" }));
  return f;
}

function swatch(row) {
  const box = svg("svg", { class: "swatch", viewBox: "0 0 36 10", "aria-hidden": "true" });
  const look = `--light:${row.style.light};--dark:${row.style.dark}`;
  box.append(svg("path", { class: "curve", style: look, "stroke-dasharray": row.style.dashes, d: "M0 5H36" }));
  return box;
}
