"""A call of the layer as the ways to compute it take it, and the steps that they share."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import gpu, kernels
from gatedffn.ops.choice import nothing
from gatedffn.ops.feed_forward.gpu.configs import kind_of
from gatedffn.ops.feed_forward.products import Product, by_torch
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.feed_forward.weights import Known, projections
from gatedffn.ops.gating import cpu as gating
from gatedffn.ops.gating import gpu as gating_gpu
from gatedffn.ops.gating import reference as gating_reference
from gatedffn.ops.scratch import matrices


class Device(NamedTuple):
    """What a kind of device has for a call: its gating, and memory for what is between products."""

    name: str
    gating: ModuleType
    dtypes: Collection[torch.dtype]
    missing: Callable[[torch.device], str | None]
    describe: Callable[[str, Mapping[str, Value]], Any]
    places: Callable[[int, int, int, Tensor], Tensor]
    level: Callable[[Tensor], str]  # of the kernels: what a choice depends on
    # Waits until what was begun on the device is done; None where nothing may wait.
    finish: Callable[[torch.device], Callable[[], None] | None]


def _empty(count: int, rows: int, columns: int, like: Tensor) -> Tensor:
    return like.new_empty(count, rows, columns)


CPU = Device(
    name="cpu",
    gating=gating,
    dtypes=kernels.DTYPES,
    missing=lambda _: kernels.missing(),
    describe=kernels.describe,
    places=matrices,
    level=lambda _: kernels.level(),
    finish=lambda _: nothing,
)
GPU = Device(
    name="gpu",
    gating=gating_gpu,
    dtypes=gpu.DTYPES,
    missing=gpu.missing,
    describe=gpu.describe,
    places=_empty,  # PyTorch keeps a GPU's memory for the next call by itself
    level=lambda x: gpu.level(x.device) + (", TF32" if kind_of(x.dtype) == "tf32" else ""),
    finish=lambda device: None if gpu.capturing() else partial(gpu.finish, device),
)


def device_of(x: Tensor) -> Device:
    """What there is for the device of a tensor."""
    return GPU if gpu.takes(x) else CPU


class Call:
    """What a layer is computed on: tokens as rows that are contiguous, and biases."""

    __slots__ = (
        *("x", "weights", "variant", "parameters", "tokens", "d_model", "d_hidden", "d_out"),
        *("shape", "projections", "device", "no_kernels", "no_layer_kernels", "described"),
    )

    def __init__(
        self,
        x: Tensor,
        weights: Weights,
        variant: str,
        parameters: Mapping[str, Value],
        known: Known | None = None,
    ) -> None:
        if known is None:
            known = Known(weights)
        if known.projections is None:
            biases = [None if b is None else b.contiguous() for b in weights[3:]]
            weights = Weights(*weights[:3], *biases)
        self.x = _rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        self.weights = weights
        self.projections = known.projections or projections(weights)
        self.variant = variant
        self.parameters = parameters
        self.tokens = self.x.shape[0]
        self.d_model, self.d_hidden, self.d_out = known.d_model, known.d_hidden, known.d_out
        self.shape = (*x.shape[:-1], self.d_out)
        self.device = device_of(x)
        # Why the kernels cannot take it, or else the row in the form that they take.
        self.no_kernels = self._unsuited()
        self.described = None
        if self.no_kernels is None:
            self.described = self.device.describe(variant, parameters)
        # Why the kernels of the whole layer cannot.
        self.no_layer_kernels = known.not_by_rows or self.no_kernels

    def _unsuited(self) -> str | None:
        if self.x.dtype not in self.device.dtypes:
            return f"there is no kernel for {self.x.dtype}"
        unsuited = gating.unsuited_parameters(self.parameters, self.d_hidden)
        return unsuited or self.device.missing(self.x.device)

    def output(self) -> tuple[Tensor, Tensor]:
        """Memory for the output in its own shape, and the same as rows, to write to."""
        made = self.x.new_empty(self.shape)
        return made, made if len(self.shape) == 2 else made.view(self.tokens, self.d_out)

    def units(self, units: slice) -> "Call":
        """The call with some of its hidden units."""
        if units.start == 0 and units.stop == self.d_hidden:
            return self
        w = self.weights
        parameters = {
            name: value[..., units] if isinstance(value, Tensor) and value.numel() > 1 else value
            for name, value in self.parameters.items()
        }
        weights = Weights(
            w.gate[units],
            None if w.up is None else w.up[units],
            None if w.down is None else w.down[:, units],
            None if w.gate_bias is None else w.gate_bias[units],
            None if w.up_bias is None else w.up_bias[units],
            w.down_bias,
        )
        return Call(self.x, weights, self.variant, parameters)


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.numel() == 0 else matrix.contiguous()


class Key(NamedTuple):
    """What a choice depends on; tokens count by powers of two."""

    stage: str
    dtype: torch.dtype
    log_tokens: int
    d_model: int
    d_hidden: int
    d_out: int
    gated: bool
    down: bool
    save: bool
    kernels: str
    threads: int

    def __str__(self) -> str:
        words = [
            self.stage,
            str(self.dtype).removeprefix("torch."),
            f"up to {1 << self.log_tokens} tokens",
            f"{self.d_model} -> {self.d_hidden}" + (f" -> {self.d_out}" if self.down else ""),
            "gated" if self.gated else "not gated",
            *(["gate and up saved"] if self.save else []),
            f"{self.kernels} kernels" if self.kernels else "without kernels",
            *([f"{self.threads} threads"] if self.threads else []),
        ]
        return ", ".join(words)


def key_of(call: Call, save: bool, stage: str) -> Key:
    """The key of a choice for a call."""
    w = call.weights
    return Key(
        stage,
        call.x.dtype,
        (call.tokens - 1).bit_length(),
        call.d_model,
        call.d_hidden,
        call.d_out,
        w.up is not None,
        w.down is not None,
        save,
        call.device.level(call.x) if call.no_layer_kernels is None else "",
        torch.get_num_threads() if call.device is CPU else 0,
    )


def some(matrix: Tensor, rows: slice, columns: slice | None = None) -> Tensor:
    """Some rows of a matrix, and some columns; itself where these are all, as a view takes longer
    than the product of a small layer.
    """
    if rows.stop - rows.start != matrix.shape[0]:
        matrix = matrix[rows]
    if columns is not None and columns.stop - columns.start != matrix.shape[1]:
        matrix = matrix[:, columns]
    return matrix


def project(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`out = x weight^T + bias`."""
    if bias is not None and product is by_torch:
        torch.addmm(bias, x, weight.t(), out=out)  # a GPU's library adds it as it writes
        return
    if bias is not None:
        out.copy_(bias.expand_as(out))
    product(x, weight.t(), out, bias is not None)


def apply_gating(call: Call, gate: Tensor, up: Tensor | None, hidden: Tensor) -> None:
    if call.described is None:
        hidden.copy_(gating_reference.gating(gate, up, call.variant, call.parameters))
    elif hidden.numel():
        call.device.gating.run(call.described, gate, up, hidden)
