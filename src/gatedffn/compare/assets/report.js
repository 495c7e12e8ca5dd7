"use strict";
// The page of a comparison: tables that sort, views to choose from, learning curves.

const CURVES = JSON.parse(el("curves").textContent);
const SEARCHES = JSON.parse(el("searches").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// A cell sorts by the number that it begins with; words come after numbers.
function key(cell) {
  const number = parseFloat(cell.textContent.replaceAll(",", ""));
  return Number.isNaN(number) ? cell.textContent : number;
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : Number(a > b);
  return typeof a === "number" ? -1 : 1;
}

function sort(table, column) {
  const heads = all("thead th", table);
  const way = heads[column].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", way);
  const rows = all("tbody tr", table).map((row) => [key(row.cells[column]), row]);
  rows.sort(([a], [b]) => (way === "ascending" ? compare(a, b) : compare(b, a)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of all(".sortable")) {
  all("thead th", table).forEach((head, column) => {
    const button = html("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => sort(table, column));
    head.append(button);
  });
}

const chosen = (name) => all(`input[name=${name}]:checked`).map((input) => input.value);

function showView() {
  for (const view of all(".view")) view.hidden = view.id !== `at-equal-${chosen("view")[0]}`;
}

const UNITS = {
  tokens: [[1e9, "billion tokens"], [1e6, "million tokens"], [1e3, "thousand tokens"], [1, "tokens"]],
  compute: [[1e18, "10^18 FLOP"], [1e15, "10^15 FLOP"], [1e12, "10^12 FLOP"], [1e9, "10^9 FLOP"], [1, "FLOP"]],
  time: [[86400, "days"], [3600, "hours"], [60, "minutes"], [1, "seconds"]],
};

function along(points, x) {
  const i = points.findIndex(([at]) => at >= x);
  if (i < 1) return i === 0 && points[0][0] === x ? points[0][1] : null;
  const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
  return y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

// Where all runs of an arm, and the baseline's if it is subtracted, have a loss: the cost, the mean, the lowest, the highest.
function summary(arm, scaled, baseline) {
  const runs = scaled(arm);
  const references = baseline && scaled(baseline);
  const at = new Set([runs[0], ...(references ? [references[0]] : [])].flatMap((run) => run.map(([x]) => x)));
  return [...at].sort((a, b) => a - b).flatMap((x) => {
    const losses = runs.map((run, seed) => {
      const loss = along(run, x);
      const other = references ? along(references[seed], x) : 0;
      return loss === null || other === null ? null : loss - other;
    });
    if (losses.includes(null)) return [];
    const mean = losses.reduce((sum, loss) => sum + loss, 0) / losses.length;
    return [[x, mean, Math.min(...losses), Math.max(...losses)]];
  });
}

const frameOf = (chart, x, y) => frame(chart.clientWidth, chart.clientHeight, x, y, { left: 66, right: 12, top: 8, bottom: 46 });
const pathOf = (f, points) => points.map(([x, y]) => `${f.px(x).toFixed(1)} ${f.py(y).toFixed(1)}`).join("L");
const look = (arm) => `--light:${arm.style.light};--dark:${arm.style.dark}`;

// `curves` ({arm, points}) are said in words: where each begins and ends.
function beginChart(chart, title, curves) {
  const names = curves.map(({ arm }) => arm.label).join(", ") || "none";
  const words = curves
    .filter(({ points }) => points.length)
    .map(({ arm, points }) => `${arm.label}: from ${points[0][1].toFixed(3)} to ${points.at(-1)[1].toFixed(3)}.`);
  begin(chart, [chart.clientWidth, chart.clientHeight], `${title}: ${names}`, words.join(" "));
}

// Loss over the learning rate, which goes by its logarithm; the rate that was taken is filled.
function drawSearches() {
  const chart = el("rates");
  const points = SEARCHES.flatMap((arm) => arm.points);
  if (!points.length) return;
  el("rates-figure").hidden = false;
  const rates = [...new Set(points.map(([rate]) => rate))].sort((a, b) => a - b);
  const losses = points.map(([, loss]) => loss);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const [first, last] = [Math.log(rates[0]), Math.log(rates.at(-1))];
  const [aside, air] = [0.06 * (last - first) || 1, 0.05 * (high - low) || 1];
  const f = frameOf(chart, [first - aside, last + aside], [low - air, high + air]);
  beginChart(chart, "loss over the learning rate", SEARCHES.map((arm) => ({ arm, points: arm.points })));
  drawAxes(chart, f, { x: "learning rate", y: "loss" }, true, rates.map((rate) => [Math.log(rate), short(rate)]));
  for (const arm of SEARCHES) {
    const along = arm.points.map(([rate, loss]) => [Math.log(rate), loss]);
    const style = look(arm);
    if (along.length) chart.append(svg("path", { class: "curve", style, "stroke-dasharray": arm.style.dashes, d: `M${pathOf(f, along)}` }));
    for (const [rate, loss] of arm.points) {
      const taken = rate === arm.best ? "point taken" : "point";
      chart.append(svg("circle", { class: taken, style, cx: f.px(Math.log(rate)), cy: f.py(loss), r: 4 }));
    }
  }
}

function drawCurves() {
  const cost = chosen("cost")[0];
  const names = new Set(chosen("arm"));
  const baseline = CURVES.arms.find((arm) => arm.name === CURVES.baseline);
  const minus = el("minus").checked;
  const timed = CURVES.arms.filter((arm) => arm.cost[cost] !== null);
  const shown = timed.filter((arm) => names.has(arm.name));
  const most = Math.max(0, ...timed.flatMap((arm) => arm.runs.flatMap((run) => run.map(([step]) => step * arm.cost[cost]))));
  const [size, unit] = UNITS[cost].find(([size]) => most >= 2 * size) ?? UNITS[cost].at(-1);
  const scaled = (arm) => arm.runs.map((run) => run.map(([step, loss]) => [(step * arm.cost[cost]) / size, loss]));
  const curves = shown.map((arm) => ({ arm, points: summary(arm, scaled, minus ? baseline : null) }));
  const losses = curves.flatMap(({ points }) => points.flatMap(([, , low, high]) => [low, high]));
  const [low, high] = losses.length ? [Math.min(...losses), Math.max(...losses)] : [0, 1];
  const end = Math.max(0, ...curves.flatMap(({ points }) => points.map(([x]) => x))) || 1;
  const air = 0.05 * (high - low) || 1;
  const f = frameOf(el("chart"), [0, end], [low - air, high + air]);
  const y = minus ? `loss less that of ${CURVES.label}` : "loss";
  beginChart(el("chart"), `${y} over ${unit}`, curves);
  drawAxes(el("chart"), f, { x: unit, y });
  for (const { arm, points } of curves.filter(({ points }) => points.length)) {
    const style = look(arm);
    const lows = points.map(([x, , low]) => [x, low]);
    const highs = points.map(([x, , , high]) => [x, high]).reverse();
    el("chart").append(
      svg("path", { class: "band", style, d: `M${pathOf(f, [...lows, ...highs])}Z` }),
      svg("path", { class: "curve", style, "stroke-dasharray": arm.style.dashes, d: `M${pathOf(f, points)}` }),
    );
  }
}

function draw() {
  if (!el("chart").clientWidth) return; // for a moment, while a window gets another size
  drawCurves();
  drawSearches();
}

el("views").hidden = el("curves-section").hidden = false;
document.querySelector("input[name=view]").checked = true;
for (const input of all("input[name=view]")) input.addEventListener("change", showView);
for (const input of all("#curves-section input")) input.addEventListener("change", drawCurves);
addEventListener("resize", draw);
showView();
draw();
