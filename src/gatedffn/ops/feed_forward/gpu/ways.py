"""The layer on a GPU: the ways to compute it.

    few     up to 16 tokens: every weight is read once, at the rate of the memory
    torch   the vendor's products, and gating as one kernel between them
    fused   gate and up as one kernel, which ends with the gate; the vendor's product for the rest

Each takes all variants; backward.py has the gradients. Kernels are imported where they are taken:
`torch` needs none of Triton's for float64.
"""

from functools import partial

from gatedffn.ops.feed_forward.call import Call, project, some
from gatedffn.ops.feed_forward.products import by_torch
from gatedffn.ops.feed_forward.ways import Saved, Way, Ways, tiled

TILE = 256 << 20  # bytes of gate and up, or of hidden values, that are worked on at a time


def impossible(call: Call, save: bool) -> dict[str, str]:
    """The ways that cannot compute a call, and why."""
    own = call.no_layer_kernels if call.tokens else "there are no tokens"
    if own is not None:
        return {"few": own, "fused": own}
    from gatedffn.ops.feed_forward.gpu import few, fused

    w = call.weights
    reasons = {
        "few": few.why_not(call.x, w, call.parameters),
        "fused": fused.why_not(call.x, w.gate, w.up, call.parameters),
    }
    if save:
        reasons["few"] = reasons["few"] or "it does not save gate and up"
    return {name: reason for name, reason in reasons.items() if reason is not None}


def unlikely(_: Call) -> dict[str, str]:
    """None is: what is fastest is for a measurement to say."""
    return {}


def _few(call: Call, save: bool) -> Saved:
    from gatedffn.ops.feed_forward.gpu import few

    assert not save
    made, y = call.output()
    few.feed_forward(call.x, call.weights, call.variant, call.parameters, y)
    return made, None, None


def _fused(call: Call, save: bool) -> Saved:
    from gatedffn.ops.feed_forward.gpu import fused

    x, w, tokens, d_hidden = call.x, call.weights, call.tokens, call.d_hidden
    made, y = call.output()
    gate = x.new_empty(tokens, d_hidden) if save else None
    up = x.new_empty(tokens, d_hidden) if save and w.up is not None else None
    most = max(1, TILE // (d_hidden * x.element_size()))
    size = -(-tokens // -(-tokens // most))  # tiles of about the same size
    place = y if w.down is None else x.new_empty(size, d_hidden)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        hidden = some(place, rows if w.down is None else slice(0, rows.stop - start))
        fused.hidden_values(
            some(x, rows),
            w.gate,
            w.gate_bias,
            w.up,
            w.up_bias,
            call.variant,
            call.parameters,
            hidden,
            None if gate is None else some(gate, rows),
            None if up is None else some(up, rows),
        )
        if w.down is not None:
            project(by_torch, hidden, w.down, w.down_bias, some(y, rows))
    return made, gate, up


_WAYS: dict[str, Way] = {
    "few": _few,
    "torch": partial(tiled, TILE, by_torch),
    "fused": _fused,
}
WAYS = Ways(_WAYS, impossible, unlikely)
"""The ways of a GPU by the names that choices, `explain` and `backend=` use."""
