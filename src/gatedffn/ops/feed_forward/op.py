"""The layer as an operator: `gatedffn::feed_forward`, its `_saving` and its `_backward`.

For training with `save="gate_up"` gate and up are kept besides the input, with `save="input"`
nothing is.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gatedffn.errors import BackendError, SettingError, ShapeError
from gatedffn.ops.checks import check_fit, check_floating
from gatedffn.ops.feed_forward.ways import WAYS
from gatedffn.ops.operator import Call, Operator
from gatedffn.ops.sharded import Split, whole
from gatedffn.ops.spec import Tensors

BACKENDS = ("auto", *WAYS.names)
SAVES = ("gate_up", "input")
# Numbers of a projection below which a compiler is shown the formula: at (512, 1376) a call of the
# operator in a compiled graph takes 0.1 ms more than a call of the layer, of 0.3 for one token.
FORMULA = 1 << 20


def check(tensors: Tensors, call: Call) -> None:
    """Raises unless a call is one that the layer has a meaning for.

    Raises:
        ShapeError: the operands do not fit together, or a parameter not to them.
        ParameterError: the row has no such parameter, or it is out of range.
        SettingError, BackendError: as `check_options`.
    """
    row, parameters, (save, tile), backend = call
    check_options(save, tile, backend)
    x, gate, up, down, gate_bias, up_bias, down_bias = tensors
    if (up is None) == row.gated:
        raise ShapeError(f"{row.name!r} is given the branches of another kind of variant")
    first = "gate" if row.gated else "up"
    check_floating("x", x)
    shape = x.shape  # type: ignore[union-attr]
    _check_projection(first, x, shape, gate, gate_bias)
    if up is not None:
        _check_projection("up", x, shape, up, up_bias)
        if up.shape != gate.shape:  # type: ignore[union-attr]
            raise ShapeError(
                f"gate_weight is {tuple(gate.shape)} and up_weight {tuple(up.shape)}: they must "  # type: ignore[union-attr]
                "be equal, (d_hidden, d_model)"
            )
    hidden = (*shape[:-1], gate.shape[0])  # type: ignore[union-attr]
    if down is not None:
        _check_projection("down", x, hidden, down, down_bias)
    check_fit(row, parameters, hidden, x.device)  # type: ignore[union-attr]


def check_options(save: str, tile: int | None, backend: str) -> None:
    """Raises unless the options of the engine are among those that exist.

    Raises:
        SettingError: `save` or `tile` is none that exists.
        BackendError: `backend` is none that exists.

    >>> check_options("input", 4096, "auto")
    """
    if save not in SAVES:
        raise SettingError(f"save is {save!r}: it must be one of {', '.join(SAVES)}")
    wrong: object = tile
    if wrong is not None and (type(wrong) is not int or wrong < 1):
        raise SettingError(f"tile is {tile!r}: it must be a positive number of tokens, or None")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}: it must be one of {', '.join(BACKENDS)}")


def _check_projection(
    name: str, x: Any, shape: Sequence[int], weight: Any, bias: Tensor | None
) -> None:
    """Raises unless values of a shape can go through a projection."""
    check_floating(f"{name}_weight", weight)
    width = "(d_out, d_hidden)" if name == "down" else "(d_hidden, d_model)"
    if weight.dim() != 2:
        raise ShapeError(f"{name}_weight is {tuple(weight.shape)}: it must be {width}")
    if not shape or shape[-1] != weight.shape[1]:
        source = "the hidden values" if name == "down" else "x"
        raise ShapeError(
            f"{source} is {tuple(shape)} and {name}_weight {tuple(weight.shape)}: the last size "
            f"of the one must be the second of the other; a weight is stored {width}"
        )
    if weight.device != x.device:
        raise ShapeError(f"{name}_weight is on {weight.device} and x on {x.device}: move one")
    if bias is None:
        return
    check_floating(f"{name}_bias", bias)
    if bias.device != weight.device:
        raise ShapeError(f"{name}_bias is on {bias.device} and x on {x.device}: move one")
    if bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"{name}_bias is {tuple(bias.shape)}: it must be ({weight.shape[0]},), "
            f"the first size of {name}_weight"
        )


def _result(tensors: Tensors, _call: Call) -> Tensor:
    x, gate, _, down, *_ = tensors
    last = gate if down is None else down
    return x.new_empty((*x.shape[:-1], last.shape[0]))  # type: ignore[union-attr]


def _saved(tensors: Tensors, call: Call) -> list[Tensor]:
    x, gate, up, *_ = tensors
    assert x is not None
    assert gate is not None
    if call.settings[0] != "gate_up":
        return []
    count = 1 if up is None else 2
    return [x.new_empty((*x.shape[:-1], gate.shape[0])) for _ in range(count)]


def _formula(tensors: Tensors, call: Call) -> str | None:
    gate = tensors[1]
    assert gate is not None
    if gate.numel() < FORMULA:
        # By the weights alone: a condition on the tokens would compile anew for another number.
        return "it is small: a call of the operator takes longer than its kernels gain"
    if any(t is not None and t.dtype != gate.dtype for t in tensors):
        return "the operands have several dtypes"
    width = gate.shape[0]
    learned = [v for v in call.parameters.values() if isinstance(v, Tensor) and v.numel() != 1]
    if any(v.numel() != width or v.shape[-1] != width for v in learned):
        return "a parameter is neither one number nor one for each hidden unit"
    return None


def _split(placements: Sequence[Any], tensors: Tensors, settings: tuple[Any, ...]) -> Split:
    """By hidden units where the first matrix is split so, else by tokens where the input is."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    x, gate, _, down, *_ = placements
    dims = tensors[0].dim()  # type: ignore[union-attr]
    everywhere = Replicate()
    if gate.is_shard(0):
        units, hidden = Shard(0), Shard(dims - 1)
        lie = [everywhere, units, units, Shard(1), units, units, everywhere]
        return Split(lie, hidden, hidden if down is None else Partial(), once=6)
    if x.is_shard() and x.dim != dims - 1:
        return Split([x, *[everywhere] * 6], x, x)
    return whole(placements, tensors, settings)


feed_forward = Operator(
    "feed_forward",
    "x gate up? down? gate_bias? up_bias? down_bias?",
    "str save, int? tile",
    table=WAYS,
    check=check,
    result=_result,
    saved=_saved,
    rows=("x",),
    unread=("gate_bias", "up_bias", "down_bias"),
    formula=_formula,
    split=_split,
)
"""The layer, a function of its tensors, the row, all parameters, (save, tile) and the backend."""
