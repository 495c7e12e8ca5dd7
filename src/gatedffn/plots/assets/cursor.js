"use strict";
// A place on a drawing: it follows the mouse, stays where it was clicked or tapped, and moves by the
// arrow keys. Escape takes it away.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

// `toPlace` is the place of a pixel, `step` the place after an arrow; `set` gets it, or null.
function follow(node, toPlace, set, step) {
  let stays = false;
  const go = (event) => {
    const box = node.getBoundingClientRect();
    set(toPlace(event.clientX - box.left, event.clientY - box.top));
  };
  node.addEventListener("pointerdown", (event) => { stays = true; go(event); });
  node.addEventListener("pointermove", go);
  // A finger leaves as soon as it is lifted.
  node.addEventListener("pointerleave", () => { if (!stays) set(null); });
  node.addEventListener("keydown", (event) => {
    const way = ARROWS[event.key];
    if (!way && event.key !== "Escape") return;
    event.preventDefault();
    stays = Boolean(way);
    set(way ? step(way, event.shiftKey ? 10 : 1) : null);
  });
}
