"""What would be taken for a call, decided as a call decides it: for `explain`."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from gatedffn.ops import choice
from gatedffn.ops.feed_forward import backward
from gatedffn.ops.feed_forward.call import Call, key_of
from gatedffn.ops.feed_forward.cpu import forward, forward_ways, impossible, unlikely
from gatedffn.ops.feed_forward.products import PRODUCTS


@dataclass(frozen=True, slots=True)
class Decision:
    """The way that is taken and why, the milliseconds measured, and what is against others."""

    chosen: str
    reason: str
    milliseconds: Mapping[str, float]
    against: Mapping[str, str]


def decide(
    call: Call, wanted: Sequence[str], save: bool, tile: int, backend: str
) -> list[Decision]:
    """The decisions for inference, and for forward and backward to what is `wanted` in training."""
    decisions = []
    for saving in (False, save):
        key = key_of(call, saving, "forward")
        against = {**unlikely(call), **impossible(call, saving)}
        if backend == "auto":
            chosen = choice.choose(key, partial(forward_ways, call, saving))
            decisions.append(_decision(chosen, key, against))
        elif backend in impossible(call, saving):
            decisions.append(Decision("an error", against[backend], {}, against))
        else:
            decisions.append(Decision(backend, "it was asked for", {}, against))
    _, *saved = forward(call, save, backend if decisions[1].chosen == backend else "auto")
    grad = call.x.new_ones(call.tokens, call.d_out)
    chosen = backward.chosen_backward(call, grad, (saved[0], saved[1]), wanted, tile, backend)
    key = backward.backward_key(call, saved[0] is not None, wanted, tile)
    reasons = {**unlikely(call), **backward.impossible(call)}
    against = {name: reason for name, reason in reasons.items() if name in PRODUCTS}
    if backend in PRODUCTS:
        return [*decisions, Decision(chosen, "it was asked for", {}, against)]
    return [*decisions, _decision(chosen, key, against)]


def _decision(chosen: str, key: Hashable, against: Mapping[str, str]) -> Decision:
    made = choice.known(key)
    if made is None or not choice.tuning():
        return Decision(chosen, "the rule without measuring", {}, against)
    return Decision(chosen, made.reason, made.milliseconds, against)
