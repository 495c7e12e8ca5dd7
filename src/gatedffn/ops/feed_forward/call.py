"""A call of the layer as the ways of the CPU take it, and the steps that they share."""

from typing import NamedTuple

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward.products import Product
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.gating import cpu as gating
from gatedffn.ops.gating import reference as gating_reference


class Call:
    """What a layer is computed on: tokens as rows that are contiguous, and biases."""

    __slots__ = (
        *("x", "weights", "variant", "parameters", "tokens", "d_model", "d_hidden", "d_out"),
        *("shape", "no_kernels", "no_layer_kernels", "described"),
    )

    def __init__(
        self, x: Tensor, weights: Weights, variant: str, parameters: dict[str, Value]
    ) -> None:
        activated, linear, down, *biases = weights
        for bias in biases:
            if bias is not None and bias.stride(0) != 1:
                biases = [None if b is None else b.contiguous() for b in biases]
                break
        self.x = _rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        self.weights = Weights(activated, linear, down, *biases)
        self.variant = variant
        self.parameters = parameters
        self.tokens, self.d_model = self.x.shape
        self.d_hidden = activated.shape[0]
        self.d_out = self.d_hidden if down is None else down.shape[0]
        self.shape = (*x.shape[:-1], self.d_out)
        # Why the kernels cannot take it, or else the row in the form that they take.
        self.no_kernels = self._unsuited()
        self.described = None
        if self.no_kernels is None:
            self.described = kernels.describe(variant, parameters)
        # Why the kernels of the whole layer cannot: a copy of a weight would cost more than it.
        self.no_layer_kernels = self.no_kernels
        for w in (activated, linear, down):
            if w is not None and w.stride(1) != 1 and w.shape[1] != 1:
                self.no_layer_kernels = "a weight is not stored row by row, as nn.Linear stores it"

    def _unsuited(self) -> str | None:
        if self.x.dtype not in kernels.DTYPES:
            return f"there is no kernel for {self.x.dtype}"
        unsuited = gating.unsuited_parameters(self.parameters, self.d_hidden)
        return unsuited or kernels.missing()

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
            w.activated[units],
            None if w.linear is None else w.linear[units],
            None if w.down is None else w.down[:, units],
            None if w.activated_bias is None else w.activated_bias[units],
            None if w.linear_bias is None else w.linear_bias[units],
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
            f"{self.threads} threads",
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
        w.linear is not None,
        w.down is not None,
        save,
        kernels.level() if call.no_layer_kernels is None else "",
        torch.get_num_threads(),
    )


def project(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`out = x weight^T + bias`."""
    if bias is not None:
        out.copy_(bias.expand_as(out))
    product(x, weight.t(), out, bias is not None)


def gate(call: Call, activated: Tensor, linear: Tensor | None, hidden: Tensor) -> None:
    if call.described is None:
        hidden.copy_(gating_reference.gating(activated, linear, call.variant, call.parameters))
    elif hidden.numel():
        gating.run(call.described, activated, linear, hidden)
