"""What the ways of the layer share, and how each of them runs forward.

A run takes the operands in the order of the operator and the parameters by name. In inference it
returns the output; in the forward of a training step a tuple of the output and what is kept for
backward: gate, and up where there is a gate, in the shape of the hidden values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.ops import kernels
from gatedffn.ops.feed_forward.products import Product, by_torch, closed_up
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.gating import device_of
from gatedffn.ops.gating import reference as gating_reference
from gatedffn.ops.kernels import scratch
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Parameters, Spec, Tensors

PANEL = 32  # tokens that two tiles take
# Panels that a thread of tiles.h takes at a time: with fewer each fetches all weights for too
# little work, more leave its cache.
PANELS = 4, 8
CACHED = 2 << 20  # bytes of tokens and hidden values that threads of tiles.h share
AT_A_TIME = 512  # tokens at most whose hidden values blocks.h holds at a time
# Bytes of gate and up, or of hidden values, that products by a library work on at a time.
WORKED_ON = {"cpu": 24 << 20, "gpu": 256 << 20}


class Layer:
    """A spec in the layer's own words."""

    def __init__(self, spec: Spec) -> None:
        x, gate, up, down, *_ = spec.operands
        assert x is not None
        assert gate is not None
        self.spec, self.x = spec, x
        self.dtype = x.dtype
        self.d_hidden, self.d_model = gate.shape
        self.gated, self.has_down = up is not None, down is not None
        self.d_out = self.d_hidden if down is None else down.shape[0]
        self.tokens = x.numbers // max(self.d_model, 1)
        save, self.tile = spec.settings
        self.saves = spec.stage == "forward" and save == "gate_up"
        self.shape = (*x.shape[:-1], self.d_out)
        self.hidden_shape = (*x.shape[:-1], self.d_hidden)
        # Gating of matrices on this device, and why its kernels cannot.
        self.device = device_of(spec.hardware)
        self.no_gating = self._no_gating()

    def _no_gating(self) -> str | None:
        if self.dtype not in self.device.DTYPES:
            return f"there is no kernel for {self.dtype}"
        missing: str | None = self.spec.own_functions or self.device.missing(self.spec.device)
        return missing

    @property
    def no_kernels(self) -> str | None:
        """Why the kernels of the whole layer cannot take it; None when they can."""
        if not self.tokens:
            return "there are no tokens"
        weights = self.spec.operands[1:4]
        if not all(w is None or w.by_rows for w in weights):
            # A copy of a weight would cost more than the kernels of the whole layer gain.
            return "a weight is not stored row by row, as nn.Linear stores it"
        return self.no_gating

    @property
    def threads(self) -> int:
        """How many threads are worth waking for the layer."""
        work = 3 * self.tokens * self.d_model * self.d_hidden
        return kernels.threads(work, kernels.MULTIPLY_ADDS_PER_THREAD)

    @property
    def hidden_bytes(self) -> int:
        """The memory of one matrix of hidden values."""
        return self.tokens * self.d_hidden * self.dtype.itemsize

    def formulas(self) -> Callable[[Parameters], Any]:
        """What makes of the parameters the form that the kernels take; without any, the definition
        takes them as they are.
        """
        if self.no_gating is not None:
            return lambda parameters: parameters
        return kernels.formulas(self.device.describe, self.spec)

    def empty(self) -> Callable[[Tensor], Tensor]:
        """What makes memory for the output."""
        x, shape = self.x, self.shape
        if x.shape == shape and x.row_stride == self.d_model:
            return torch.empty_like
        return lambda x: x.new_empty(shape)

    def results(self, y: Tensor, gate: Tensor | None, up: Tensor | None) -> Any:
        """What a run returns."""
        if self.spec.stage != "forward":
            return y
        return (y, *(t for t in (gate, up) if t is not None and self.saves))

    def kept(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Memory for gate and up where they are kept."""
        if not self.saves:
            return None, None
        gate = x.new_empty(self.hidden_shape)
        return gate, x.new_empty(self.hidden_shape) if self.gated else None


def gate_into(layer: Layer, formula: Any, gate: Tensor, up: Tensor | None, hidden: Tensor) -> None:
    """Writes the hidden values of matrices."""
    if layer.no_gating is not None:
        hidden.copy_(gating_reference.gating(gate, up, layer.spec.variant, formula))
    elif hidden.numel():
        layer.device.run(formula, gate, up, hidden)


def whole_gating(layer: Layer) -> Callable[..., None]:
    """`gate_into` for contiguous tensors of all hidden values, whatever their dimensions."""
    if layer.no_gating is None and layer.tokens:
        sizes = layer.dtype, layer.tokens, layer.d_hidden
        made: Callable[..., None] = layer.device.bound(*sizes)
        return made
    return partial(gate_into, layer)


def rows(x: Tensor) -> Tensor:
    """A tensor as rows of its last dimension, whose stride is 1."""
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or not matrix.numel() else matrix.contiguous()


def some(matrix: Tensor, rows: slice, columns: slice | None = None) -> Tensor:
    """Some rows of a matrix, and some columns; itself where these are all, as a view takes longer
    than the product of a small layer.
    """
    if rows.stop - rows.start != matrix.shape[0]:
        matrix = matrix[rows]
    if columns is not None and columns.stop - columns.start != matrix.shape[1]:
        matrix = matrix[:, columns]
    return matrix


def even_parts(count: int, most: int) -> int:
    """The size of parts that hold at most so many, all of about the same size."""
    return -(-count // max(1, -(-count // max(most, 1))))


def project(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`out = x weight^T + bias`."""
    if bias is not None and product is by_torch:
        torch.addmm(bias, closed_up(x), weight.t(), out=out)  # a GPU's library adds it as it writes
        return
    if bias is not None:
        out.copy_(bias.expand_as(out))
    product(x, weight.t(), out, bias is not None)


# Own kernels of a processor: one call


def _one_call(kernel: kernels.Kernel, spec: Spec, tile: int | None = None) -> Run:
    layer = Layer(spec)
    laid = kernels.Laid(spec.operands)
    x, gate, up, down, *_ = laid.strides
    facts = {
        **{"x_stride": x, "gate_stride": gate, "up_stride": up, "down_stride": down},
        **{"y_stride": layer.d_out, "saved_gate_stride": layer.d_hidden},
        **{"saved_up_stride": layer.d_hidden, "tokens": layer.tokens, "d_model": layer.d_model},
        **{"d_hidden": layer.d_hidden, "d_out": layer.d_out},
        **{"dtype": kernels.DTYPES[layer.dtype], "threads": layer.threads},
    }
    if tile is not None:
        facts["tile"] = tile
    call, size = kernel.bind(**facts), kernel.scratch(**facts)
    formulas, empty, addresses = layer.formulas(), layer.empty(), laid.addresses

    def run(tensors: Tensors, parameters: Parameters) -> Tensor:
        # What is copied to be read must live until it was, as must scratch memory that is not kept.
        found, _held = addresses(tensors)
        formula, memory = formulas(parameters), scratch(size)
        y = empty(tensors[0])  # type: ignore[arg-type]
        call(formula.pointer, *found, y.data_ptr(), 0, 0, memory.data_ptr())
        return y

    def training(tensors: Tensors, parameters: Parameters) -> Any:
        found, _held = addresses(tensors)
        formula, memory = formulas(parameters), scratch(size)
        y = empty(tensors[0])  # type: ignore[arg-type]
        kept = layer.kept(y)
        places = [0 if t is None else t.data_ptr() for t in (y, *kept)]
        call(formula.pointer, *found, *places, memory.data_ptr())
        return layer.results(y, *kept)

    return training if spec.stage == "forward" else run


def few(spec: Spec) -> Run:
    """Every weight is read once; see few.h."""
    return _one_call(kernels.FEW, spec)


def tiles(spec: Spec) -> Run:
    """Products of tiles; see tiles.h."""
    layer = Layer(spec)
    fewest, most = PANELS
    mine = -(-layer.tokens // (PANEL * layer.threads))
    if mine >= fewest:
        return _one_call(kernels.TILES, spec, PANEL * even_parts(mine, most))
    cached = CACHED // ((layer.d_model + layer.d_hidden) * layer.dtype.itemsize)
    return _one_call(kernels.TILES, spec, min(layer.tokens, max(PANEL, cached // PANEL * PANEL)))


def blocks(spec: Spec) -> Run:
    """Products of packed blocks; see blocks.h."""
    return _one_call(kernels.BLOCKS, spec, AT_A_TIME)


# Products by a library


def linear(spec: Spec) -> Run:
    """By PyTorch's linear layers, each with memory of its own, and gating between them."""
    layer = Layer(spec)
    formulas, gating = layer.formulas(), whole_gating(layer)
    # A linear layer with a bias returns a view, which autograd lets nobody change in place.
    viewed = spec.stage == "forward" and spec.operands[6] is not None and len(layer.shape) != 2

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        x, gate_weight, up_weight, down, gate_bias, up_bias, down_bias = tensors
        assert x is not None
        assert gate_weight is not None
        x = closed_up(x)
        gate = F.linear(x, gate_weight, gate_bias)
        up = None if up_weight is None else F.linear(x, up_weight, up_bias)
        hidden = gate if layer.has_down and not layer.saves else torch.empty_like(gate)
        gating(formulas(parameters), gate, up, hidden)
        y = hidden if down is None else F.linear(hidden, down, down_bias)
        if viewed:
            y = torch.ops.aten._unsafe_view(y, layer.shape)
        return layer.results(y, gate, up)

    return run


def tiled(product: Product, spec: Spec) -> Run:
    """Products by a library, some tokens at a time; what is not kept is in reused memory."""
    layer = Layer(spec)
    formulas, d_hidden, tokens = layer.formulas(), layer.d_hidden, layer.tokens
    at_a_time = WORKED_ON[spec.hardware] // (2 * d_hidden * layer.dtype.itemsize)
    size = even_parts(tokens, at_a_time)

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        w = Weights(*tensors[1:])  # type: ignore[arg-type]
        x = rows(tensors[0])  # type: ignore[arg-type]
        formula = formulas(parameters)
        made = x.new_empty(layer.shape)
        gate, up = layer.kept(x)
        y, *kept = (None if t is None else t.view(tokens, t.shape[-1]) for t in (made, gate, up))
        assert y is not None
        # Kept, gate and up have places of their own, and the hidden values have this one.
        places = layer.device.places(1 if layer.saves else 2, size, d_hidden, x).unbind()
        for start in range(0, tokens, max(size, 1)):
            these = slice(start, min(start + size, tokens))
            here = slice(0, these.stop - start)
            out, x_part = some(y, these), some(x, these)
            a = some(places[0], here) if kept[0] is None else some(kept[0], these)
            project(product, x_part, w.gate, w.gate_bias, a)
            b = None
            if w.up is not None:
                b = some(places[-1], here) if kept[1] is None else some(kept[1], these)
                project(product, x_part, w.up, w.up_bias, b)
            hidden = out if w.down is None else some(places[0], here)
            gate_into(layer, formula, a, b, hidden)
            if w.down is not None:
                project(product, hidden, w.down, w.down_bias, out)
        return layer.results(made, gate, up)

    return run


# Kernels of a GPU, which are imported where they are taken


def gpu_few(spec: Spec) -> Run:
    """Every weight is read once; see gpu/few.py."""
    from gatedffn.ops.feed_forward.gpu import few

    layer = Layer(spec)

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        x, weights = rows(tensors[0]), with_dense_biases(tensors)  # type: ignore[arg-type]
        y = x.new_empty(layer.shape)
        few.feed_forward(x, weights, spec.variant, parameters, y.view(-1, layer.d_out))
        return layer.results(y, None, None)

    return run


def fused(spec: Spec) -> Run:
    """Gate and up as one kernel, which ends with the gate; the vendor's product for the rest."""
    from gatedffn.ops.feed_forward.gpu import fused as kernel

    layer = Layer(spec)
    tokens, d_hidden = layer.tokens, layer.d_hidden
    size = even_parts(tokens, WORKED_ON["gpu"] // (d_hidden * layer.dtype.itemsize))

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        x, w = rows(tensors[0]), with_dense_biases(tensors)  # type: ignore[arg-type]
        made = x.new_empty(layer.shape)
        gate, up = layer.kept(x)
        y, *kept = (None if t is None else t.view(tokens, t.shape[-1]) for t in (made, gate, up))
        assert y is not None
        place = y if w.down is None else x.new_empty(size, d_hidden)
        for start in range(0, tokens, size):
            these = slice(start, min(start + size, tokens))
            hidden = some(place, these if w.down is None else slice(0, these.stop - start))
            kernel.hidden_values(
                some(x, these),
                *(w.gate, w.gate_bias, w.up, w.up_bias),
                spec.variant,
                parameters,
                hidden,
                None if kept[0] is None else some(kept[0], these),
                None if kept[1] is None else some(kept[1], these),
            )
            if w.down is not None:
                project(by_torch, hidden, w.down, w.down_bias, some(y, these))
        return layer.results(made, gate, up)

    return run


def with_dense_biases(tensors: Tensors) -> Weights:
    """The weights of a call, biases contiguous."""
    return Weights(
        *tensors[1:4],  # type: ignore[arg-type]
        *(None if bias is None else bias.contiguous() for bias in tensors[4:]),
    )
