"""Experts as an operator: `gatedffn::experts`, its `_saving` and its `_backward`.

For training with `save="gate_up"` gate and up of all slots are kept besides the input, sorted as
`reference.Pairs` sorts them, each (slots, d_hidden); with `save="input"` nothing is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gatedffn.errors import BackendError, SettingError, ShapeError
from gatedffn.ops.checks import check_fit, check_floating
from gatedffn.ops.experts.ways import OPERANDS, WAYS, why_unlike
from gatedffn.ops.feed_forward.op import SAVES
from gatedffn.ops.gating.reference import ORDERS
from gatedffn.ops.operator import Call, Operator
from gatedffn.ops.sharded import Split, cut_apart, whole
from gatedffn.ops.spec import Tensors

BACKENDS = ("auto", *WAYS.names)
WEIGHS = ("output", "input")


def check(tensors: Tensors, call: Call) -> None:
    """Raises unless a call is one that experts have a meaning for.

    Raises:
        ShapeError: the operands do not fit together, or a parameter not to them.
        SettingError, BackendError: as `check_options`.
    """
    row, parameters, (order, weigh, save), backend = call
    check_options(order, weigh, save, backend)
    x, index, weights, gate, up, down, gate_bias, up_bias, down_bias = tensors
    first = "gate" if row.gated else "up"
    if (up is not None or bool(order)) != row.gated or (up is not None and order):
        wanted = "a gate and an up weight, or both packed in an order" if row.gated else "one"
        raise ShapeError(f"{row.name!r} takes {wanted}")
    for name, t in (
        ("x", x),
        ("weights", weights),
        (f"{first}_weight", gate),
        ("down_weight", down),
    ):
        check_floating(name, t)
    assert x is not None
    assert weights is not None
    assert gate is not None
    assert down is not None
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        given = getattr(index, "dtype", type(index).__name__)
        raise ShapeError(f"index is {given}: it must be a tensor of int64 or int32")
    if gate.dim() != 3 or down.dim() != 3:
        raise ShapeError(
            f"{first}_weight is {tuple(gate.shape)} and down_weight {tuple(down.shape)}: they must "
            "be (experts, d_hidden, d_model) and (experts, d_out, d_hidden)"
        )
    count, d_hidden, d_model = gate.shape
    if order:
        if d_hidden % 2:
            raise ShapeError(
                f"{first}_weight is {tuple(gate.shape)}: packed, its second size must be even"
            )
        d_hidden //= 2
    if x.dim() == 0 or x.shape[-1] != d_model:
        raise ShapeError(
            f"x is {tuple(x.shape)} and {first}_weight {tuple(gate.shape)}: the last size of both "
            "must be d_model"
        )
    if index.shape != weights.shape or index.shape[:-1] != x.shape[:-1] or not index.dim():
        raise ShapeError(
            f"x is {tuple(x.shape)}, index {tuple(index.shape)} and weights "
            f"{tuple(weights.shape)}: they must be (..., d_model), (..., slots) and (..., slots)"
        )
    d_out = down.shape[1]
    for name, t, shape in (
        ("up_weight", up, gate.shape),
        ("down_weight", down, (count, d_out, d_hidden)),
        (f"{first}_bias", gate_bias, gate.shape[:2]),
        ("up_bias", up_bias, (count, d_hidden)),
        ("down_bias", down_bias, (count, d_out)),
    ):
        if t is None:
            continue
        check_floating(name, t)
        if t.shape != torch.Size(shape):
            raise ShapeError(
                f"{name} is {tuple(t.shape)}: with {first}_weight {tuple(gate.shape)} and "
                f"down_weight {tuple(down.shape)} it must be {tuple(shape)}"
            )
    for name, t in zip(OPERANDS, tensors, strict=True):
        if t is not None and t.device != x.device:
            raise ShapeError(f"{name} is on {t.device} and x on {x.device}: move one")
    check_fit(row, parameters, (d_hidden,), x.device)  # the same for all tokens


def check_options(order: str, weigh: str, save: str, backend: str) -> None:
    """Raises unless the options are among those that exist.

    Raises:
        SettingError: `order`, `weigh` or `save` is none that exists.
        BackendError: `backend` is none that exists.

    >>> check_options("gate_up", "output", "input", "auto")
    """
    for name, value, known in (
        ("order", order, ("", *ORDERS)),
        ("weigh", weigh, WEIGHS),
        ("save", save, SAVES),
    ):
        if value not in known:
            names = ", ".join(filter(None, known))
            raise SettingError(f"{name} is {value!r}: it must be one of {names}")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}: it must be one of {', '.join(BACKENDS)}")


def _result(tensors: Tensors, _call: Call) -> Tensor:
    x, *_, down, _, _, _ = tensors
    return x.new_empty((*x.shape[:-1], down.shape[1]))  # type: ignore[union-attr]


def _saved(tensors: Tensors, call: Call) -> Sequence[Tensor]:
    x, index, _, gate, *_ = tensors
    order, _, save = call.settings
    assert x is not None
    assert index is not None
    assert gate is not None
    if save != "gate_up":
        return []
    d_hidden = gate.shape[1] // (2 if order else 1)
    return [x.new_empty(index.numel(), d_hidden) for _ in range(1 + call.row.gated)]


def _split(placements: Sequence[Any], tensors: Tensors, settings: tuple[Any, ...]) -> Split:
    """By experts or by hidden units where the first matrices are, else by tokens where the input
    is.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    x, gate, order = placements[0], placements[3], settings[0]
    everywhere = Replicate()
    first: Any = tensors[3]
    dims, by_experts = tensors[0].dim(), Shard(0)  # type: ignore[union-attr]
    if gate == by_experts and [*first.placements].count(by_experts) == 1:
        lie = [*[everywhere] * 3, *[by_experts] * 6]
        return Split(lie, Partial(), Partial(), own=partial(_own_experts, len(first)))
    in_parts = getattr(gate, "dim", None) == 1 and not (order and cut_apart(first, 1, order))
    if in_parts and not first.shape[1] % (first.device_mesh.size() * (2 if order else 1)):
        units = [gate, Shard(1), Shard(2), gate, Shard(1)]
        return Split([*[everywhere] * 3, *units, everywhere], Shard(dims - 1), Partial(), once=8)
    if x.is_shard() and x.dim < dims - 1:
        return Split([*[x] * 3, *[everywhere] * 6], x, x)
    return whole(placements, tensors, settings)


def _own_experts(
    count: int, parts: list[Tensor | None], place: int, processes: int
) -> list[Tensor | None]:
    """The index as a process counts its experts: all others have their number."""
    x, index, *rest = parts
    assert index is not None
    each = -(-count // processes)
    start = min(place * each, count)
    own, here = min(each, count - start), index - start
    elsewhere = index.where(index < 0, own)  # what is below 0 is told as everywhere
    return [x, here.where((here >= 0) & (here < own), elsewhere), *rest]


experts = Operator(
    "experts",
    "x index weights gate up? down gate_bias? up_bias? down_bias?",
    "str order, str weigh, str save",
    table=WAYS,
    check=check,
    result=_result,
    saved=_saved,  # type: ignore[arg-type]
    rows=OPERANDS[:3],
    uncast=OPERANDS[1:3],
    saved_by_rows=False,
    gradient=torch.empty_like,
    formula=lambda tensors, _: why_unlike(tensors),
    split=_split,
)
"""Experts, a function of their tensors, the row, all parameters, (order, weigh, save) and the
backend.
"""
