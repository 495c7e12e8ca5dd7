"""The layer's gradients on the CPU: matrix products, and one pass of gating between them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gatedffn.errors import BackendError
from gatedffn.ops import choice
from gatedffn.ops.feed_forward.call import Call, Key, gate, key_of, project
from gatedffn.ops.feed_forward.cpu import BACKENDS, unlikely, without_onednn
from gatedffn.ops.feed_forward.products import ADDS_WIDER, PRODUCTS, Product
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.gating import cpu as gating
from gatedffn.ops.gating import reference as gating_reference
from gatedffn.ops.scratch import matrices


def backward(
    call: Call,
    grad: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    wanted: Sequence[str],
    tile: int,
    backend: str = "auto",
) -> list[Tensor]:
    """The gradients that are wanted, in that order: "x", a field of `Weights`, or a parameter.

    `saved` are gate and up in the order of the operator, or None: then they are computed again.
    `tile` is how many tokens are worked on at a time, 0 for all. What is saved is only read.
    """
    chosen = chosen_backward(call, grad, saved, wanted, tile, backend)
    found = _backward(PRODUCTS[chosen], call, grad, saved, frozenset(wanted), tile)
    return [found[name] for name in wanted]


def chosen_backward(
    call: Call,
    grad: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    wanted: Sequence[str],
    tile: int,
    backend: str,
) -> str:
    """Whose products backward takes: those that were asked for by name, or those chosen."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"backend is {backend!r}: it must be one of auto, {', '.join(BACKENDS)}")
    if backend in PRODUCTS:
        reason = impossible(call).get(backend)
        if reason is not None:
            raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        return backend
    if not call.tokens:
        return "torch"

    def ways() -> choice.Ways:
        reasons = {**impossible(call), **unlikely(call)}
        return {
            name: partial(_backward, product, call, grad, saved, frozenset(wanted), tile)
            for name, product in PRODUCTS.items()
            if name not in reasons
        }

    return choice.choose(backward_key(call, saved[0] is not None, wanted, tile), ways)


def impossible(call: Call) -> dict[str, str]:
    """The products that cannot make a call's gradients, and why."""
    own = {} if call.no_kernels is None else {"blocks": call.no_kernels}
    return own | without_onednn(call)


def backward_key(call: Call, saved: bool, wanted: Sequence[str], tile: int) -> Key:
    """The key of a choice of the backward."""
    of_tile = f", {tile} tokens at a time" if tile else ""
    return key_of(call, saved, f"backward to {' '.join(wanted)}{of_tile}")


def _backward(
    product: Product,
    call: Call,
    grad: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    wanted: frozenset[str],
    tile: int,
) -> dict[str, Tensor]:
    """Tiles of tokens, and in each some hidden units at a time, so that little is held at once."""
    x, d_hidden, tokens = call.x, call.d_hidden, call.tokens
    size = tile if 0 < 2 * tile <= tokens else tokens
    again = 0 if saved[0] is not None else 1 if call.weights.linear is None else 2
    count = 3 + again
    width = d_hidden
    if call.described is not None:
        width = _units_at_once(count * size * x.element_size(), d_hidden)
    sums = _Sums(call, wanted, exact=size >= tokens)
    for start in range(0, tokens, max(size, 1)):
        rows = slice(start, min(start + size, tokens))
        for first in range(0, d_hidden if wanted - {"down_bias"} else 0, width):
            units = slice(first, min(first + width, d_hidden))
            memory = matrices(count, size, width, x)
            places = list(memory[:, : rows.stop - start, : units.stop - first])
            _part(product, call, grad, saved, sums, rows, units, places)
        if "down_bias" in wanted:
            sums.column_sums("down_bias", slice(None), grad[rows])
    return sums.finished()


def _part(
    product: Product,
    call: Call,
    grad: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    sums: "_Sums",
    rows: slice,
    units: slice,
    places: list[Tensor],
) -> None:
    """Adds to the sums what some tokens and some hidden units contribute."""
    part, wanted = call.units(units), sums.wanted
    w = part.weights
    x, grad = call.x[rows], grad[rows]
    a, b = (None if t is None else t[rows, units] for t in saved)
    if a is None:
        a = places.pop()
        project(product, x, w.activated, w.activated_bias, a)
        if w.linear is not None:
            b = places.pop()
            project(product, x, w.linear, w.linear_bias, b)
    d_activated, d_linear, spare = places
    hidden = spare if "down" in wanted else None
    if sums.beyond_down:
        d_hidden = grad[:, units]
        if w.down is not None:
            # Where d_activated will be, which is made of it element by element.
            d_hidden = product(grad, w.down, d_activated, False)
        _gate_backward(part, sums, units, d_hidden, (a, b), d_activated, d_linear, hidden)
    elif hidden is not None:
        gate(part, a, b, hidden)
    if hidden is not None:
        sums.product("down", (slice(None), units), product, grad.t(), hidden)
    for name, d, weight in (
        ("activated", d_activated, w.activated),
        ("linear", d_linear, w.linear),
    ):
        if weight is None:
            continue
        if name in wanted:
            sums.product(name, (units,), product, d.t(), x)
        if f"{name}_bias" in wanted:
            sums.column_sums(f"{name}_bias", units, d)
        if "x" in wanted:
            product(d, weight, sums.x[rows], sums.x_begun(rows))


AT_ONCE = 8 << 20  # bytes of scratch memory that hidden values take at once, if they can
PARTS = 4  # at most: seven need a tenth less memory in a step, and 2 to 5% more of its time


def _units_at_once(bytes_of_unit: int, d_hidden: int) -> int:
    """As many hidden units as fit into AT_ONCE, or as many as make no more than PARTS."""
    width = max(AT_ONCE // max(bytes_of_unit, 1), -(-d_hidden // PARTS))
    return min(d_hidden, -(-width // 32) * 32)


def _gate_backward(
    call: Call,
    sums: "_Sums",
    units: slice,
    grad: Tensor,
    branches: tuple[Tensor, Tensor | None],
    d_activated: Tensor,
    d_linear: Tensor,
    hidden: Tensor | None,
) -> None:
    """One pass: both branches' gradients, the hidden values, and the parameters' gradients."""
    activated, linear = branches
    if call.described is not None:
        if not grad.numel():
            return
        found = gating.run_backward(
            call.described,
            gating.rows(grad),
            activated,
            linear,
            d_activated,
            None if linear is None else d_linear,
            hidden,
            sums.learned,
        )
        for name, part in found.items():
            sums.parameters[name][units] += part
        return
    if hidden is not None:
        gate(call, activated, linear, hidden)
    names = ["activated", *(["linear"] if linear is not None else []), *sums.learned]
    made = gating_reference.gating_backward(
        grad, activated, linear, call.variant, call.parameters, names
    )
    by_name = dict(zip(names, made, strict=True))
    d_activated.copy_(by_name["activated"])
    if linear is not None:
        d_linear.copy_(by_name["linear"])
    for name in sums.learned:
        sums.parameters[name] += by_name[name].double()


class _Sums:
    """The gradients as they are added up: those of the weights and biases over tiles of tokens,
    in float32 unless there is a single tile; those of the parameters in float64.
    """

    def __init__(self, call: Call, wanted: frozenset[str], exact: bool) -> None:
        self._call, self.wanted, self._exact = call, wanted, exact
        self.learned = [name for name in call.parameters if name in wanted]
        self.beyond_down = bool(wanted - {"down", "down_bias"})
        self.x = call.x.new_empty(call.x.shape if "x" in wanted else 0)
        self._x_end = 0
        self._made: dict[str, Tensor] = {}
        kernel = call.described is not None
        self.parameters = {}
        for name in self.learned:
            value = call.parameters[name]
            assert isinstance(value, Tensor)
            shape = (call.d_hidden,) if kernel else value.shape
            self.parameters[name] = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def x_begun(self, rows: slice) -> bool:
        """Whether these tokens' gradient holds something already; from now on it does."""
        begun: bool = rows.stop <= self._x_end
        self._x_end = max(self._x_end, rows.stop)
        return begun

    def _place(self, name: str) -> Tensor:
        if name not in self._made:
            like: Tensor = getattr(self._call.weights, name)
            wide = like.dtype if self._exact or like.dtype == torch.float64 else torch.float32
            written = self._exact and self._call.tokens and not name.endswith("_bias")
            self._made[name] = (torch.empty if written else torch.zeros)(
                like.shape, dtype=wide, device="cpu"
            )
        return self._made[name]

    def product(
        self, name: str, part: tuple[slice, ...], product: Product, a: Tensor, b: Tensor
    ) -> None:
        """Adds `a @ b` to a part of a weight's gradient."""
        place = self._place(name)[part]
        if self._exact:
            product(a, b, place, False)
        elif place.dtype == a.dtype or product in ADDS_WIDER:
            product(a, b, place, True)
        else:
            place += product(a, b, None, False)

    def column_sums(self, name: str, part: slice, rows: Tensor) -> None:
        """Adds the sums over the tokens to a part of a bias's gradient."""
        place = self._place(name)[part]
        place += rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(place.dtype)

    def finished(self) -> dict[str, Tensor]:
        """Every gradient that was wanted, in the dtype of what it belongs to."""
        found = {"x": self.x} if "x" in self.wanted else {}
        for name in self.wanted & set(Weights._fields):
            found[name] = self._place(name).to(getattr(self._call.weights, name).dtype)
        for name, sums in self.parameters.items():
            found[name] = gating.parameter_gradient(sums, self._call.parameters[name])
        return found
