"""Gating on a GPU: the kernels of `gpu_kernels` as functions of matrices.

Rows may lie any stride apart, so the halves of a packed tensor are read, and their gradients
written, in place; so are a gate and an up branch that take turns in one tensor. Where pointers,
strides and widths are multiples of 16 bytes, all accesses are.

Kernels are imported where they are launched: without Triton there is the definition.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedffn.ops import gpu

Matrices = Sequence[Tensor | None]

VECTOR = 16  # bytes that a thread loads or stores at once
LARGE = 1 << 20  # elements, from which on there are programs enough without making them small
ACROSS = 1024  # columns of a tile at most, where there are several rows
# Where parameters learn, a program walks down some tiles and keeps their sums in registers.
WALK = 64  # tiles at most, so that no sum gets long
PROGRAMS = 4096  # are enough for every chip, so beyond that a program takes more tiles


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes at a time: rows and columns, both powers of 2, and its warps."""

    rows: int
    columns: int
    warps: int

    def across(self, columns: int) -> int:
        return -(-columns // self.columns)


@functools.lru_cache(maxsize=4096)
def tile_of(rows: int, columns: int, size: int, tensors: int) -> Tile:
    """The tile for matrices of such elements, of which so many are read or written.

    A thread has two vectors of each in flight, or one where there are many; and one where there
    would else be too few programs for a chip.
    """
    few = rows * columns < LARGE or tensors > 3
    warps = 4 if rows * columns < LARGE else 8
    elements = warps * 32 * (VECTOR // size) * (1 if few else 2)
    limit = elements if rows == 1 else min(elements, ACROSS)
    wide = min(limit, power_of_2(columns))
    high = min(elements // wide, power_of_2(rows))
    return Tile(high, wide, warps)


DTYPES = gpu.DTYPES
describe, missing = gpu.describe, gpu.missing


def level(device: torch.device, dtype: torch.dtype) -> str:
    """What the speed of the kernels depends on."""
    return gpu.level(device) + (", TF32" if gpu.kind_of(dtype) == "tf32" else "")


def places(count: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for so many matrices, which PyTorch keeps for the next call by itself."""
    return like.new_empty(count, rows, columns)


def bound(_dtype: torch.dtype, rows: int, columns: int) -> Callable[..., None]:
    """`run` for contiguous tensors of so many rows, whatever their dimensions."""

    def of_views(formula: gpu.Formula, *tensors: Tensor | None) -> None:
        run(formula, *(None if t is None else t.view(rows, columns) for t in tensors))  # type: ignore[arg-type]

    return of_views


def bound_backward(
    _dtype: torch.dtype, rows: int, columns: int, learned: Collection[str]
) -> Callable[..., dict[str, Tensor]]:
    """`run_backward` for contiguous tensors of so many rows."""

    def of_views(formula: gpu.Formula, *tensors: Tensor | None) -> dict[str, Tensor]:
        views = (None if t is None else t.view(rows, columns) for t in tensors)
        return run_backward(formula, *views, learned)  # type: ignore[arg-type, call-arg]

    return of_views


def run(formula: gpu.Formula, gate: Tensor, up: Tensor | None, hidden: Tensor) -> None:
    """Writes the hidden values of matrices whose last stride is 1, or of a pair: two that take
    turns in one tensor.
    """
    from gatedffn.ops.gating import gpu_kernels

    pair = pair_of(gate, up)
    tensors = (gate, up, hidden)
    rows, columns = hidden.shape
    tile = tile_of(rows, columns, hidden.element_size(), len(tensors))
    grid = (-(-rows // tile.rows) * tile.across(columns),)
    with gpu.on_device_of(hidden):
        gpu_kernels.forward[grid](
            gate if pair != 1 else up,
            up,
            hidden,
            *formula.values(),
            *_strides(tensors),
            rows,
            columns,
            **formula.constants(),
            PAIR=pair,
            UNIT=_unit(tensors),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )


def run_backward(
    formula: gpu.Formula,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    d_gate: Tensor | None,
    d_up: Tensor | None,
    hidden: Tensor | None,
    learned: Collection[str],
) -> dict[str, Tensor]:
    """Writes the gradients that have a place, and the hidden values if they have one.

    One of the last three may be the memory of `grad`, none that of a branch. Branches may be a
    pair, and so may their gradients. Returns the float64 sums over the rows of the gradients of the
    parameters that are `learned`, by name: those of each program, summed in a fixed order.
    """
    from gatedffn.ops.gating import gpu_kernels

    pair, d_pair = pair_of(gate, up), pair_of(d_gate, d_up)
    tensors = (grad, gate, up, d_gate, d_up, hidden)
    rows, columns = grad.shape
    held = sum(t is not None for t in tensors) + len(learned)
    tile = tile_of(rows, columns, grad.element_size(), held)
    high, across = -(-rows // tile.rows), tile.across(columns)
    walk = min(WALK, max(1, high * across // PROGRAMS)) if learned else 1
    shares = -(-high // walk)
    sums = {name: grad.new_empty((shares, columns), dtype=torch.float32) for name in learned}
    with gpu.on_device_of(grad):
        gpu_kernels.backward[(shares * across,)](
            grad,
            gate if pair != 1 else up,
            up,
            d_gate if d_pair != 1 else d_up,
            d_up,
            hidden,
            *[*(sums.get(name) for name in formula.of_phi), None, None][:2],
            *formula.values(),
            *_strides(tensors),
            rows,
            columns,
            walk,
            **formula.constants(),
            PAIR=pair,
            D_PAIR=d_pair,
            UNIT=_unit(tensors),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return {name: parts.sum(0, dtype=torch.float64) for name, parts in sums.items()}


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least `n`."""
    return 1 << (n - 1).bit_length()


def pair_of(one: Tensor | None, other: Tensor | None) -> int | None:
    """Whether two matrices take turns in one tensor, column by column, and which is first: 0 or 1;
    None where they do not.
    """
    if one is None or other is None or one.stride() != other.stride() or one.stride(1) != 2:
        return None
    apart = (other.data_ptr() - one.data_ptr()) // one.element_size()
    if abs(apart) != 1 or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return None
    return 0 if apart == 1 else 1


def _strides(tensors: Matrices) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]


def _unit(tensors: Matrices) -> int:
    """The elements of a vector if every vector of these matrices is aligned, else 1."""
    given = [t for t in tensors if t is not None]
    size = given[0].element_size()
    numbers = [given[0].shape[1] * size]
    for t in given:
        # The second of a pair lies one element behind the first.
        address = t.data_ptr() if t.stride(1) == 1 else t.data_ptr() // (2 * size) * (2 * size)
        numbers += [address, t.stride(0) * size]
    return VECTOR // size if all(number % VECTOR == 0 for number in numbers) else 1


def matrices(tensors: Matrices, by_column: bool, pairs: Sequence[int]) -> list[Tensor | None]:
    """The tensors as rows of their last dimension: views, or copies where there is no view.

    Where columns need not be told apart and all are contiguous, it is one long row. `pairs` are the
    places from which on two may be a pair.
    """
    given = [t for t in tensors if t is not None]
    if not by_column and all(t.is_contiguous() for t in given):
        return [None if t is None else t.view(1, -1) for t in tensors]
    flat = [None if t is None else t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in tensors]
    found = [place for place in pairs if pair_of(*flat[place : place + 2]) is not None]
    kept = {*found, *(place + 1 for place in found)}
    return [
        t if t is None or place in kept or t.stride(1) == 1 else t.contiguous()
        for place, t in enumerate(flat)
    ]


def writable(tensors: Sequence[Tensor]) -> bool:
    """Whether the matrices of these tensors are views that the kernel can write."""
    try:
        flat = [t.view(-1, t.shape[-1]) for t in tensors]
    except RuntimeError:  # rows that do not lie evenly apart
        return False
    return all(t.stride(1) == 1 for t in flat) or pair_of(flat[0], flat[-1]) is not None
