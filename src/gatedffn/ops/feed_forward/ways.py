"""The table of the ways to compute the layer, and what speaks against each.

    few     own kernels, few tokens: every weight is read once, as it lies
    tiles   own kernel, bfloat16 on processors that multiply tiles: the whole layer for some hundred
            tokens at a time
    linear  PyTorch's linear layers with gating between them, everything in memory of its own
    torch, onednn
            products by that library, some tokens at a time over reused memory
    blocks  own kernels, any number of tokens: products of what is packed into caches, and the gate
            on each block of them
    fused   a GPU's kernel for gate and up that ends with the gate; the vendor's products beside it
    definition
            the formula in plain PyTorch, whose gradients are autograd's

Each takes all variants. `forward` and `backward` have how they run.
"""

from functools import partial

import torch
from torch import Tensor

from gatedffn import native
from gatedffn.errors import ShapeError
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import backward, forward, reference
from gatedffn.ops.feed_forward.forward import Layer
from gatedffn.ops.feed_forward.products import by_onednn, by_torch, has_onednn
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.plan import Way, Ways, gradients_of
from gatedffn.ops.spec import Parameters, Spec, Tensors

MOST_FEW = 32  # tokens that few.h takes
# Tokens up to which it is worth a measurement where tiles can be multiplied, forward and backward.
FEW_BESIDE_TILES, FEW_BACKWARD_BESIDE_TILES = 4, 8
PACKED_FROM = 17  # tokens from which it is worth to pack the weights
SMALL = 1 << 16  # numbers of a projection below which the calls cost more than what they do
FRESH = 8 << 20  # bytes of three matrices of hidden values, up to which their memory may be fresh
CPU, GPU, BOTH = ("cpu",), ("gpu",), ("cpu", "gpu")
FORWARD, BACKWARD = ("inference", "forward"), ("backward",)
OPERANDS = ("x", *Weights._fields)


def why_definition(spec: Spec) -> str | None:
    """Why a call is left to the definition; None when other ways take it."""
    if spec.hardware not in ("cpu", "gpu"):
        return f"there is no kernel for {spec.hardware}"
    x, gate = spec.x, spec.operands[1]
    assert gate is not None
    _check_given(spec)
    for w in spec.matrices:
        if w.dtype is not x.dtype or w.device != x.device:
            return f"x is {x.dtype}, a weight {w.dtype}, on other devices or of another dtype"
    if any(0 in w.shape for w in spec.matrices[1:]):
        return "a width is 0"
    return spec.unsuited_parameter(gate.shape[0])


def _check_given(spec: Spec) -> None:
    """Whoever hands saved tensors out again may have made others of them, which kernels trust."""
    layer = Layer(spec)
    for place, given in enumerate(spec.given):
        numbers = layer.tokens * (layer.d_hidden if place else layer.d_out)
        if given.dtype is not layer.dtype or given.numbers != numbers:
            raise ShapeError(
                f"a gradient or a saved tensor is {tuple(given.shape)} {given.dtype}: it does not "
                f"fit to the operands, {numbers} numbers of {layer.dtype}"
            )


def key(spec: Spec) -> str:
    """What a measurement holds for; tokens count by powers of two."""
    layer = Layer(spec)
    level = layer.device.level(spec.device, layer.dtype) if layer.no_kernels is None else ""
    stage = "backward" if spec.stage == "backward" else "forward"
    keeps = layer.saves if spec.stage != "backward" else len(spec.given) > 1
    words = [
        stage + (f" to {' '.join(spec.wanted)}" if spec.wanted else ""),
        *([f"{layer.tile} tokens at a time"] if spec.wanted and layer.tile else []),
        str(layer.dtype).removeprefix("torch."),
        f"up to {1 << (layer.tokens - 1).bit_length()} tokens",
        f"{layer.d_model} -> {layer.d_hidden}" + (f" -> {layer.d_out}" if layer.has_down else ""),
        "gated" if layer.gated else "not gated",
        *(["gate and up kept"] if keeps else []),
        f"{level} kernels" if level else "without kernels",
        *([f"{spec.threads} threads"] if spec.hardware == "cpu" else []),
    ]
    return ", ".join(words)


def order(ways: list[Way], spec: Spec) -> list[Way]:
    """The order of the rule.

    Libraries are several times slower than blocks where a processor lacks the instructions for
    products in half precision: they convert, or multiply number by number.
    """
    if spec.hardware != "cpu" or native.multiplies(str(spec.x.dtype)):
        return ways
    return sorted(ways, key=lambda way: way.name in ("linear", "torch", "onednn"))


# What speaks against a way


def _own(spec: Spec) -> str | None:
    return Layer(spec).no_kernels


def _few(spec: Spec) -> str | None:
    layer = Layer(spec)
    if layer.tokens > MOST_FEW:
        return f"it takes up to {MOST_FEW} tokens, these are {layer.tokens}"
    return layer.no_kernels


def _few_lags(most: int, spec: Spec) -> str | None:
    layer = Layer(spec)
    if (
        layer.dtype == torch.bfloat16
        and layer.tokens > most
        and kernels.has_tiles()
        and layer.d_hidden * layer.d_model > SMALL
    ):
        return f"beyond {most} tokens tiles are faster"
    return None


def _tiles(spec: Spec) -> str | None:
    layer = Layer(spec)
    if layer.dtype != torch.bfloat16:
        return f"it is for bfloat16, these are {layer.dtype}"
    if layer.no_kernels is None and not kernels.has_tiles():
        return "this processor does not multiply tiles of bfloat16"
    return layer.no_kernels


def _blocks_lag(spec: Spec) -> str | None:
    layer = Layer(spec)
    if layer.tokens < PACKED_FROM and layer.d_hidden * layer.d_model > SMALL:
        return f"below {PACKED_FROM} tokens packing costs more than the products"
    return None


def _onednn(spec: Spec) -> str | None:
    if has_onednn(spec.x.dtype):
        return None
    return f"this PyTorch's oneDNN has no linear layer for {spec.x.dtype} here"


def _onednn_lags(spec: Spec) -> str | None:
    if spec.x.dtype != torch.float32:
        return f"for {spec.x.dtype} it is PyTorch's default already"
    return None


def _whole(spec: Spec) -> str | None:
    tile = Layer(spec).tile
    if spec.stage != "inference" and tile and 2 * tile <= Layer(spec).tokens:
        return f"it works on all tokens at once, not on {tile} of them"
    return None


def _large(spec: Spec) -> str | None:
    size = 3 * Layer(spec).hidden_bytes
    if size > FRESH:
        return f"fresh memory for {size >> 20} MB takes longer than reused memory"
    return None


def _small(spec: Spec) -> str | None:
    if _whole(spec) is None and _large(spec) is None:
        return "small: Python between its products takes longer than fresh memory"
    return None


def _gpu_few(spec: Spec) -> str | None:
    layer = Layer(spec)
    if layer.no_kernels is not None:
        return layer.no_kernels
    from gatedffn.ops.feed_forward.gpu.few import MOST_TOKENS

    if layer.tokens > MOST_TOKENS:
        return f"it takes up to {MOST_TOKENS} tokens, these are {layer.tokens}"
    return "it does not keep gate and up" if layer.saves else None


def _fused(spec: Spec) -> str | None:
    layer = Layer(spec)
    if layer.no_kernels is not None:
        return layer.no_kernels
    from gatedffn.ops.feed_forward.gpu.tiles import MOST

    largest = max(layer.tokens, *(max(w.shape) for w in spec.matrices[1:]))
    return None if largest <= MOST else f"a kernel counts up to {MOST}, a size is {largest}"


def _no_down(spec: Spec) -> str | None:
    if spec.operands[3] is None:
        return "without a product with W_down there is none for the gate to end"
    return None


# The definition


def _definition(
    tensors: Tensors, variant: str, parameters: Parameters, _settings: object
) -> Tensor:
    x, *weights = tensors
    assert x is not None
    return reference.feed_forward(x, Weights(*weights), variant, parameters)  # type: ignore[arg-type]


WAYS = Ways(
    ways=(
        Way("few", forward.few, CPU, FORWARD, _few, partial(_few_lags, FEW_BESIDE_TILES)),
        Way("few", forward.gpu_few, GPU, FORWARD, _gpu_few),
        Way("tiles", forward.tiles, CPU, FORWARD, _tiles),
        Way("linear", forward.linear, BOTH, FORWARD, _whole, _large),
        Way("torch", partial(forward.tiled, by_torch), BOTH, FORWARD, not_worth=_small),
        Way("onednn", partial(forward.tiled, by_onednn), CPU, FORWARD, _onednn, _onednn_lags),
        Way("blocks", forward.blocks, CPU, FORWARD, _own, _blocks_lag),
        Way("fused", forward.fused, GPU, FORWARD, _fused),
        Way(
            "few", backward.few, CPU, BACKWARD, _few, partial(_few_lags, FEW_BACKWARD_BESIDE_TILES)
        ),
        Way("linear", backward.linear, BOTH, BACKWARD, _whole, _large),
        Way("torch", partial(backward.in_parts, by_torch), BOTH, BACKWARD, not_worth=_small),
        Way("onednn", partial(backward.in_parts, by_onednn), CPU, BACKWARD, _onednn, _onednn_lags),
        Way("blocks", backward.blocks, CPU, BACKWARD, _own, _blocks_lag),
        Way("fused", backward.fused, GPU, BACKWARD, _fused, _no_down),
    ),
    definition=_definition,
    gradients=gradients_of(_definition, OPERANDS),
    why_definition=why_definition,
    key=key,
    by_autograd=True,
    order=order,
)
