"use strict";
// State, controls and readouts. The state lives in the address after #, so a view can be kept.

const ROWS = JSON.parse(document.getElementById("rows").textContent);
const BY_NAME = Object.fromEntries(ROWS.map((row) => [row.name, row]));
const DEFAULTS = JSON.parse(document.getElementById("defaults").textContent);
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

const FAMILIES = [
  { id: "activation", gated: false, x: [-5, 5], most: { value: [-2, 5], derivative: [-0.6, 2] }, letter: "f" },
  { id: "family", gated: true, x: [-3, 3], most: { value: [-1, 6], derivative: [-2, 5] }, letter: "h" },
];

let state = null;
let heat = null;
const cursor = { activation: null, family: null, heat: null };

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const names = given.has("show") ? given.get("show").split(",") : DEFAULTS.show;
  const beta = given.has("beta") ? Number(given.get("beta")) : NaN;
  const surface = BY_NAME[given.get("surface")];
  return {
    show: new Set(names.filter((name) => name in BY_NAME)),
    beta: Number.isFinite(beta) ? Math.min(Math.max(beta, 0), 10) : null,
    surface: surface && surface.gated ? surface.name : DEFAULTS.surface,
  };
}

function writeState() {
  const parts = [`show=${[...state.show].join(",")}`, `surface=${state.surface}`];
  if (state.beta !== null) parts.push(`beta=${state.beta}`);
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
    const label = html("label", { for: box.id, title: row.formula }, box, swatch(row), row.label);
    el(row.gated ? "choose-gated" : "choose-ungated").append(label);
    if (row.gated) el("surface").append(html("option", { value: row.name }, row.label));
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
  el("beta").addEventListener("input", () => update({ beta: Number(el("beta").value) }));
  el("own-beta").addEventListener("click", () => update({ beta: null }));
  el("surface").addEventListener("change", () => update({ surface: el("surface").value }));
}

function showControls() {
  for (const row of ROWS) el(`show-${row.name}`).checked = state.show.has(row.name);
  el("surface").value = state.surface;
  el("beta").value = state.beta === null ? 1 : state.beta;
  const words = state.beta === null ? "each variant's own" : short(state.beta);
  el("beta-value").textContent = words;
  el("beta").setAttribute("aria-valuetext", words);
  el("own-beta").disabled = state.beta === null;
}

function shown(gated) {
  return ROWS.filter((row) => row.gated === gated && state.show.has(row.name)).map((row) => {
    const functions = functionsOf(row, state.beta);
    return { row, f: functions.along, phi: functions.phi, zeros: findZeros(functions.along) };
  });
}

const labelOf = (row) => {
  const values = Object.entries(parametersOf(row, state.beta));
  return [row.label, ...values.map(([name, value]) => `${name} = ${short(value)}`)].join(", ");
};

function drawFamily(family, curves) {
  const { id, x, letter } = family;
  const y = { value: letter === "f" ? "f(x)" : "h(x, x)", derivative: letter === "f" ? "df/dx" : "dh/dx" };
  for (const part of ["value", "derivative"]) {
    family[part] = drawChart(el(`${id}-${part}`), curves, {
      x,
      part,
      most: family.most[part],
      labels: { x: "x (dimensionless)", y: `${y[part]} (dimensionless)` },
      title: `${y[part]} of ${curves.map(({ row }) => row.label).join(", ") || "nothing: choose a variant"}`,
    });
  }
  family.curves = curves;
  el(`${id}-legend`).replaceChildren(
    ...curves.map(({ row }) => html("li", {}, swatch(row), html("span", { class: "name" }, labelOf(row)), html("span", { class: "read" }))),
  );
  readFamily(family);
}

function readFamily(family) {
  const at = cursor[family.id];
  for (const part of ["value", "derivative"]) {
    const line = el(`${family.id}-${part}`).querySelector(".cursor");
    line.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const name of ["x1", "x2"]) line.setAttribute(name, family[part].px(at));
  }
  el(`${family.id}-at`).textContent =
    at === null ? "Point at a plot, or focus it and use the arrow keys, to read values." : `At x = ${number(at, 3)}:`;
  [...el(`${family.id}-legend`).children].forEach((item, i) => {
    const { f } = family.curves[i];
    const d = family.letter === "f" ? "df/dx" : "dh/dx";
    item.querySelector(".read").textContent =
      at === null ? "" : `${family.letter} = ${number(f.value(at))}, ${d} = ${number(f.derivative(at))}`;
  });
}

function drawPlane() {
  const row = BY_NAME[state.surface];
  const functions = functionsOf(row, state.beta);
  const zeros = findZeros(functions.phi);
  heat = drawHeat(el("heat"), el("heat-over"), row, functions, zeros, darkScheme.matches);
  drawBar(el("heat-bar"), heat.largest, heat.shades);
  const facts = [
    ["hidden values", row.formula],
    ["source", row.source],
    ["drawn with", Object.entries(parametersOf(row, state.beta)).map(([n, v]) => `${n} = ${short(v)}`).join(", ") || "no parameters"],
    ...row.parameters.map((p) => [p.name, `${p.default} by default, ${p.learnable ? "learnable" : "fixed"}: ${p.meaning}`]),
    ["dh/dg = 0", `for every up: ${sentence(zeros, "g", "phi")}`],
    ...(heat.silent.length > 1 ? [["", `for every gate: u \u2264 ${number(heat.silent.at(-1))}`]] : []),
  ];
  el("facts").replaceChildren(...facts.flatMap(([term, words]) => [html("dt", {}, term), html("dd", {}, words)]));
  readPlane();
}

function readPlane() {
  const at = cursor.heat;
  const [v, h] = [el("heat-v"), el("heat-h")];
  for (const line of [v, h]) line.setAttribute("visibility", at === null ? "hidden" : "visible");
  if (at === null) {
    el("heat-at").textContent = "Point at the plane, or focus it and use the arrow keys, to read values.";
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
  const rows = curves.flatMap(({ row, phi, zeros }) => {
    const by = row.gated ? [sentence(findZeros(phi), "g", "phi"), sentence(zeros, "x", "h")] : [sentence(zeros, "x", "f"), "\u2013"];
    return [html("tr", {}, html("th", { scope: "row" }, swatch(row), labelOf(row)), ...by.map((words) => html("td", {}, words)))];
  });
  el("zeros").replaceChildren(...rows);
}

// Moves a cursor by pointer and by arrow keys; `move` gets a place in the SVG or a key's step.
function follow(node, toPlace, set, step) {
  node.addEventListener("pointermove", (event) => {
    const box = node.getBoundingClientRect();
    const view = node.viewBox.baseVal;
    set(toPlace(((event.clientX - box.left) * view.width) / box.width, ((event.clientY - box.top) * view.height) / box.height));
  });
  node.addEventListener("pointerleave", () => { if (document.activeElement !== node) set(null); });
  node.addEventListener("blur", () => set(null));
  node.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) return;
    event.preventDefault();
    set(step(way, event.shiftKey ? 10 : 1));
  });
}

function followAll() {
  for (const family of FAMILIES) {
    const [low, high] = family.x;
    const clamp = (x) => Math.min(Math.max(x, low), high);
    const set = (x) => { cursor[family.id] = x; readFamily(family); };
    for (const part of ["value", "derivative"]) {
      follow(el(`${family.id}-${part}`), (px) => clamp(family[part].vx(px)), set, ([dx, dy], times) =>
        clamp((cursor[family.id] ?? 0) + 0.05 * times * (dx + dy)));
    }
  }
  const set = (at) => { cursor.heat = at; readPlane(); };
  const clamp = (v) => Math.min(Math.max(v, -heat.reach), heat.reach);
  follow(el("heat-over"), (px, py) => [clamp(heat.f.vx(px)), clamp(heat.f.vy(py))], set, ([dx, dy], times) => {
    const [g, u] = cursor.heat ?? [0, 0];
    return [clamp(g + 0.05 * times * dx), clamp(u + 0.05 * times * dy)];
  });
}

function update(change = {}) {
  state = { ...state, ...change };
  showControls();
  const drawn = FAMILIES.map((family) => {
    const curves = shown(family.gated);
    drawFamily(family, curves);
    return curves;
  });
  drawTable(drawn.flat());
  drawPlane();
  writeState();
}

buildControls();
state = readState();
update();
followAll();
addEventListener("hashchange", () => { state = readState(); update(); });
darkScheme.addEventListener("change", drawPlane);
