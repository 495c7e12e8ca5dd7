"use strict";
// Curves over one number as SVG: lines with gaps at jumps, zeros, and a readout line.

const CHART = { margin: { left: 52, right: 12, top: 12, bottom: 44 }, samples: 801 };

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

// What a curve does, in words: its ends, the lowest and the highest place between.
function courseOf(xs, ys) {
  const at = (i) => `${number(ys[i], 2)} at ${short(Number(xs[i].toFixed(2)))}`;
  const [low, high] = [ys.indexOf(Math.min(...ys)), ys.indexOf(Math.max(...ys))];
  return `from ${at(0)} to ${at(xs.length - 1)}, lowest ${at(low)}, highest ${at(high)}`;
}

// A chart of `curves` ({label, style, f, zeros}) into the SVG `into`; returns its frame.
function drawChart(into, curves, { x, most, labels, part, title }) {
  const xs = Array.from({ length: CHART.samples }, (_, i) => x[0] + ((x[1] - x[0]) * i) / (CHART.samples - 1));
  const all = curves.map(({ f }) => xs.map(f[part]));
  const width = widthOf(into);
  const height = Math.round(Math.min(Math.max(0.68 * width, 250), 380));
  const f = frame(width, height, x, span(all, most), CHART.margin);
  const words = curves.map(({ label }, i) => `${label}: ${courseOf(xs, all[i])}.`);
  begin(into, [width, height], title, words.join(" ") || "Nothing is chosen.");
  const clip = `clip-${into.id}`;
  const shape = svg("clipPath", { id: clip });
  shape.append(svg("rect", { x: f.left, y: f.top, width: f.width, height: f.height }));
  into.append(shape);
  drawAxes(into, f, labels);
  const lines = svg("g", { "clip-path": `url(#${clip})` });
  curves.forEach(({ style, now, zeros }, i) => {
    const look = `--light:${style.light};--dark:${style.dark}`;
    lines.append(svg("path", { class: now ? "curve now" : "curve", style: look, "stroke-dasharray": style.dashes, d: curvePath(f, xs, all[i]) }));
    for (const p of zeros.points) {
      if (p.x < x[0] || p.x > x[1]) continue;
      lines.append(svg("circle", { class: "dot", style: look, cx: f.px(p.x), cy: f.py(part === "value" ? p.value : 0), r: 4 }));
    }
  });
  into.append(lines, svg("line", { class: "cursor", y1: f.top, y2: f.top + f.height, visibility: "hidden" }));
  return f;
}
