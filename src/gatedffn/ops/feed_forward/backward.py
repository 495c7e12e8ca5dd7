"""The layer's gradients: matrix products, and one pass of gating between them."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from gatedffn.errors import BackendError
from gatedffn.ops import choice, kernels
from gatedffn.ops.feed_forward.call import CPU, Call, Key, apply_gating, key_of, project, some
from gatedffn.ops.feed_forward.cpu.ways import layer_threads, without_onednn
from gatedffn.ops.feed_forward.engine import BACKENDS, ways_of
from gatedffn.ops.feed_forward.products import PRODUCTS, Product, by_blocks, by_torch
from gatedffn.ops.feed_forward.sums import Sums
from gatedffn.ops.gating import cpu as gating
from gatedffn.ops.gating import reference as gating_reference
from gatedffn.ops.scratch import scratch


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
    found = _backward(chosen, call, grad, saved, frozenset(wanted), tile)
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
    if backend in names(call):
        reason = impossible(call).get(backend)
        if reason is not None:
            raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        return backend
    if not call.tokens:
        return "torch"

    def ways() -> choice.Ways:
        reasons = {**impossible(call), **unlikely(call)}
        able = [name for name in names(call) if name not in reasons]
        return {
            name: partial(_backward, name, call, grad, saved, frozenset(wanted), tile)
            for name in ways_of(call).by_rule(able, call)
        }

    finish = call.device.finish(call.x.device)
    return choice.choose(backward_key(call, saved[0] is not None, wanted, tile), ways, finish)


def names(call: Call) -> tuple[str, ...]:
    """What backward can be made of on a call's device."""
    return tuple(PRODUCTS) if call.device is CPU else ("torch", "fused")


def impossible(call: Call) -> dict[str, str]:
    """What cannot make a call's gradients, and why."""
    if call.device is CPU:
        own = {} if call.no_kernels is None else {"blocks": call.no_kernels}
        return own | without_onednn(call)
    return {} if call.no_layer_kernels is None else {"fused": call.no_layer_kernels}


def unlikely(call: Call) -> dict[str, str]:
    """What is not worth a measurement, and why."""
    reasons = ways_of(call).unlikely(call)
    if call.weights.down is None and call.device is not CPU:
        reasons["fused"] = "without a product with W_down there is none for the gate to end"
    return reasons


def backward_key(call: Call, saved: bool, wanted: Sequence[str], tile: int) -> Key:
    """The key of a choice of the backward."""
    of_tile = f", {tile} tokens at a time" if tile else ""
    return key_of(call, saved, f"backward to {' '.join(wanted)}{of_tile}")


def _backward(
    source: str,
    call: Call,
    grad: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    wanted: frozenset[str],
    tile: int,
) -> dict[str, Tensor]:
    """Tiles of tokens, and in each some hidden units at a time, so that little is held at once."""
    x, d_hidden, tokens = call.x, call.d_hidden, call.tokens
    size = tile if 0 < 2 * tile <= tokens else tokens
    again = 0 if saved[0] is not None else 1 if call.weights.up is None else 2
    count = 3 + again
    width = d_hidden
    if call.described is not None:
        width = _units_at_once(AT_ONCE[call.device.name], count * size * x.element_size(), d_hidden)
    sums = Sums(call, wanted, exact=size >= tokens)
    end = d_hidden if wanted - {"down_bias"} else 0
    memory = call.device.places(count, size if end else 0, width, x)
    for start in range(0, tokens, max(size, 1)):
        rows = slice(start, min(start + size, tokens))
        for first in range(0, end, width):
            units = slice(first, min(first + width, d_hidden))
            here, there = slice(0, rows.stop - start), slice(0, units.stop - first)
            places = [some(place, here, there) for place in memory.unbind()]
            _part(source, call, grad, saved, sums, rows, units, places)
        if "down_bias" in wanted:
            sums.column_sums("down_bias", slice(None), some(grad, rows))
    return sums.finished()


def _part(
    source: str,
    call: Call,
    grad: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    sums: Sums,
    rows: slice,
    units: slice,
    places: list[Tensor],
) -> None:
    """Adds to the sums what some tokens and some hidden units contribute."""
    part, wanted, product = call.units(units), sums.wanted, PRODUCTS.get(source, by_torch)
    x, grad = some(call.x, rows), some(grad, rows)
    a, b = (None if t is None else some(t, rows, units) for t in saved)
    if a is None:
        w = part.weights
        a = places.pop()
        project(product, x, w.gate, w.gate_bias, a)
        if w.up is not None:
            b = places.pop()
            project(product, x, w.up, w.up_bias, b)
    d_gate, d_up, spare = places
    hidden = spare if "down" in wanted else None
    given = part, x, grad, (a, b), sums, rows, units, (d_gate, d_up, hidden)
    whole = sums.beyond_down and part.no_layer_kernels is None
    if whole and product is by_blocks:
        _by_blocks(*given)
    else:
        fused = source == "fused" and whole and part.weights.down is not None
        _by_products(product, fused, *given)
    for name, d in (("gate_bias", d_gate), ("up_bias", d_up)):
        if name in wanted:
            sums.column_sums(name, units, d)


Places = tuple[Tensor, Tensor, Tensor | None]  # for d_gate, d_up and the hidden values


def _by_products(
    product: Product,
    fused: bool,
    part: Call,
    x: Tensor,
    grad: Tensor,
    branches: tuple[Tensor, Tensor | None],
    sums: Sums,
    rows: slice,
    units: slice,
    places: Places,
) -> None:
    """One product after the other, with the gate between them, or at the end of the first."""
    w, wanted = part.weights, sums.wanted
    d_gate, d_up, hidden = places
    if fused:
        _gate_at_the_end(part, grad, branches, sums, units, places)
    elif sums.beyond_down:
        d_hidden = grad if w.down is not None else some(grad, slice(0, len(grad)), units)
        if w.down is not None:
            # Where d_gate will be, which is made of it element by element.
            d_hidden = product(grad, w.down, d_gate, False)
        _gate_backward(part, sums, units, d_hidden, branches, d_gate, d_up, hidden)
    elif hidden is not None:
        apply_gating(part, *branches, hidden)
    if hidden is not None:
        sums.product("down", units, product, grad.t(), hidden)
    for name, d, weight in (
        ("gate", d_gate, w.gate),
        ("up", d_up, w.up),
    ):
        if weight is None:
            continue
        if name in wanted:
            sums.product(name, units, product, d.t(), x)
        if "x" in wanted:
            product(d, weight, some(sums.x, rows), sums.x_begun(rows))


def _by_blocks(
    part: Call,
    x: Tensor,
    grad: Tensor,
    branches: tuple[Tensor, Tensor | None],
    sums: Sums,
    rows: slice,
    units: slice,
    places: Places,
    level: str | None = None,
) -> None:
    """The same in one call of own code; see cpu/blocks.h."""
    w, wanted, described = part.weights, sums.wanted, part.described
    assert described is not None
    sizes = x.shape[0], part.d_model, part.d_hidden, part.d_out
    threads = layer_threads(part)
    memory = scratch(kernels.blocks_scratch(level, x.dtype, *sizes, threads), "blocks")
    weights = {name: sums.part(name, units) for name in ("gate", "up", "down") if name in wanted}
    d_value = grad if w.down is not None else some(grad, slice(0, len(grad)), units)
    learned = gating.sums_of(sums.learned, threads, part.d_hidden)
    kernels.library(level).gatedffn_blocks_backward(
        kernels.DTYPES[x.dtype],
        described.pointer,
        *kernels.matrix(x),
        *part.projections,
        *kernels.matrix(gating.rows(d_value)),
        *kernels.matrix(branches[0]),
        *kernels.matrix(branches[1]),
        *kernels.matrix(places[0]),
        *kernels.matrix(places[1] if w.up is not None else None),
        *kernels.matrix(places[2]),
        *kernels.matrix(some(sums.x, rows) if "x" in wanted else None),
        *kernels.matrix(weights.get("gate")),
        *kernels.matrix(weights.get("up")),
        *kernels.matrix(weights.get("down")),
        *gating.addresses(described, learned),
        "x" in wanted and sums.x_begun(rows),
        not sums.exact,
        not sums.exact,
        *sizes,
        memory.data_ptr(),
        threads,
    )
    for name, of_threads in learned.items():
        sums.parameters[name][units] += of_threads.sum(0)


# Bytes that hidden values take at once, if they can.
AT_ONCE = {"cpu": 8 << 20, "gpu": 256 << 20}
PARTS = 4  # at most: seven need a tenth less memory in a step, and 2 to 5% more of its time


def _units_at_once(at_once: int, bytes_of_unit: int, d_hidden: int) -> int:
    """As many hidden units as fit into so many bytes, or as many as make no more than PARTS."""
    width = max(at_once // max(bytes_of_unit, 1), -(-d_hidden // PARTS))
    return min(d_hidden, -(-width // 32) * 32)


def _gate_at_the_end(
    part: Call,
    grad: Tensor,
    branches: tuple[Tensor, Tensor | None],
    sums: Sums,
    units: slice,
    places: Places,
) -> None:
    """The product with W_down, which ends with the gate's gradients: a GPU's kernel."""
    from gatedffn.ops.feed_forward.gpu.fused_backward import gate_backward

    gate, up = branches
    d_gate, d_up, hidden = places
    assert part.weights.down is not None
    found = gate_backward(
        grad,
        part.weights.down,
        gate,
        up,
        part.variant,
        part.parameters,
        d_gate,
        None if up is None else d_up,
        hidden,
        sums.learned,
    )
    for name, of_units in found.items():
        sums.parameters[name][units] += of_units


def _gate_backward(
    call: Call,
    sums: Sums,
    units: slice,
    grad: Tensor,
    branches: tuple[Tensor, Tensor | None],
    d_gate: Tensor,
    d_up: Tensor,
    hidden: Tensor | None,
) -> None:
    """One pass: both branches' gradients, the hidden values, and the parameters' gradients."""
    gate, up = branches
    if call.described is not None:
        if not grad.numel():
            return
        found = call.device.gating.run_backward(
            call.described,
            gating.rows(grad),
            gate,
            up,
            d_gate,
            None if up is None else d_up,
            hidden,
            sums.learned,
        )
        for name, part in found.items():
            sums.parameters[name][units] += part
        return
    if hidden is not None:
        apply_gating(call, gate, up, hidden)
    names = ["gate", *(["up"] if up is not None else []), *sums.learned]
    made = gating_reference.gating_backward(grad, gate, up, call.variant, call.parameters, names)
    by_name = dict(zip(names, made, strict=True))
    d_gate.copy_(by_name["gate"])
    if up is not None:
        d_up.copy_(by_name["up"])
    for name in sums.learned:
        sums.parameters[name] += by_name[name].double()
