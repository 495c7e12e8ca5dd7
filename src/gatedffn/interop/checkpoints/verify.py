"""Whether a converted block computes what the original does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedffn import functional
from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoints.checkpoint import Checkpoint
from gatedffn.interop.checkpoints.loading import module, read_weights
from gatedffn.interop.checkpoints.safetensors import TORCH
from gatedffn.layers import FeedForward
from gatedffn.storage.arithmetic import Placed
from gatedffn.storage.blocks import Block
from gatedffn.variants import VARIANTS

TOKENS = 8
ROUNDING = 1e-5
"""The largest error, of the largest output, that float32 can make of the same weights."""


@dataclass(frozen=True, slots=True)
class Error:
    """The largest error of a block's outputs, as a part of the largest output."""

    path: str
    largest: float


@torch.no_grad()
def compare(
    source: Checkpoint,
    before: Sequence[Block],
    result: Checkpoint,
    after: Sequence[Block],
    variant: tuple[str, dict[str, float]] | None,
) -> tuple[Error, ...]:
    """The errors of all blocks in float32 on the same random input.

    The source's matrices are multiplied as they lie, and packed products are split afterwards; the
    result's blocks are run as `FeedForward`. Where nothing says what the blocks compute, they are
    compared as SwiGLU, or GELU without a gate; norms and other extras are left out, since their
    bytes are copied.

    Raises:
        CheckpointError: the blocks are not the same, or one is above rounding.
    """
    paths = [block.path for block in before]
    if paths != [block.path for block in after]:
        raise CheckpointError(f"the result has other blocks: {len(after)} for {len(before)}")
    any_one: tuple[str, dict[str, float]] = "swiglu" if before[0].layout.gated else "gelu", {}
    name, parameters = variant or any_one
    if VARIANTS[name].learned and not before[0].extras:
        name, parameters = any_one  # what it learned is not here
    generator = torch.Generator().manual_seed(0)
    errors = []
    for one, other in zip(before, after, strict=True):
        tokens = torch.randn(TOKENS, one.sizes.d_model, generator=generator)
        largest = 0.0
        for expert in range(one.sizes.experts or 1):
            which = None if one.sizes.experts is None else expert
            layer = _layer(source, one, which, name, parameters)
            x = _scaled(tokens, layer)
            wanted = layer(x) if one.layout.fused else _as_stored(source, one, expert, layer, x)
            got = _layer(result, other, which, name, parameters)(x)
            if not bool(wanted.isfinite().all()):
                raise CheckpointError(
                    f"{one.path} of the source has no finite outputs, which nothing can be "
                    "compared with: its weights hold inf, NaN or too large numbers"
                )
            scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            error = float((got - wanted).abs().max() / scale)
            largest = max(largest, error if error == error else float("inf"))
        errors.append(Error(one.path, largest))
    worst = max(errors, key=lambda error: error.largest)
    if worst.largest > ROUNDING:
        raise CheckpointError(
            f"{worst.path} computes something else after the conversion: its largest error is "
            f"{worst.largest:.3g} of the largest output; nothing was written"
        )
    return tuple(errors)


def _scaled(tokens: Tensor, layer: FeedForward) -> Tensor:
    """The input times a number that makes the activation's input of order one.

    Where weights are tiny an activation is nearly linear, and gate and up could change places
    without an error above rounding.
    """
    gated = VARIANTS[layer.variant].gated
    first = layer.get_parameter("gate_proj.weight" if gated else "up_proj.weight")
    size = float((tokens @ first.t()).std())
    return tokens / size if 0 < size < float("inf") else tokens


def _layer(
    checkpoint: Checkpoint,
    block: Block,
    expert: int | None,
    variant: str,
    parameters: dict[str, float],
) -> FeedForward:
    weights = read_weights(checkpoint, block, expert)
    learned = [key for key in VARIANTS[variant].defaults if key in weights]
    kept = [key for key in weights if key not in block.extras] + learned
    layer = module({key: weights[key].float() for key in kept}, block, variant, parameters)
    layer.backend = "definition"
    return layer


def _as_stored(
    checkpoint: Checkpoint, block: Block, expert: int, layer: FeedForward, x: Tensor
) -> Tensor:
    """The output by the matrices as they lie: packed ones are multiplied, then the product split.

    So the order of the units is taken from another formula than that of the conversion.
    """
    held = {key: one for one in block.placed for key in one.keys if expert in _experts(one)}

    def projected(projection: str, values: Tensor) -> Tensor:
        one = held[f"{projection}.weight"]
        product = values @ _plane(checkpoint, block, one, expert, f"{projection}.weight")
        output = _part(one, f"{projection}.weight", product)
        bias = held.get(f"{projection}.bias")
        if bias is None:
            return output
        vector = _plane(checkpoint, block, bias, expert, f"{projection}.bias").reshape(-1)
        return output + _part(bias, f"{projection}.bias", vector)

    parameters = layer.activation_parameters()
    up = projected("up_proj", x)
    if block.layout.gated:
        hidden = functional.gating(projected("gate_proj", x), up, layer.variant, **parameters)
    else:
        hidden = functional.activation(up, layer.variant, **parameters)
    return projected("down_proj", hidden)


def _experts(one: Placed) -> range:
    return range(one.first, one.first + one.experts)


def _plane(checkpoint: Checkpoint, block: Block, one: Placed, expert: int, key: str) -> Tensor:
    """A stored matrix turned so that inputs times it are its outputs, packed ones still so."""
    name, size = block.full(one.name), one.rows * one.cols
    slot = one.keys.index(key) if one.planes > 1 else 0
    first = ((expert - one.first) * one.planes + slot) * size
    stored = checkpoint.elements(name, first, size).view(TORCH[checkpoint.dtype(name)])
    matrix = stored.view(one.rows, one.cols).float()
    return matrix if one.transposed[slot] else matrix.t()


def _part(one: Placed, key: str, product: Tensor) -> Tensor:
    """What a packed product holds of a projection: its units lie in blocks of gate and up."""
    if one.packed is None:
        return product
    pairs = product.view(*product.shape[:-1], -1, 2, one.block)
    return pairs[..., one.keys.index(key), :].flatten(-2)
