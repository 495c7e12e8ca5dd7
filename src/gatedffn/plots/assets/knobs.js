"use strict";
// A slider for every parameter of the table; rows that share one move together.

const ROWS = JSON.parse(document.getElementById("rows").textContent);
const BY_NAME = Object.fromEntries(ROWS.map((row) => [row.name, row]));
const KNOBS = JSON.parse(document.getElementById("knobs").textContent);
const knobOf = (row, name) => KNOBS.find((knob) => knob.name === name && knob.rows.includes(row.name));

// What sliders say of a row's parameters, by name; one that was not moved says nothing.
const givenTo = (row, moved) =>
  Object.fromEntries(row.parameters.map(({ name }) => [name, moved[knobOf(row, name).key]]));

const idOf = (knob) => `knob-${knob.key.replace(":", "-")}`;
const ownOf = (knob) => BY_NAME[knob.rows[0]].parameters.find((p) => p.name === knob.name).default;

// `move` gets the key of a slider and its value; null is each row's own.
function buildKnobs(into, move) {
  for (const knob of KNOBS) {
    const { low, high } = knob;
    const input = html("input", { type: "range", id: idOf(knob), min: low, max: high, step: (high - low) / 200 });
    const own = html("button", { type: "button", title: "Each variant its own value again" }, "Reset");
    input.addEventListener("input", () => move(knob.key, Number(input.value)));
    own.addEventListener("click", () => move(knob.key, null));
    const label = html("label", { for: input.id, title: knob.meaning }, html("b", {}, knob.name), html("span", { class: "whose" }));
    into.append(html("div", { class: "knob" }, label, html("output", { for: input.id }), input, own));
  }
}

// Shows the sliders of these rows, with the values they stand at.
function showKnobs(into, rows, moved) {
  KNOBS.forEach((knob, i) => {
    const node = into.children[i];
    const whose = rows.filter((row) => knob.rows.includes(row.name));
    node.hidden = whose.length === 0;
    node.querySelector(".whose").textContent = ` of ${whose.map((row) => row.label).join(", ")}`;
    const value = moved[knob.key];
    const input = node.querySelector("input");
    const owns = [...new Set(whose.map((row) => short(parametersOf(row)[knob.name])))];
    input.value = value ?? ownOf(knob);
    const words = value === undefined ? `own: ${owns.join(", ")}` : short(Number(value.toPrecision(4)));
    node.querySelector("output").textContent = words;
    input.setAttribute("aria-valuetext", words);
    node.querySelector("button").disabled = value === undefined;
  });
}
