"use strict";
// State, controls and readouts. The state lives in the address after #, so a view can be kept.

const DEFAULTS = JSON.parse(document.getElementById("defaults").textContent);
const FAN = JSON.parse(document.getElementById("fan-styles").textContent);
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

// The pairs of a function and its derivative; `curves` says what is in them.
const PAIRS = [
  { id: "activation", x: [-5, 5], most: { value: [-2, 5], derivative: [-0.6, 2] }, gated: () => false, curves: () => shown(false) },
  { id: "family", x: [-3, 3], most: { value: [-1, 6], derivative: [-2, 5] }, gated: () => true, curves: () => shown(true) },
  { id: "fan", x: [-6, 6], most: { value: [-3, 12], derivative: [-3, 8] }, gated: () => BY_NAME[state.one].gated, curves: fanned },
];
const PARTS = ["value", "derivative"];

let state = null;
let heat = null;
const cursor = { activation: null, family: null, fan: null, heat: null };

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const names = given.has("show") ? given.get("show").split(",") : DEFAULTS.show;
  const one = Object.hasOwn(BY_NAME, given.get("one")) ? given.get("one") : DEFAULTS.one;
  const moved = {};
  for (const { key, low, high } of KNOBS) {
    const value = given.get(key) === null ? NaN : Number(given.get(key));
    if (Number.isFinite(value)) moved[key] = Math.min(Math.max(value, low), high);
  }
  return { show: new Set(names.filter((name) => Object.hasOwn(BY_NAME, name))), moved, one, fan: fanOf(one, given.get("fan")) };
}

// The parameter that a variant's fan is over: the one that is named, or its first.
function fanOf(one, name) {
  const names = BY_NAME[one].parameters.map((p) => p.name);
  return names.includes(name) ? name : names[0];
}

function writeState() {
  const parts = [`show=${[...state.show].join(",")}`, `one=${state.one}`];
  if (state.fan !== undefined) parts.push(`fan=${state.fan}`);
  for (const [key, value] of Object.entries(state.moved)) parts.push(`${key}=${Number(value.toPrecision(6))}`);
  history.replaceState(null, "", `#${parts.join("&")}`);
}

function buildControls() {
  for (const row of ROWS) {
    const box = html("input", { type: "checkbox", id: `show-${row.name}`, value: row.name });
    box.addEventListener("change", () => {
      if (box.checked) state.show.add(row.name);
      else state.show.delete(row.name);
      update();
    });
    const label = html("label", { for: box.id, title: row.formula }, box, swatch(row.style), row.label);
    el(row.gated ? "choose-gated" : "choose-ungated").append(label);
    el("one").append(html("option", { value: row.name }, row.label));
  }
  for (const button of document.querySelectorAll("button[data-pick]")) {
    button.addEventListener("click", () => {
      const gated = button.closest("fieldset").dataset.gated === "true";
      const pick = { all: () => true, none: () => false, first: (row) => DEFAULTS.show.includes(row.name) };
      for (const row of ROWS.filter((row) => row.gated === gated)) {
        if (pick[button.dataset.pick](row)) state.show.add(row.name);
        else state.show.delete(row.name);
      }
      update();
    });
  }
  buildKnobs(el("sliders"), (key, value) => {
    const { [key]: _, ...others } = state.moved;
    update({ moved: value === null ? others : { ...others, [key]: value } });
  });
  el("one").addEventListener("change", () => update({ one: el("one").value, fan: fanOf(el("one").value) }));
  el("fan-of").addEventListener("change", () => update({ fan: el("fan-of").value }));
  el("choices").open = matchMedia("(min-width: 901px)").matches;
}

function showControls() {
  for (const row of ROWS) el(`show-${row.name}`).checked = state.show.has(row.name);
  el("chosen").textContent = `${state.show.size} of ${ROWS.length}`;
  el("one").value = state.one;
  const { parameters } = BY_NAME[state.one];
  el("fan-of").replaceChildren(...parameters.map((p) => html("option", { value: p.name }, p.name)));
  if (state.fan !== undefined) el("fan-of").value = state.fan;
  el("fan-choice").hidden = parameters.length < 2;
  showKnobs(el("sliders"), ROWS.filter((row) => state.show.has(row.name) || row.name === state.one), state.moved);
}

// A row as it is drawn: with what the sliders say, and `also`.
function drawn(row, also = {}) {
  const { phi, psi, along } = functionsOf(row, { ...givenTo(row, state.moved), ...also });
  return { row, phi, psi, f: along, zeros: findZeros(along) };
}

function labelOf(row) {
  const values = Object.entries(parametersOf(row, givenTo(row, state.moved)));
  return [row.label, ...values.map(([name, value]) => `${name} = ${short(Number(value.toPrecision(4)))}`)].join(", ");
}

function shown(gated) {
  const rows = ROWS.filter((row) => row.gated === gated && state.show.has(row.name));
  return rows.map((row) => ({ ...drawn(row), label: labelOf(row), style: row.style }));
}

// The chosen variant for several values of a parameter, and over them as it is now.
function fanned() {
  const row = BY_NAME[state.one];
  const parameter = row.parameters.find((p) => p.name === state.fan);
  if (!parameter) return [];
  const several = parameter.fan.map((value, i) => ({ ...drawn(row, { [state.fan]: value }), label: `${state.fan} = ${short(value)}`, style: FAN[i] }));
  return [...several, { ...drawn(row), label: `now: ${labelOf(row)}`, style: { light: "var(--ink)", dark: "var(--ink)", dashes: "" }, now: true }];
}

function buildPairs() {
  for (const { id } of PAIRS) {
    const charts = PARTS.map((part) => svg("svg", { id: `${id}-${part}`, role: "img", tabindex: 0 }));
    el(id).append(...charts, html("output", { class: "at", id: `${id}-at` }), html("ul", { class: "legend", id: `${id}-legend` }));
  }
}

const lettersOf = (pair) => (pair.gated() ? { value: "h", derivative: "dh/dx" } : { value: "f", derivative: "df/dx" });

function drawPair(pair) {
  const { id, x } = pair;
  const gated = pair.gated();
  const labels = gated
    ? { x: "gate = up = x", value: "hidden value h(x, x)", derivative: "slope dh/dx" }
    : { x: "input x", value: "output f(x)", derivative: "slope df/dx" };
  pair.drawn = pair.curves();
  const names = pair.drawn.map(({ label }) => label).join("; ");
  for (const part of PARTS) {
    pair[part] = drawChart(el(`${id}-${part}`), pair.drawn, {
      x,
      part,
      most: pair.most[part],
      labels: { x: labels.x, y: labels[part] },
      title: `${labels[part]} over ${labels.x}: ${names || "nothing is chosen"}`,
    });
  }
  el(`${id}-legend`).replaceChildren(
    ...pair.drawn.map(({ label, style, now }) =>
      html("li", {}, swatch(style, now), html("span", { class: "name" }, label), html("span", { class: "read" }))),
  );
  readPair(pair);
}

function readPair(pair) {
  const at = cursor[pair.id];
  const letters = lettersOf(pair);
  for (const part of PARTS) {
    const line = el(`${pair.id}-${part}`).querySelector(".cursor");
    line.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const name of ["x1", "x2"]) line.setAttribute(name, pair[part].px(at));
  }
  el(`${pair.id}-at`).textContent = at === null ? "Point at a plot or tap it, or use the arrow keys on it, to read values." : `At x = ${number(at, 3)}:`;
  [...el(`${pair.id}-legend`).children].forEach((item, i) => {
    const { f } = pair.drawn[i];
    item.querySelector(".read").textContent =
      at === null ? "" : PARTS.map((part) => `${letters[part]} = ${number(f[part](at))}`).join(", ");
  });
}

// The variant by itself: its facts, its fan and its plane.
function drawOne() {
  const row = BY_NAME[state.one];
  const { phi, psi } = drawn(row);
  const zeros = findZeros(phi);
  const [letter, output] = row.gated ? ["g", "phi"] : ["x", "f"];
  el("fan-part").hidden = state.fan === undefined;
  el("plane-part").hidden = !row.gated;
  el("fan-title").textContent = `${row.label} over ${state.fan}${row.gated ? ", gate = up = x" : ""}`;
  if (row.gated) {
    heat = drawHeat(el("heat"), el("heat-over"), row, { phi, psi }, zeros, darkScheme.matches);
    drawBar(el("heat-bar"), heat);
    readPlane();
  }
  const silent = row.gated && heat.silent.length > 1;
  const facts = [
    ["hidden values", row.formula],
    ["source", row.source],
    ["drawn as", labelOf(row)],
    ...row.parameters.map((p) => [p.name, `${p.default} by default, ${p.learnable ? "learnable" : "fixed"}: ${p.meaning}`]),
    [row.gated ? "dh/dg = 0" : "df/dx = 0", `${row.gated ? "for every up: " : ""}${sentence(zeros, letter, output)}`],
    ...(silent ? [["", `for every gate: u \u2264 ${number(heat.silent.at(-1))}`]] : []),
  ];
  el("facts").replaceChildren(...facts.flatMap(([term, words]) => [html("dt", {}, term), html("dd", {}, words)]));
}

function readPlane() {
  const at = cursor.heat;
  const [v, h] = [el("heat-v"), el("heat-h")];
  for (const line of [v, h]) line.setAttribute("visibility", at === null ? "hidden" : "visible");
  if (at === null) {
    el("heat-at").textContent = "Point at the plane or tap it, or use the arrow keys on it, to read values.";
    return;
  }
  const { f, phi, psi, reach } = heat;
  const [g, u] = at.map((value) => Math.min(Math.max(value, -reach), reach));
  for (const [line, a, b] of [[v, [f.px(g), f.px(g)], [f.top, f.top + f.height]], [h, [f.left, f.left + f.width], [f.py(u), f.py(u)]]]) {
    ["x1", "x2"].forEach((name, i) => line.setAttribute(name, a[i]));
    ["y1", "y2"].forEach((name, i) => line.setAttribute(name, b[i]));
  }
  const values = { g, u, h: phi.value(g) * psi.value(u), "dh/dg": phi.derivative(g) * psi.value(u), "dh/du": phi.value(g) * psi.derivative(u) };
  el("heat-at").textContent = Object.entries(values).map(([name, value]) => `${name} = ${number(value, 3)}`).join("   ");
}

function drawTable(curves) {
  const rows = curves.map(({ row, phi, zeros, label, style }) => {
    const by = row.gated ? [sentence(findZeros(phi), "g", "phi"), sentence(zeros, "x", "h")] : [sentence(zeros, "x", "f"), "\u2013"];
    return html("tr", {}, html("th", { scope: "row" }, swatch(style), label), ...by.map((words) => html("td", {}, words)));
  });
  el("zeros").replaceChildren(...rows);
}

function followAll() {
  const within = (v, [low, high]) => Math.min(Math.max(v, low), high);
  for (const pair of PAIRS) {
    const set = (x) => { cursor[pair.id] = x; readPair(pair); };
    for (const part of PARTS) {
      follow(el(`${pair.id}-${part}`), (px) => within(pair[part].vx(px), pair.x), set, ([dx, dy], times) =>
        within((cursor[pair.id] ?? 0) + 0.05 * times * (dx + dy), pair.x));
    }
  }
  const set = (at) => { cursor.heat = at; readPlane(); };
  const inside = (v) => within(v, [-heat.reach, heat.reach]);
  follow(el("heat-over"), (px, py) => [inside(heat.f.vx(px)), inside(heat.f.vy(py))], set, ([dx, dy], times) => {
    const [g, u] = cursor.heat ?? [0, 0];
    return [inside(g + 0.05 * times * dx), inside(u + 0.05 * times * dy)];
  });
}

function update(change = {}) {
  state = { ...state, ...change };
  showControls();
  drawOne();
  const [activation, family, fan] = PAIRS;
  drawPair(activation);
  drawPair(family);
  if (state.fan !== undefined) drawPair(fan);
  drawTable([...activation.drawn, ...family.drawn]);
  writeState();
}

buildControls();
buildPairs();
state = readState();
update();
followAll();
addEventListener("hashchange", () => { state = readState(); update(); });
addEventListener("resize", () => { if (document.body.clientWidth) update(); });
darkScheme.addEventListener("change", () => update());
