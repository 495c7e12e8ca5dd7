"""The ways to compute the layer on one kind of device, and which of them is taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_layer

from gatedffn.errors import BackendError
from gatedffn.ops import choice
from gatedffn.ops.feed_forward.call import Call, apply_gating, key_of, project, some
from gatedffn.ops.feed_forward.products import Product, by_torch

# The output, and gate and up as they are saved; None where they are not.
Saved = tuple[Tensor, Tensor | None, Tensor | None]
Way = Callable[[Call, bool], Saved]


def in_order(names: list[str], _: Call) -> list[str]:
    """The order of a table, as it is."""
    return names


@dataclass(frozen=True, slots=True)
class Ways:
    """All ways of a kind of device by name, those that compute anything among them.

    Args:
        ways: the first that can compute a call is the rule's, unless `by_rule` has another order.
        impossible: those that cannot compute a call, and why.
        unlikely: those that are not worth a measurement, and why.
    """

    ways: Mapping[str, Way]
    impossible: Callable[[Call, bool], dict[str, str]]
    unlikely: Callable[[Call], dict[str, str]]
    by_rule: Callable[[list[str], Call], list[str]] = in_order

    def forward(self, call: Call, save: bool, backend: str = "auto") -> Saved:
        """The output, and gate and up where they are to be saved."""
        if backend == "auto":
            backend = self.chosen(call, save) if call.tokens else "torch"
        else:
            reason = self.why_not(call, save, backend)
            if reason is not None:
                raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        return self.ways[backend](call, save)

    def why_not(self, call: Call, save: bool, backend: str) -> str | None:
        """Why a way cannot compute a call; None when it can."""
        if backend not in self.ways:
            return f"it does not run on {call.x.device.type}"
        return self.impossible(call, save).get(backend)

    def chosen(self, call: Call, save: bool) -> str:
        """The way that is chosen for a call with tokens."""
        key = key_of(call, save, "forward")
        finish = call.device.finish(call.x.device)
        return choice.choose(key, lambda: self.among(call, save), finish)

    def among(self, call: Call, save: bool) -> dict[str, Callable[[], object]]:
        """The ways that a choice is made among; the first is the one taken by rule."""
        reasons = {**self.impossible(call, save), **self.unlikely(call)}
        names = self.by_rule([name for name in self.ways if name not in reasons], call)
        return {name: partial(self.ways[name], call, save) for name in names}


FRESH = 8 << 20  # bytes of three matrices of hidden values, up to which their memory may be fresh


def is_small(call: Call) -> bool:
    """Whether Python between the products costs more than fresh memory for what they make."""
    return 0 < 3 * call.tokens * call.d_hidden * call.x.element_size() <= FRESH


def down_of(call: Call, hidden: Tensor) -> Tensor:
    """The product with W_down, in no view: whoever gets an output may change it in place."""
    w = call.weights
    assert w.down is not None
    if len(call.shape) == 2:
        return linear_layer(hidden, w.down, w.down_bias)
    made, y = call.output()
    project(by_torch, hidden, w.down, w.down_bias, y)
    return made


def _by_linear(call: Call, save: bool) -> Saved:
    """By PyTorch's linear layers: a third of the calls from Python."""
    w, x = call.weights, call.x
    gate = linear_layer(x, w.gate, w.gate_bias)
    up = None if w.up is None else linear_layer(x, w.up, w.up_bias)
    if w.down is None:
        made, y = call.output()
        apply_gating(call, gate, up, y)
    else:
        hidden = torch.empty_like(gate) if save else gate
        apply_gating(call, gate, up, hidden)
        made = down_of(call, hidden)
    return (made, gate, up) if save else (made, None, None)


def tiled(tile: int, product: Product, call: Call, save: bool) -> Saved:
    """Products by a library, a tile of tokens at a time; what is not saved is in reused memory.

    `tile` is how many bytes of gate and up are worked on at a time.
    """
    x, w, tokens = call.x, call.weights, call.tokens
    most = tile // (2 * call.d_hidden * x.element_size())
    # A linear layer would cast under autocast, which an operator does not.
    as_it_is = not torch.is_autocast_enabled(x.device.type)
    if product is by_torch and tokens <= most and is_small(call) and as_it_is:
        return _by_linear(call, save)
    made, y = call.output()
    gate = x.new_empty(tokens, call.d_hidden) if save else None
    up = x.new_empty(tokens, call.d_hidden) if save and w.up is not None else None
    size = -(-tokens // max(1, -(-tokens // max(most, 1))))  # tiles of about the same size
    # Saved, gate and up have places of their own, and the hidden values have this one.
    places = call.device.places(1 if save else 2, size, call.d_hidden, x).unbind()
    for start in range(0, tokens, max(size, 1)):
        rows = slice(start, min(start + size, tokens))
        here = slice(0, rows.stop - rows.start)
        tokens_x, out = some(x, rows), some(y, rows)
        a = some(places[0], here) if gate is None else some(gate, rows)
        project(product, tokens_x, w.gate, w.gate_bias, a)
        b = None
        if w.up is not None:
            b = some(places[-1], here) if up is None else some(up, rows)
            project(product, tokens_x, w.up, w.up_bias, b)
        hidden = out if w.down is None else some(places[0], here)
        apply_gating(call, a, b, hidden)
        if w.down is not None:
            project(product, hidden, w.down, w.down_bias, out)
    return made, gate, up
