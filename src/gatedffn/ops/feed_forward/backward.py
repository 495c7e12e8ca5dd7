"""The layer's gradients: matrix products, and one pass of gating between them.

A run takes the gradient of the output, what forward kept (nothing, or gate and up), the operands
and the parameters, and returns the gradients that the spec wants, in its order. What is kept is
only read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.activations import SCALARS
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward.forward import (
    Layer,
    gate_into,
    project,
    rows,
    some,
    whole_gating,
)
from gatedffn.ops.feed_forward.products import Product, by_torch, closed_up
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.gating import parameter_gradient
from gatedffn.ops.gating import reference as gating_reference
from gatedffn.ops.kernels import scratch
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Parameters, Spec, Tensors
from gatedffn.variants import VARIANTS

Results = dict[str, Tensor]
# Bytes that hidden values take at once, if they can.
AT_ONCE = {"cpu": 8 << 20, "gpu": 256 << 20}
# Parts of the tokens at most: what is added up one after the other is then as exact as by eager.
# At 16,384 tokens of (64, 176) in float32, over eager's error: 1.2 with 64 parts, 1.4 with 256, 2.3
# with 1,024, 9.6 with one token each.
TILES = 64
# Of the hidden units at most: seven need a tenth less memory in a step, and 2 to 5% more time.
PARTS = 4


class Wanted:
    """What a backward is asked for, in the layer's own words."""

    def __init__(self, spec: Spec) -> None:
        self.names = frozenset(spec.wanted)
        self.beyond_down = bool(self.names - {"down", "down_bias"})
        operands = ("x", *Weights._fields)
        self.learned = [name for name in spec.wanted if name not in operands]


# All at once: small layers


def linear(spec: Spec) -> Run:
    """By PyTorch's products into memory of their own, as the gradients of linear layers are."""
    layer, wanted = Layer(spec), Wanted(spec)
    formulas, forward = layer.formulas(), whole_gating(layer)
    backward = _whole_gating_backward(layer, wanted.learned)
    names, needs_hidden = spec.wanted, "down" in wanted.names
    hidden_shape, d_out, d_model = layer.hidden_shape, layer.d_out, layer.d_model
    flat_hidden = (layer.tokens, layer.d_hidden)

    def run(
        grad: Tensor, saved: Sequence[Tensor], tensors: Tensors, parameters: Parameters
    ) -> list[Tensor]:
        x, gate_weight, up_weight, down, gate_bias, up_bias, _ = tensors
        assert x is not None
        assert gate_weight is not None
        formula, made = formulas(parameters), {}
        x, grad = closed_up(x), closed_up(grad)
        if saved:
            gate, up = _dense(saved[0]), _dense(saved[1]) if len(saved) > 1 else None
        else:
            gate = F.linear(x, gate_weight, gate_bias)
            up = None if up_weight is None else F.linear(x, up_weight, up_bias)
        flat_x, flat_grad = rows(x), grad if grad.dim() == 2 else grad.reshape(-1, d_out)
        hidden = gate.new_empty(hidden_shape) if needs_hidden else None
        if wanted.beyond_down:
            d_hidden = _dense(flat_grad).clone() if down is None else torch.mm(flat_grad, down)
            # Each element is read before it is written, so that it becomes that of the gate.
            d_gate, d_up = d_hidden, None if up is None else torch.empty_like(d_hidden)
            sums = backward(formula, d_hidden, gate, up, d_gate, d_up, hidden)
            for name, of_units in sums.items():
                made[name] = parameter_gradient(of_units, parameters[name])
        elif hidden is not None:
            forward(formula, gate, up, hidden)
        for name in names:
            if name == "x":
                d_x = torch.mm(d_gate, gate_weight)
                if d_up is not None:
                    d_x.addmm_(d_up, up_weight)  # type: ignore[arg-type]
                made["x"] = d_x if x.dim() == 2 else d_x.view(*x.shape[:-1], d_model)
            elif name == "gate":
                made["gate"] = torch.mm(d_gate.t(), flat_x)
            elif name == "up":
                made["up"] = torch.mm(d_up.t(), flat_x)  # type: ignore[union-attr]
            elif name == "down":
                made["down"] = torch.mm(flat_grad.t(), hidden.view(flat_hidden))  # type: ignore[union-attr]
            elif name == "gate_bias":
                made["gate_bias"] = d_gate.sum(0)
            elif name == "up_bias":
                made["up_bias"] = d_up.sum(0)  # type: ignore[union-attr]
            elif name == "down_bias":
                made["down_bias"] = flat_grad.sum(0)
        return [made[name] for name in names]

    return run


def _dense(x: Tensor) -> Tensor:
    # Whoever hands saved tensors out again may have changed their strides.
    return x if x.is_contiguous() else x.contiguous()


def _whole_gating_backward(layer: Layer, learned: Sequence[str]) -> Callable[..., Results]:
    """`_gating_backward` for contiguous tensors of all tokens and units."""
    if layer.no_gating is None and layer.tokens:
        sizes = layer.dtype, layer.tokens, layer.d_hidden
        made: Callable[..., Results] = layer.device.bound_backward(*sizes, learned)
        return made

    def of_views(formula: Any, *tensors: Tensor | None) -> Results:
        views = (None if t is None else t.view(layer.tokens, layer.d_hidden) for t in tensors)
        return _gating_backward(layer, learned, formula, *views)  # type: ignore[arg-type]

    return of_views


def _gating_backward(
    layer: Layer,
    learned: Sequence[str],
    formula: Any,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    d_gate: Tensor,
    d_up: Tensor | None,
    hidden: Tensor | None,
) -> Results:
    """One pass: both branches' gradients, the hidden values, and the parameters' gradients, which
    are sums for each unit where kernels make them.
    """
    if layer.no_gating is None:
        if not grad.numel():
            return {name: gate.new_zeros(layer.d_hidden, dtype=torch.float64) for name in learned}
        made: Results = layer.device.run_backward(
            formula, rows(grad), gate, up, d_gate, d_up, hidden, learned
        )
        return made
    if hidden is not None:
        gate_into(layer, formula, gate, up, hidden)
    names = ["gate", *(["up"] if up is not None else []), *learned]
    variant = layer.spec.variant
    found = gating_reference.gating_backward(grad, gate, up, variant, formula, names)
    by_name = dict(zip(names, found, strict=True))
    d_gate.copy_(by_name["gate"])
    if d_up is not None:
        d_up.copy_(by_name["up"])
    return {name: by_name[name].double() for name in learned}


# Some tokens and some hidden units at a time, so that little is held at once


class Part:
    """Some hidden units of the layer, and what is computed of them."""

    def __init__(
        self, layer: Layer, weights: Weights, parameters: Parameters, units: slice
    ) -> None:
        self.units = units
        self.width = units.stop - units.start
        if self.width != layer.d_hidden:
            parameters = {
                name: value[..., units]
                if isinstance(value, Tensor) and value.numel() > 1
                else value
                for name, value in parameters.items()
            }
            weights = Weights(
                weights.gate[units],
                None if weights.up is None else weights.up[units],
                None if weights.down is None else weights.down[:, units],
                None if weights.gate_bias is None else weights.gate_bias[units],
                None if weights.up_bias is None else weights.up_bias[units],
                weights.down_bias,
            )
        self.weights, self.parameters = weights, parameters
        self.formula: Any = parameters
        if layer.no_gating is None:
            self.formula = layer.device.describe(layer.spec.variant, parameters)


class Sums:
    """The gradients as they are added up over some tokens at a time: of the weights in float32,
    unless it is all of them at once, of the biases and the parameters in float64.
    """

    def __init__(
        self, layer: Layer, wanted: Wanted, x: Tensor, w: Weights, parameters: Parameters,
        exact: bool,
    ) -> None:  # fmt: skip
        self._layer, self._wanted, self._weights, self.exact = layer, wanted, w, exact
        self._parameters = parameters
        self.x = x.new_empty(x.shape if "x" in wanted.names else 0)
        self._x_end = 0
        self._made: dict[str, Tensor] = {}
        self.parameters = {}
        for name in wanted.learned:
            value = parameters[name]
            assert isinstance(value, Tensor)
            shape = (layer.d_hidden,) if layer.no_gating is None else value.shape
            self.parameters[name] = x.new_zeros(shape, dtype=torch.float64)

    def x_begun(self, tokens: slice) -> bool:
        """Whether these tokens' gradient holds something already; from now on it does."""
        begun: bool = tokens.stop <= self._x_end
        self._x_end = max(self._x_end, tokens.stop)
        return begun

    def place(self, name: str) -> Tensor:
        if name not in self._made:
            like: Tensor = getattr(self._weights, name)
            wide = like.dtype
            if not self.exact:
                # Biases are small enough for what one by one does not lose.
                least = torch.float64 if name.endswith("_bias") else torch.float32
                wide = torch.promote_types(wide, least)
            written = self.exact and self._layer.tokens and not name.endswith("_bias")
            make = like.new_empty if written else like.new_zeros
            self._made[name] = make(like.shape, dtype=wide)
        return self._made[name]

    def part(self, name: str, units: slice) -> Tensor:
        """The part of a weight's gradient that some hidden units have."""
        place = self.place(name)
        if name == "down":
            return some(place, slice(0, len(place)), units)
        return some(place, units)

    def product(self, name: str, units: slice, product: Product, a: Tensor, b: Tensor) -> None:
        """Adds `a @ b` to the part of a weight's gradient that some hidden units have."""
        place = self.part(name, units)
        if self.exact:
            product(a, b, place, False)
        elif place.dtype == a.dtype:
            product(a, b, place, True)
        else:
            place += product(a, b, None, False)

    def column_sums(self, name: str, part: slice, of: Tensor) -> None:
        """Adds the sums over the tokens to a part of a bias's gradient."""
        place = self.place(name)[part]
        place += of.sum(0, dtype=torch.promote_types(of.dtype, torch.float32)).to(place.dtype)

    def learned(self, units: slice, found: dict[str, Tensor]) -> None:
        """Adds the gradients of parameters: sums for each of some units, or what they are."""
        for name, of_units in found.items():
            place = self.parameters[name]
            if self._layer.no_gating is None:
                place = place[units]
            place += of_units

    def finished(self, name: str) -> Tensor:
        """A gradient that was wanted, in the dtype and the shape of what it belongs to."""
        if name == "x":
            return self.x.view(self._layer.x.shape)
        if name in self.parameters:
            return parameter_gradient(self.parameters[name], self._parameters[name])
        return self.place(name).to(getattr(self._weights, name).dtype)


def in_parts(product: Product, spec: Spec, ended_by_gate: bool = False) -> Run:
    """By products of a library; `ended_by_gate` says that the first of them ends with the gradients
    of the gate, as a GPU's kernel does.
    """
    layer, wanted = Layer(spec), Wanted(spec)
    tokens, d_hidden = layer.tokens, layer.d_hidden
    kept = len(spec.given) > 1
    count = 3 + (0 if kept else 1 + layer.gated)
    size, width = _at_once(layer, count)
    end = d_hidden if wanted.names - {"down_bias"} else 0

    def run(
        grad: Tensor, saved: Sequence[Tensor], tensors: Tensors, parameters: Parameters
    ) -> list[Tensor]:
        x, w, grad = rows(tensors[0]), Weights(*tensors[1:]), rows(grad)  # type: ignore[arg-type]
        branches = [rows(t) for t in saved]
        sums = Sums(layer, wanted, x, w, parameters, exact=size >= tokens)
        memory = layer.device.places(count, size if end else 0, width, x)
        for start in range(0, tokens, max(size, 1)):
            these = slice(start, min(start + size, tokens))
            here = slice(0, these.stop - start)
            some_x, some_grad = some(x, these), some(grad, these)
            for first in range(0, end, width):
                units = slice(first, min(first + width, d_hidden))
                part = Part(layer, w, parameters, units)
                there = slice(0, part.width)
                places = [some(place, here, there) for place in memory.unbind()]
                a, b = (*(some(t, these, units) for t in branches), None, None)[:2]
                if a is None:
                    a = places.pop()
                    project(product, some_x, part.weights.gate, part.weights.gate_bias, a)
                    if part.weights.up is not None:
                        b = places.pop()
                        project(product, some_x, part.weights.up, part.weights.up_bias, b)
                d_gate, d_up, spare = places
                hidden = spare if "down" in wanted.names else None
                given = (layer, wanted, part, some_x, some_grad, (a, b), sums, these)
                _by_products(product, ended_by_gate, *given, (d_gate, d_up, hidden))
                for name, d in (("gate_bias", d_gate), ("up_bias", d_up)):
                    if name in wanted.names:
                        sums.column_sums(name, units, d)
            if "down_bias" in wanted.names:
                sums.column_sums("down_bias", slice(None), some_grad)
        return [sums.finished(name) for name in spec.wanted]

    return run


def fused(spec: Spec) -> Run:
    """By the vendor's products, the first of which a kernel ends with the gate's gradients."""
    return in_parts(by_torch, spec, ended_by_gate=True)


def _at_once(layer: Layer, matrices: int) -> tuple[int, int]:
    """The tokens and the hidden units that are worked on at a time: as many units as fit into
    AT_ONCE in so many matrices, or as many as make no more than PARTS.
    """
    tokens, d_hidden = layer.tokens, layer.d_hidden
    if layer.tile and 2 * layer.tile <= tokens:
        tokens = max(layer.tile, -(-tokens // TILES))
    if layer.no_gating is not None:
        return tokens, d_hidden
    bytes_of_unit = max(matrices * tokens * layer.dtype.itemsize, 1)
    units = max(AT_ONCE[layer.spec.hardware] // bytes_of_unit, -(-d_hidden // PARTS))
    return tokens, min(d_hidden, -(-units // 32) * 32)


Branches = tuple[Tensor, Tensor | None]
Places = tuple[Tensor, Tensor, Tensor | None]  # for d_gate, d_up and the hidden values


def _by_products(
    product: Product,
    ended_by_gate: bool,
    layer: Layer,
    wanted: Wanted,
    part: Part,
    x: Tensor,
    grad: Tensor,
    branches: Branches,
    sums: Sums,
    tokens: slice,
    places: Places,
) -> None:
    """One product after the other, with the gate between them, or at the end of the first."""
    w, units = part.weights, part.units
    d_gate, d_up, hidden = places
    d_branches = d_gate, d_up if w.up is not None else None
    if ended_by_gate and wanted.beyond_down and w.down is not None:
        from gatedffn.ops.feed_forward.gpu.fused_backward import branch_gradients

        names = (layer.spec.variant, part.parameters)
        made = branch_gradients(
            grad, w.down, *branches, *names, *d_branches, hidden, wanted.learned
        )
        sums.learned(units, made)
    elif wanted.beyond_down:
        d_hidden = grad if w.down is not None else some(grad, slice(0, len(grad)), units)
        if w.down is not None:
            # Where d_gate will be, which is made of it element by element.
            d_hidden = product(grad, w.down, d_gate, False)
        given = (layer, wanted.learned, part.formula, d_hidden, *branches, *d_branches, hidden)
        sums.learned(units, _gating_backward(*given))
    elif hidden is not None:
        gate_into(layer, part.formula, *branches, hidden)
    if hidden is not None:
        sums.product("down", units, product, grad.t(), hidden)
    for name, d, weight in (("gate", d_gate, w.gate), ("up", d_up, w.up)):
        if weight is None:
            continue
        if name in wanted.names:
            sums.product(name, units, product, d.t(), x)
        if "x" in wanted.names:
            product(d, weight, some(sums.x, tokens), sums.x_begun(tokens))


# Own kernels of a processor: one call


def few(spec: Spec) -> Run:
    """Every weight is read once; see few_backward.h."""
    layer = Layer(spec)
    return _one_call(kernels.FEW_BACKWARD, spec, layer.tokens, layer.d_hidden)


def blocks(spec: Spec) -> Run:
    """Products of packed blocks with the gate between them; see blocks.h."""
    layer, wanted = Layer(spec), Wanted(spec)
    branches = (1 + layer.gated) if wanted.beyond_down else 0
    places = ("down" in wanted.names) + branches * (1 if len(spec.given) > 1 else 2)
    return _one_call(kernels.BLOCKS_BACKWARD, spec, *_at_once(layer, places), places)


def _one_call(kernel: kernels.Kernel, spec: Spec, tokens: int, units: int, places: int = 0) -> Run:
    """The call of a kernel that works on so many tokens and hidden units at a time."""
    layer, wanted = Layer(spec), Wanted(spec)
    wide = tokens < layer.tokens
    not_saved = (None,) * (3 - len(spec.given))
    laid = kernels.Laid((*spec.operands[:6], *spec.given, *not_saved))
    x, gate, up, down, _, _, grad, saved_gate, saved_up = laid.strides
    work = 3 * tokens * layer.d_model * units
    facts = {
        **{"x_stride": x, "gate_stride": gate, "up_stride": up, "down_stride": down},
        **{"grad_stride": grad, "saved_gate_stride": saved_gate, "saved_up_stride": saved_up},
        **dict.fromkeys(("sum_x_stride", "sum_gate_stride", "sum_up_stride"), layer.d_model),
        **{"sum_down_stride": layer.d_hidden, "wide": wide, "tokens": layer.tokens},
        **{"d_model": layer.d_model, "d_hidden": layer.d_hidden, "d_out": layer.d_out},
        **{"dtype": kernels.DTYPES[layer.dtype]},
        **{"threads": kernels.threads(work, kernels.MULTIPLY_ADDS_PER_THREAD)},
        **{"tile": tokens, "units": units, "places": places},
    }
    call, size = kernel.bind(**facts), kernel.scratch(**facts)
    formulas, addresses, dtype = layer.formulas(), laid.addresses, layer.dtype
    # What the kernel writes, in its order; of a learned parameter the sums for each hidden unit.
    written = ("x", *Weights._fields, *SCALARS[VARIANTS[spec.variant].phi].parameters)
    makes: list[tuple[int, tuple[int, ...], torch.dtype, bool]] = []
    for name in spec.wanted:
        index = written.index(name)
        operand = spec.operands[index] if index < len(spec.operands) else None
        if operand is None:
            makes.append((index, (layer.d_hidden,), torch.float64, False))
            continue
        of = torch.float32 if wide and name != "x" else dtype
        alike = of is dtype and operand.row_stride == operand.shape[-1]
        makes.append((index, operand.shape, of, alike))
    learned = [(i, name) for i, name in enumerate(spec.wanted) if name in wanted.learned]
    wider = [i for i, (*_, of, _) in enumerate(makes) if of is torch.float32 is not dtype]

    def run(
        grad: Tensor, saved: Sequence[Tensor], tensors: Tensors, parameters: Parameters
    ) -> list[Tensor]:
        formula = formulas(parameters)
        # What is copied to be read must live until it was, as must scratch memory.
        read, _held = addresses((*tensors[:6], grad, *saved, *not_saved))
        memory, made, at = scratch(size), [], [0] * 9
        for index, shape, of, alike in makes:
            # As a tensor that is there is the quickest way to memory.
            like = tensors[index] if alike else None
            place = grad.new_empty(shape, dtype=of) if like is None else torch.empty_like(like)
            at[index] = place.data_ptr()
            made.append(place)
        call(formula.pointer, *read, *at, memory.data_ptr())
        for i, name in learned:
            made[i] = parameter_gradient(made[i], parameters[name])
        for i in wider:
            made[i] = made[i].to(dtype)
        return made

    return run
