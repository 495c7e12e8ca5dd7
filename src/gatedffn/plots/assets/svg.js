"use strict";
// What every drawing shares: elements, round numbers, the frame of a plot, its axes, a swatch.

const el = (id) => document.getElementById(id);

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

// The pixels of an SVG are the page's, so that text keeps its size. For a moment, while a window gets
// another size, there are none.
const widthOf = (into) => Math.max(into.clientWidth, 80);

// Empties a drawing and says what it shows to those who do not see it: a title, and in words more.
function begin(into, [width, height], title, words = "") {
  into.replaceChildren(svg("desc", { id: `${into.id}-words` }, words));
  into.setAttribute("viewBox", `0 0 ${width} ${height}`);
  into.setAttribute("aria-label", title);
  if (words) into.setAttribute("aria-describedby", `${into.id}-words`);
}

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

const numbered = (low, high) => ticks(low, high, 6).map((v) => [v, short(v)]);

// `marks` are the places on the x axis that are numbered, each with its text.
function drawAxes(into, f, labels, grid = true, marks = numbered(...f.x)) {
  const bottom = f.top + f.height;
  for (const [v, text] of marks) {
    const at = f.px(v);
    if (grid) into.append(svg("line", { class: v === 0 ? "zero" : "grid", x1: at, x2: at, y1: f.top, y2: bottom }));
    into.append(svg("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, text));
  }
  for (const [v, text] of numbered(...f.y)) {
    const at = f.py(v);
    if (grid) into.append(svg("line", { class: v === 0 ? "zero" : "grid", y1: at, y2: at, x1: f.left, x2: f.left + f.width }));
    into.append(svg("text", { x: f.left - 7, y: at + 4, "text-anchor": "end" }, text));
  }
  into.append(svg("rect", { class: "frame", x: f.left, y: f.top, width: f.width, height: f.height }));
  const middle = f.top + f.height / 2;
  into.append(svg("text", { class: "label", x: f.left + f.width / 2, y: bottom + 35, "text-anchor": "middle" }, labels.x));
  into.append(svg("text", { class: "label", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, labels.y));
}

function swatch(style, now = false) {
  const box = svg("svg", { class: "swatch", viewBox: "0 0 36 10", "aria-hidden": "true" });
  const look = `--light:${style.light};--dark:${style.dark}`;
  box.append(svg("path", { class: now ? "curve now" : "curve", style: look, "stroke-dasharray": style.dashes, d: "M0 5H36" }));
  return box;
}
