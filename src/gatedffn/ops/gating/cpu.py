"""Gating on a processor: the compiled kernels as functions of matrices."""

from collections.abc import Callable, Collection, Mapping, Sequence

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


def bound(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    strides: Sequence[int] | None = None,
    level: str | None = None,
) -> Callable[..., None]:
    """What writes the hidden values of so many rows: a function of (formula, gate, up, hidden).

    `strides` are those of the rows of the three, None where they are contiguous; the last stride
    of each is 1.
    """
    steps = strides or [columns] * 3
    call = kernels.GATING.bind(
        level,
        **dict(zip(("gate_stride", "up_stride", "hidden_stride"), steps, strict=True)),
        rows=rows,
        columns=columns,
        dtype=kernels.DTYPES[dtype],
        threads=kernels.threads(rows * columns),
    )

    def run(formula: kernels.Formula, gate: Tensor, up: Tensor | None, hidden: Tensor) -> None:
        call(
            formula.pointer, gate.data_ptr(), 0 if up is None else up.data_ptr(), hidden.data_ptr()
        )

    return run


def bound_backward(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    learned: Collection[str],
    strides: Sequence[int] | None = None,
    level: str | None = None,
) -> Callable[..., dict[str, Tensor]]:
    """What writes the gradients that have a place, and the hidden values if they have one: a
    function of (formula, grad, gate, up, d_gate, d_up, hidden).

    One of the last three may be the memory of `grad`, none that of a branch. It returns the float64
    sums over the rows of the gradients of the parameters that are `learned`, by name.
    """
    names = ("grad", "gate", "up", "d_gate", "d_up", "hidden")
    steps = zip((f"{name}_stride" for name in names), strides or [columns] * 6, strict=True)
    threads = kernels.threads(rows * columns)
    call = kernels.GATING_BACKWARD.bind(
        level,
        **dict(steps),
        rows=rows,
        columns=columns,
        dtype=kernels.DTYPES[dtype],
        threads=threads,
    )

    def run(formula: kernels.Formula, *tensors: Tensor | None) -> dict[str, Tensor]:
        sums = sums_of(learned, threads, columns)
        places = [0 if t is None else t.data_ptr() for t in tensors]
        call(formula.pointer, *places, *addresses(formula, sums))
        return {name: parts.sum(0) for name, parts in sums.items()}

    return run


def run(
    formula: kernels.Formula,
    gate: Tensor,
    up: Tensor | None,
    hidden: Tensor,
    level: str | None = None,
) -> None:
    """Writes the hidden values of matrices whose last stride is 1."""
    (rows, columns), steps = hidden.shape, [_stride(t) for t in (gate, up, hidden)]
    bound(hidden.dtype, rows, columns, steps, level)(formula, gate, up, hidden)


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
    """`bound_backward` of matrices whose last stride is 1."""
    tensors = (grad, gate, up, d_gate, d_up, hidden)
    (rows, columns), steps = grad.shape, [_stride(t) for t in tensors]
    return bound_backward(grad.dtype, rows, columns, learned, steps, level)(formula, *tensors)


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
