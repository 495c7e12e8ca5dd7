"""The layer on the CPU: the ways to compute it, and which of them is taken.

    few     own kernel, up to 32 tokens: every weight is read once, as it lies
    tiles   own kernel, bfloat16 on processors that multiply tiles: the whole layer for some hundred
            tokens at a time
    blocks  own kernels, any number of tokens: products of what is packed into caches, and the gate
            on each block of them
    torch, onednn
            products by that library, a tile of tokens at a time over reused memory

Each takes all variants. backward.py has the gradients.
"""

import torch

from gatedffn import native
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward.call import Call, some
from gatedffn.ops.feed_forward.products import (
    by_onednn,
    by_torch,
    has_onednn,
)
from gatedffn.ops.feed_forward.ways import Saved, Way, Ways, tiled
from gatedffn.ops.scratch import matrices, scratch

FEW = 32  # tokens that few.h takes
FEW_BESIDE_TILES = 4  # tokens up to which it is worth a measurement where tiles can be multiplied
BLOCKS = 17  # tokens from which it is worth to pack the weights
SMALL = 1 << 16  # numbers of a projection below which the calls cost more than what they do
AT_A_TIME = 512  # tokens whose hidden values are held at a time
TILE = 24 << 20  # bytes of gate and up that a library's products work on at a time
CACHE = 2 << 20  # bytes of tokens and hidden values that tiles.h keeps in cache


def by_rule(names: list[str], call: Call) -> list[str]:
    """The names in the order of the rule, which takes the first without measuring.

    Libraries are several times slower than blocks where a processor lacks the instructions for
    products in half precision: they convert, or multiply number by number.
    """
    if native.multiplies(str(call.x.dtype)):
        return names
    return sorted(names, key=lambda name: name in ("torch", "onednn"))


def impossible(call: Call, save: bool) -> dict[str, str]:
    """The ways that cannot compute a call, and why."""
    reasons: dict[str, str] = {}
    own = call.no_layer_kernels if call.tokens else "there are no tokens"
    if own is not None:
        return {"few": own, "tiles": own, "blocks": own, **without_onednn(call)}
    if call.tokens > FEW:
        reasons["few"] = f"it takes up to {FEW} tokens, these are {call.tokens}"
    elif save:
        reasons["few"] = "it does not save gate and up"
    if call.x.dtype != torch.bfloat16:
        reasons["tiles"] = f"it is for bfloat16, these are {call.x.dtype}"
    elif not kernels.has_tiles():
        reasons["tiles"] = "this processor does not multiply tiles of bfloat16"
    return reasons | without_onednn(call)


def without_onednn(call: Call) -> dict[str, str]:
    """Why oneDNN is not among the ways, if it is not."""
    if has_onednn(call.x.dtype):
        return {}
    return {"onednn": f"this PyTorch's oneDNN has no linear layer for {call.x.dtype} here"}


def unlikely(call: Call) -> dict[str, str]:
    """The ways that are not worth a measurement, and why."""
    reasons = {}
    if call.x.dtype == torch.bfloat16 and call.tokens > FEW_BESIDE_TILES and kernels.has_tiles():
        reasons["few"] = f"beyond {FEW_BESIDE_TILES} tokens tiles are faster"
    if call.x.dtype != torch.float32:
        reasons["onednn"] = f"for {call.x.dtype} it is PyTorch's default already"
    if call.tokens < BLOCKS and call.weights.gate.numel() > SMALL:
        reasons["blocks"] = f"below {BLOCKS} tokens packing costs more than the products"
    return reasons


# The ways.


def _few(call: Call, save: bool, level: str | None = None) -> Saved:
    """Every weight is read once; see few.h."""
    assert not save
    x, tokens, d_model = call.x, call.tokens, call.d_model
    described = call.described
    assert described is not None
    made, y = call.output()
    memory = scratch(kernels.few_scratch(level, x.dtype, tokens, d_model, call.d_hidden))
    kernels.library(level).gatedffn_few(
        kernels.DTYPES[x.dtype],
        described.pointer,
        *kernels.matrix(x),
        *call.projections,
        *kernels.matrix(y),
        tokens,
        d_model,
        call.d_hidden,
        call.d_out,
        memory.data_ptr(),
        layer_threads(call),
    )
    return made, None, None


def _tiles(call: Call, save: bool, level: str | None = None) -> Saved:
    """Products of tiles; see tiles.h."""
    x, w, tokens, d_model = call.x, call.weights, call.tokens, call.d_model
    described = call.described
    assert described is not None
    made, y = call.output()
    gate = x.new_empty(tokens, call.d_hidden) if save else None
    up = x.new_empty(tokens, call.d_hidden) if save and w.up is not None else None
    cached = CACHE // ((d_model + call.d_hidden) * x.element_size())
    tile = min(tokens, max(32, cached // 32 * 32))
    threads = layer_threads(call)
    size = kernels.tiles_scratch(level, tokens, d_model, call.d_hidden, tile, threads)
    memory = scratch(size)
    kernels.library(level).gatedffn_tiles(
        described.pointer,
        *kernels.matrix(x),
        *call.projections,
        *kernels.matrix(y),
        *kernels.matrix(gate),
        *kernels.matrix(up),
        tokens,
        d_model,
        call.d_hidden,
        call.d_out,
        tile,
        memory.data_ptr(),
        threads,
    )
    return made, gate, up


def _blocks(call: Call, save: bool, level: str | None = None) -> Saved:
    """Products of packed blocks; see blocks.h."""
    x, w, tokens, d_hidden = call.x, call.weights, call.tokens, call.d_hidden
    described = call.described
    assert described is not None
    made, y = call.output()
    gate = x.new_empty(tokens, d_hidden) if save else None
    up = x.new_empty(tokens, d_hidden) if save and w.up is not None else None
    size = -(-tokens // -(-tokens // AT_A_TIME))  # tiles of about the same size
    (hidden,) = matrices(1, size if w.down is not None else 0, d_hidden, x)
    threads = layer_threads(call)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        sizes = rows.stop - start, call.d_model, d_hidden, call.d_out
        memory = scratch(kernels.blocks_scratch(level, x.dtype, *sizes, threads), "blocks")
        kernels.library(level).gatedffn_blocks(
            kernels.DTYPES[x.dtype],
            described.pointer,
            *kernels.matrix(some(x, rows)),
            *call.projections,
            *kernels.matrix(some(y, rows)),
            *kernels.matrix(hidden),
            *kernels.matrix(None if gate is None else some(gate, rows)),
            *kernels.matrix(None if up is None else some(up, rows)),
            *sizes,
            memory.data_ptr(),
            threads,
        )
    return made, gate, up


def layer_threads(call: Call) -> int:
    """How many threads are worth waking for a layer."""
    multiply_adds = 3 * call.tokens * call.d_model * call.d_hidden
    return kernels.threads(multiply_adds, kernels.MULTIPLY_ADDS_PER_THREAD)


def _torch(call: Call, save: bool) -> Saved:
    return tiled(TILE, by_torch, call, save)


def _onednn(call: Call, save: bool) -> Saved:
    return tiled(TILE, by_onednn, call, save)


_WAYS: dict[str, Way] = {
    "few": _few,
    "tiles": _tiles,
    "torch": _torch,
    "onednn": _onednn,
    "blocks": _blocks,
}

WAYS = Ways(_WAYS, impossible, unlikely, by_rule)
"""The ways of the CPU by the names that choices, `explain` and `backend=` use."""
