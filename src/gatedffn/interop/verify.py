"""Whether a converted block computes what the original does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoint import Checkpoint
from gatedffn.interop.loading import module, read_weights
from gatedffn.layouts.blocks import Block
from gatedffn.variants import VARIANTS

TOKENS = 8
ROUNDING = 1e-5
"""The largest error, of the largest output, that float32 can make of the same weights."""


@dataclass(frozen=True, slots=True)
class Error:
    """The largest error of a block's outputs, as a part of the largest output."""

    path: str
    largest: float


def compare(
    source: Checkpoint,
    before: Sequence[Block],
    result: Checkpoint,
    after: Sequence[Block],
    variant: tuple[str, dict[str, float]] | None,
) -> tuple[Error, ...]:
    """The errors of all blocks, run as `FeedForward` in float32 on the same random input.

    Where nothing says what the blocks compute, they are compared as SwiGLU, or GELU without a gate;
    norms and other extras are left out, since their bytes are copied.

    Raises:
        CheckpointError: the blocks are not the same, or one is above rounding.
    """
    paths = [block.path for block in before]
    if paths != [block.path for block in after]:
        raise CheckpointError(f"the result has other blocks: {len(after)} for {len(before)}")
    name, parameters = variant or ("swiglu" if before[0].layout.gated else "gelu", {})
    generator = torch.Generator().manual_seed(0)
    errors = []
    for one, other in zip(before, after, strict=True):
        x = torch.randn(TOKENS, one.sizes.d_model, generator=generator)
        largest = 0.0
        for expert in range(one.sizes.experts or 1):
            which = None if one.sizes.experts is None else expert
            wanted = _run(source, one, which, name, parameters, x)
            got = _run(result, other, which, name, parameters, x)
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


@torch.no_grad()
def _run(
    checkpoint: Checkpoint,
    block: Block,
    expert: int | None,
    variant: str,
    parameters: dict[str, float],
    x: torch.Tensor,
) -> torch.Tensor:
    weights = read_weights(checkpoint, block, expert)
    learned = [key for key in VARIANTS[variant].defaults if key in weights]
    kept = [key for key in weights if key not in block.extras] + learned
    layer = module({key: weights[key].float() for key in kept}, block, variant, parameters)
    layer.backend = "definition"
    output: torch.Tensor = layer(x)
    return output
