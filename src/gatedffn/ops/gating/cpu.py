"""Gating on the CPU: the compiled kernels; `engine` says when they are taken."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import kernels

Parameters = Mapping[str, Value]


describe = kernels.describe


def unsuited(gate: Tensor, up: Tensor | None, parameters: Parameters) -> str | None:
    """Why the kernels cannot take these branches; None when they can."""
    return unsuited_branches(gate, up, parameters, kernels.DTYPES) or kernels.missing()


def unsuited_branches(
    gate: Tensor,
    up: Tensor | None,
    parameters: Parameters,
    dtypes: Collection[torch.dtype],
) -> str | None:
    """Why kernels of these dtypes cannot take these branches, whatever the machine has."""
    if gate.dtype not in dtypes:
        return f"there is no kernel for {gate.dtype}"
    if up is not None and (up.dtype != gate.dtype or up.shape != gate.shape):
        return "the branches are of different dtypes or shapes"
    if up is not None and up.device != gate.device:
        return "the branches are on different devices"
    return unsuited_parameters(parameters, gate.shape[-1] if gate.dim() else 1)


def unsuited_parameters(parameters: Parameters, width: int) -> str | None:
    """Why the kernels cannot take these parameters; None when they can."""
    for name, value in parameters.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.numel() != width or value.shape[-1] != width:
            return f"{name} is neither one number nor one for each hidden unit"
    return None


def run(
    described: kernels.Described,
    gate: Tensor,
    up: Tensor | None,
    hidden: Tensor,
    level: str | None = None,
) -> None:
    """Writes the hidden values of matrices whose last stride is 1."""
    count, columns = hidden.shape
    kernels.library(level).gatedffn_gating(
        kernels.DTYPES[hidden.dtype],
        described.pointer,
        *kernels.matrix(gate),
        *kernels.matrix(up),
        *kernels.matrix(hidden),
        count,
        columns,
        kernels.threads(count * columns),
    )


def run_backward(
    described: kernels.Described,
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
    kernels.library(level).gatedffn_gating_backward(
        kernels.DTYPES[grad.dtype],
        described.pointer,
        *kernels.matrix(grad),
        *kernels.matrix(gate),
        *kernels.matrix(up),
        *kernels.matrix(d_gate),
        *kernels.matrix(d_up),
        *kernels.matrix(hidden),
        *addresses(described, sums),
        count,
        columns,
        threads,
    )
    return {name: parts.sum(0) for name, parts in sums.items()}


def sums_of(learned: Collection[str], threads: int, columns: int) -> dict[str, Tensor]:
    """Zeros for each thread to add up the gradients of those parameters."""
    return {
        name: torch.zeros(threads, columns, dtype=torch.float64, device="cpu") for name in learned
    }


def addresses(described: kernels.Described, sums: Mapping[str, Tensor]) -> list[int | None]:
    """Where a kernel adds them up: the two parameters of phi, None for what is not wanted."""
    places = [sums[name].data_ptr() if name in sums else None for name in described.of_phi]
    return [*places, None, None][:2]


def matrices(
    tensors: Sequence[Tensor | None], by_column: bool, _: Sequence[int] = ()
) -> list[Tensor | None]:
    """The tensors as rows of their last dimension: views, or copies where there is no view.

    Where columns need not be told apart and all are contiguous, it is one long row.
    """
    given = [t for t in tensors if t is not None]
    if not by_column and all(t.is_contiguous() for t in given):
        return [None if t is None else t.view(1, -1) for t in tensors]
    return [None if t is None else rows(t) for t in tensors]


def rows(x: Tensor) -> Tensor:
    """The tensor as rows of its last dimension, whose stride is 1."""
    matrix = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def writable(tensors: Sequence[Tensor]) -> bool:
    """Whether the rows of these tensors are views that the kernel can write."""
    try:
        return all(x.view(-1, x.shape[-1]).stride(1) == 1 for x in tensors)
    except RuntimeError:  # rows that do not lie evenly apart
        return False
