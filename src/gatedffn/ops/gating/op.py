"""Gating as operators: `gatedffn::gating` of two branches, `gatedffn::packed_gating` of a tensor
that holds both, and their backward.

Forward saves its operands and the learned parameters, nothing else of their size. The gradient of a
packed tensor is written in place: with an operator of two branches, PyTorch would make a tensor of
zeros for the gradient of each branch, copy, and add the two.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from gatedffn.errors import ParameterError, ShapeError
from gatedffn.ops.checks import check_fit, check_floating
from gatedffn.ops.gating.reference import ORDERS, result_dtype
from gatedffn.ops.gating.ways import WAYS, branches_of
from gatedffn.ops.operator import Call, Operator
from gatedffn.ops.sharded import Split, whole
from gatedffn.ops.spec import Tensors


def _check(tensors: Tensors, call: Call) -> None:
    row, parameters, settings, _ = call
    if settings:
        check_packed(tensors[0], *settings)
    gate, up = branches_of(tensors, settings)
    check_floating("gate" if row.gated else "x", gate)
    if (up is None) == row.gated:
        raise ShapeError(f"{row.name!r} is given the branches of another kind of variant")
    if up is not None:
        check_floating("up", up)
        if gate.shape != up.shape:
            raise ShapeError(
                f"gate is {tuple(gate.shape)} and up is {tuple(up.shape)}: they must be equal"
            )
        if gate.device != up.device:
            raise ShapeError(f"gate is on {gate.device} and up on {up.device}: move one of them")
    check_fit(row, parameters, gate.shape, gate.device)


def check_packed(x: object, dim: int, order: str) -> None:
    """Raises unless a tensor holds both branches along a dimension.

    Raises:
        ParameterError: the order is none of the three.
        ShapeError: it is no floating tensor, has no such dimension, or its size there is odd.

    >>> check_packed(Tensor([[1.0, 2.0]]), -1, "gate_up")
    """
    check_floating("x", x)
    assert isinstance(x, Tensor)
    if order not in ORDERS:
        raise ParameterError(f"order is {order!r}: it must be one of {', '.join(ORDERS)}")
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"dim is {dim}, but the packed tensor is {tuple(x.shape)}")
    if x.shape[dim] % 2:
        raise ShapeError(
            f"the packed size along dim {dim} of {tuple(x.shape)} is odd: it holds gate and up, "
            "so it must be even"
        )


def _result(tensors: Tensors, call: Call) -> Tensor:
    gate, up = branches_of(tensors, call.settings)
    return gate.new_empty(gate.shape, dtype=result_dtype(gate, up))


def _formula(_tensors: Tensors, _call: Call) -> str:
    return "a compiler joins the formula with what is around it"


def _of_a_part(dim: int, order: str) -> tuple[int, str]:
    """Dimensions of a nested tensor are one more than those of the tensors in it."""
    if dim == 0:
        raise ShapeError("dim 0 of a nested tensor counts the tensors in it: choose another")
    return (dim - 1 if dim > 0 else dim), order


def _split(placements: Sequence[Any], tensors: Tensors, settings: tuple[Any, ...]) -> Split:
    """Any part of the branches will do, but none of the dimension that holds both."""
    x = tensors[0]
    assert x is not None
    lies = next((p for p in placements if p is not None and p.is_shard()), None)
    if lies is None or (settings and lies.dim == settings[0] % x.dim()):
        return whole(placements, tensors, settings)
    return Split([lies] * len(placements), lies, lies)


_operator = partial(
    Operator,
    table=WAYS,
    check=_check,
    result=_result,
    formula=_formula,
    split=_split,
)
gating = _operator("gating", "gate up?", "")
"""`phi(gate) * psi(up)`, a function of both (None without a gate), the row and all parameters."""
packed_gating = _operator("packed_gating", "packed", "int dim, str order", of_a_part=_of_a_part)
"""The same of one tensor that holds both branches; its settings are (dim, order)."""
