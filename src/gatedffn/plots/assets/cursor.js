"use strict";
// A place on a drawing: it follows the mouse, and comes back to where one last clicked, tapped or
// went by the arrow keys. Escape takes it away.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

// `toPlace` is the place of a pixel, `step` the place after an arrow; `set` gets it, or null.
function follow(node, toPlace, set, step) {
  let kept = null;
  const go = (event) => {
    const box = node.getBoundingClientRect();
    const place = toPlace(event.clientX - box.left, event.clientY - box.top);
    if (event.buttons) kept = place;
    set(place);
  };
  node.addEventListener("pointerdown", go);
  node.addEventListener("pointermove", go);
  // A finger leaves as soon as it is lifted.
  node.addEventListener("pointerleave", () => set(kept));
  node.addEventListener("keydown", (event) => {
    const way = ARROWS[event.key];
    if (!way && event.key !== "Escape") return;
    event.preventDefault();
    kept = way ? step(way, event.shiftKey ? 10 : 1) : null;
    set(kept);
  });
}
