"""What the fused kernels share: tiles that are read and written through pointers or descriptors,
the order in which programs take them.

A descriptor is copied through by the hardware that Hopper and newer chips have for it, whole
tiles at a time; it wants 16-byte alignment. Pointers take anything whose last stride is 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gatedffn.errors import ShapeError
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.variants import VARIANTS

ALIGNMENT = 16  # bytes, of every row's start
FURTHEST = 1 << 40  # bytes: the largest stride of a descriptor
MOST = (1 << 31) - (1 << 12)  # rows or columns: their numbers, and a tile more, are 32-bit integers


@triton.jit
def load(
    source, row, column, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The tile of a matrix that starts at `row` and `column`, 0 beyond its ends."""
    if DESCRIPTORS:
        tile = source.load([row, column])
    else:
        down = row + tl.arange(0, ROWS)[:, None]
        along = column + tl.arange(0, COLUMNS)[None, :]
        places = source + down.to(tl.int64) * stride + along
        tile = tl.load(places, mask=(down < rows) & (along < columns), other=0.0)
    return tile


@triton.jit
def store(
    target, tile, row, column, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Writes what of a tile lies within the matrix, rounded to its dtype."""
    if DESCRIPTORS:
        target.store([row, column], tile.to(target.dtype))
    else:
        down = row + tl.arange(0, ROWS)[:, None]
        along = column + tl.arange(0, COLUMNS)[None, :]
        places = target + down.to(tl.int64) * stride + along
        within = (down < rows) & (along < columns)
        tl.store(places, tile.to(target.dtype.element_ty), mask=within)


@triton.jit
def place(index, tiles_down, tiles_along, GROUP: tl.constexpr):
    """The tile that comes at `index`: GROUP rows of tiles are gone through column by column, so
    that programs which run at the same time read the same parts of both operands.
    """
    size = GROUP * tiles_along
    first = index // size * GROUP
    high = min(tiles_down - first, GROUP)
    return first + index % size % high, index % size // high


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile; both are where they were, in registers."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


# The side of Python.


def check(like: Tensor, *expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """The kernels trust sizes, dtypes and devices.

    Raises:
        ShapeError: a tensor has another size than the one beside it, or differs from `like`.
    """
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, the other operands want {shape}")
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ShapeError(
                f"{name} is {tensor.dtype} on {tensor.device}, the other operands are "
                f"{like.dtype} on {like.device}"
            )
        if tensor.dim() == 2 and tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ShapeError(f"{name} has the strides {tensor.stride()}, the last must be 1")


def check_branches(variant: str, *of_up: Tensor | None) -> None:
    """Raises where a tensor of the up branch is missing, or given to a variant without one."""
    gated = VARIANTS[variant].gated
    if (of_up[0] is not None) != gated or (not gated and any(t is not None for t in of_up)):
        raise ShapeError(f"{variant!r} is given the branches of another kind of variant")


def have_descriptors(*matrices: Tensor | None) -> bool:
    """Whether descriptors can be made of all of these matrices."""
    return all(
        matrix.stride(1) == 1
        and matrix.data_ptr() % ALIGNMENT == 0
        and matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0
        # Beyond its width, so that no element has two places, and not too far.
        and matrix.shape[1] <= matrix.stride(0) < FURTHEST // matrix.element_size()
        for matrix in matrices
        if matrix is not None
    )


def joinable(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices of a size can be read as one, whose outermost stride leads from the
    one to the other.
    """
    apart = abs(second.data_ptr() - first.data_ptr())
    fits = first.stride(0) == second.stride(0) and have_descriptors(first, second)
    return fits and first.nbytes <= apart < FURTHEST


def descriptor(matrix: Tensor | None, *block: int) -> TensorDescriptor | None:
    """A matrix as tiles of a size."""
    if matrix is None:
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def joined(first: Tensor, second: Tensor, *block: int) -> TensorDescriptor:
    """Both matrices as tiles `(2, *block)`; what lies at the lower address is the first of two."""
    low, high = sorted((first, second), key=Tensor.data_ptr)
    apart = (high.data_ptr() - low.data_ptr()) // low.element_size()
    return TensorDescriptor(low, [2, *low.shape], [apart, *low.stride()], [2, *block])


def parted(config: Config, results: Sequence[Tensor | None]) -> Config:
    """In smaller parts where descriptors bring the operands, but what a kernel writes has none:
    the sums leave few registers for the addresses of its elements.
    """
    if config.operands == "pointers" or config.specialize or have_descriptors(*results):
        return config
    return replace(config, subtiles=4 * config.subtiles)


def places(results: Sequence[Tensor | None], config: Config) -> tuple[Any, ...]:
    """What a kernel writes to: descriptors where that is possible, else the tensors.

    The compiler cannot share a descriptor's tile among the warps that it specializes.
    """
    if config.operands == "pointers" or config.specialize or not have_descriptors(*results):
        return tuple(results)
    return tuple(descriptor(t, config.tokens, config.units // config.subtiles) for t in results)


def stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def programs(tiles: int, for_each: int, device: torch.device) -> int:
    """How many programs share the tiles: as many as the chip runs at a time, if there are as many.

    `for_each` is how many a multiprocessor holds.
    """
    return min(tiles, for_each * _multiprocessors(device))


def _multiprocessors(device: torch.device) -> int:
    if gpu.interpreting():
        return 2  # so that there, too, a program takes several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count
