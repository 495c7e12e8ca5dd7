"""What would be taken for a call, decided as a call decides it: for `explain`."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from gatedffn.ops import choice
from gatedffn.ops.feed_forward import backward
from gatedffn.ops.feed_forward.call import Call, key_of
from gatedffn.ops.feed_forward.engine import ways_of


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
    decisions, ways = [], ways_of(call)
    for saving in (False, save):
        against = {**ways.unlikely(call), **ways.impossible(call, saving)}
        if backend == "auto":
            key = key_of(call, saving, "forward")
            decisions.append(_decision(ways.chosen(call, saving), key, against))
        elif (reason := ways.why_not(call, saving, backend)) is not None:
            decisions.append(Decision("an error", reason, {}, against))
        else:
            decisions.append(Decision(backend, "it was asked for", {}, against))
    _, *saved = ways.forward(call, save, backend if decisions[1].chosen == backend else "auto")
    grad = call.x.new_ones(call.tokens, call.d_out)
    chosen = backward.chosen_backward(call, grad, (saved[0], saved[1]), wanted, tile, backend)
    key = backward.backward_key(call, saved[0] is not None, wanted, tile)
    reasons, names = {**backward.unlikely(call), **backward.impossible(call)}, backward.names(call)
    against = {name: reason for name, reason in reasons.items() if name in names}
    if backend in names:
        return [*decisions, Decision(chosen, "it was asked for", {}, against)]
    return [*decisions, _decision(chosen, key, against)]


def _decision(chosen: str, key: Hashable, against: Mapping[str, str]) -> Decision:
    made = choice.known(key)
    if made is None or not choice.tuning():
        return Decision(chosen, "the rule without measuring", {}, against)
    return Decision(chosen, made.reason, made.milliseconds, against)
