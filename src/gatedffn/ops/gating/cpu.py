"""Gating on a processor: the compiled kernels as functions of matrices."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from gatedffn.ops import kernels

DTYPES = kernels.DTYPES
describe = kernels.describe


def missing(_: torch.device) -> str | None:
    """Why there are no kernels; None when there are."""
    return kernels.missing()


def level(_device: torch.device, _dtype: torch.dtype) -> str:
    """What the speed of the kernels depends on."""
    return kernels.level()


def places(count: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for so many matrices, used again by the next call."""
    size = count * rows * columns * like.element_size()
    return kernels.scratch(size)[:size].view(like.dtype).view(count, rows, columns)


def run(
    formula: kernels.Formula,
    gate: Tensor,
    up: Tensor | None,
    hidden: Tensor,
    level: str | None = None,
) -> None:
    """Writes the hidden values of matrices whose last stride is 1."""
    count, columns = hidden.shape
    kernel = kernels.GATING.bind(
        level,
        gate_stride=_stride(gate),
        up_stride=_stride(up),
        hidden_stride=_stride(hidden),
        rows=count,
        columns=columns,
        dtype=kernels.DTYPES[hidden.dtype],
        threads=kernels.threads(count * columns),
    )
    kernel(formula.pointer, *map(_address, (gate, up, hidden)))


def run_backward(
    formula: kernels.Formula,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    d_gate: Tensor | None,
    d_up: Tensor | None,
    hidden: Tensor | None,
    learned: Collection[str],
    level: str | None = None,
) -> dict[str, Tensor]:
    """Writes the gradients that have a place, and the hidden values if they have one.

    One of the last three may be the memory of `grad`, none that of a branch. Returns the float64
    sums over the rows of the gradients of the parameters that are `learned`, by name.
    """
    count, columns = grad.shape
    threads = kernels.threads(count * columns)
    sums = sums_of(learned, threads, columns)
    kernel = kernels.GATING_BACKWARD.bind(
        level,
        grad_stride=_stride(grad),
        gate_stride=_stride(gate),
        up_stride=_stride(up),
        d_gate_stride=_stride(d_gate),
        d_up_stride=_stride(d_up),
        hidden_stride=_stride(hidden),
        rows=count,
        columns=columns,
        dtype=kernels.DTYPES[grad.dtype],
        threads=threads,
    )
    matrices = map(_address, (grad, gate, up, d_gate, d_up, hidden))
    kernel(formula.pointer, *matrices, *addresses(formula, sums))
    return {name: parts.sum(0) for name, parts in sums.items()}


def sums_of(learned: Collection[str], threads: int, columns: int) -> dict[str, Tensor]:
    """Zeros for each thread to add up the gradients of those parameters."""
    return {
        name: torch.zeros(threads, columns, dtype=torch.float64, device="cpu") for name in learned
    }


def addresses(formula: kernels.Formula, sums: Mapping[str, Tensor]) -> list[int]:
    """Where a kernel adds them up: the two parameters of phi, 0 for what is not wanted."""
    places = [sums[name].data_ptr() if name in sums else 0 for name in formula.of_phi]
    return [*places, 0, 0][:2]


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else kernels.address(x)
