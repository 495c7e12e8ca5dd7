"""The layers as functions of tensors: thin, checked, without state.

Every function that takes `**parameters` takes the parameters of the named variant: numbers, or
for the learnable ones tensors that broadcast against the hidden values and get gradients.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.errors import BackendError, ParameterError, SettingError, ShapeError
from gatedffn.ops.feed_forward import BACKENDS, Weights, known
from gatedffn.ops.feed_forward import feed_forward as _feed_forward
from gatedffn.ops.gating import branches
from gatedffn.ops.gating import gating as _gating
from gatedffn.ops.gating import packed_gating as _packed_gating
from gatedffn.variants import Parameter, Variant, get_variant

Order = Literal["gate_up", "up_gate", "interleaved"]
Save = Literal["gate_up", "input"]
SAVES: tuple[Save, ...] = ("gate_up", "input")
# Numbers meet float32 tensors, in which a larger one is infinite.
LARGEST = torch.finfo(torch.float32).max
ORDERS: tuple[Order, ...] = ("gate_up", "up_gate", "interleaved")


def activation(x: Tensor, variant: str | Variant = "relu", **parameters: Value) -> Tensor:
    """`phi(x)` of a variant without a gate.

    Args:
        x: floating tensor of any shape.
        variant: a name that is not gated, such as "gelu".
        **parameters: the variant's parameters.

    Returns: a tensor of the shape and dtype of `x`.

    Raises:
        UnknownVariant, ParameterError: no such variant, or it is gated, or has no such parameter.
        ShapeError: `x` is not floating, or a parameter does not broadcast to it.

    >>> activation(torch.tensor([-1.0, 2.0]), "relu2")
    tensor([0., 4.])
    """
    row = get_variant(variant)
    if row.gated:
        raise ParameterError(
            f"{row.name!r} is gated, so it takes a gate and an up tensor: call gating()"
        )
    _check_floating("x", x)
    return _gating(x, None, row, _complete(row, parameters, x.shape, x.device))


def swish(x: Tensor, beta: Value = 1.0) -> Tensor:
    """`x sigmoid(beta x)` (Ramachandran et al. 2017, section 4); beta = 1 is SiLU.

    Args:
        x: floating tensor of any shape.
        beta: a number, or a tensor that broadcasts against `x` and gets a gradient.

    Returns: a tensor of the shape and dtype of `x`.

    Raises:
        ShapeError: `x` is not floating, or `beta` does not broadcast to it.

    >>> swish(torch.tensor([0.0, 2.0]), beta=0.0)
    tensor([0., 1.])
    """
    return activation(x, "swish", beta=beta)


def gating(
    gate: Tensor, up: Tensor, variant: str | Variant = "swiglu", **parameters: Value
) -> Tensor:
    """`phi(gate) * psi(up)`: the element-wise part of a gated layer.

    Args:
        gate: the branch that is gate, floating, of any shape and strides.
        up: the other branch, of the same shape.
        variant: a gated name, such as "geglu".
        **parameters: the variant's parameters.

    Returns: a contiguous tensor of that shape, in the dtype that the two promote to. float16 and
        bfloat16 are computed in float32 and rounded once.

    Raises:
        UnknownVariant, ParameterError: no such variant, or it is not gated, or has no such
            parameter.
        ShapeError: the shapes or devices differ, or a tensor is not floating.

    >>> gating(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0]), "reglu")
    tensor([0., 6.])
    """
    row = get_variant(variant)
    if not row.gated:
        raise ParameterError(f"{row.name!r} has no gate, so it takes one tensor: call activation()")
    _check_floating("gate", gate)
    _check_floating("up", up)
    if gate.shape != up.shape:
        raise ShapeError(
            f"gate is {tuple(gate.shape)} and up is {tuple(up.shape)}: they must be equal"
        )
    if gate.device != up.device:
        raise ShapeError(f"gate is on {gate.device} and up on {up.device}: move one of them")
    return _gating(gate, up, row, _complete(row, parameters, gate.shape, gate.device))


def glu(
    x: Tensor,
    dim: int = -1,
    *,
    variant: str | Variant = "glu",
    order: Order = "up_gate",
    **parameters: Value,
) -> Tensor:
    """Gating over one packed tensor; the default is `torch.nn.functional.glu`.

    Args:
        x: floating tensor whose size along `dim` is even.
        dim: the packed dimension.
        variant: a gated name.
        order: where the gate is: "up_gate" (second half, as in torch.nn.GLU and Dauphin et al.
            2016, eq. 1), "gate_up" (first half) or "interleaved" (gate, up, gate, up, ...).
        **parameters: the variant's parameters.

    Returns: a tensor with half of that size along `dim`.

    Raises:
        UnknownVariant, ParameterError: as `gating`, or the order is none of the three.
        ShapeError: the size along `dim` is odd, or `x` has no such dimension.

    >>> packed = torch.tensor([5.0, 7.0, 0.0, 0.0])
    >>> glu(packed)
    tensor([2.5000, 3.5000])
    """
    row = get_variant(variant)
    if not row.gated:
        raise ParameterError(f"{row.name!r} has no gate, so it takes one tensor: call activation()")
    gate, _ = split_packed(x, dim, order)
    complete = _complete(row, parameters, gate.shape, gate.device)
    return _packed_gating(x, dim, order, row, complete)


def split_packed(x: Tensor, dim: int, order: Order) -> tuple[Tensor, Tensor]:
    """The gate and the up part of a packed tensor, in that sequence; views where strides allow.

    >>> split_packed(torch.tensor([1.0, 2.0]), 0, "up_gate")
    (tensor([2.]), tensor([1.]))
    """
    _check_floating("x", x)
    if order not in ORDERS:
        raise ParameterError(f"order is {order!r}: it must be one of {', '.join(ORDERS)}")
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"dim is {dim}, but the packed tensor is {tuple(x.shape)}")
    if x.shape[dim] % 2:
        raise ShapeError(
            f"the packed size along dim {dim} of {tuple(x.shape)} is odd: it holds gate and up, "
            "so it must be even"
        )
    return branches(x, dim, order)


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    variant: str | Variant = "swiglu",
    save: Save = "gate_up",
    tile: int | None = None,
    backend: str = "auto",
    **parameters: Value,
) -> Tensor:
    """`phi(x W_gate^T + b_gate) * psi(x W_up^T + b_up)` (Shazeer 2020, eqs. 4 and 5).

    Args:
        x: (..., d_model).
        gate_weight, up_weight: (d_hidden, d_model), as `torch.nn.Linear` stores them.
        gate_bias, up_bias: (d_hidden,) or None.
        variant: a gated name.
        save: what backward keeps: "gate_up" the input, gate and up; "input" the input alone, and
            the rest is computed again.
        tile: how many tokens backward works on at a time, where there are at least twice as many;
            None is all of them.
        backend: "auto" for the way that is fastest here, or the name of one, which then computes
            it or raises; see `gatedffn.explain`.
        **parameters: the variant's parameters.

    Returns: (..., d_hidden).

    Raises:
        UnknownVariant, ParameterError: as `gating`.
        ShapeError: the shapes do not fit together.
        SettingError, BackendError: a wrong `save` or `tile`; a `backend` that cannot compute it.

    >>> x, gate, up = torch.ones(2, 3), torch.eye(3), 2.0 * torch.eye(3)
    >>> gated_linear(x, gate, up, variant="bilinear")[0]
    tensor([2., 2., 2.])
    """
    row = get_variant(variant)
    if not row.gated:
        raise ParameterError(f"{row.name!r} has no gate: call feed_forward() with gate_weight=None")
    weights = Weights(gate_weight, up_weight, None, gate_bias, up_bias, None)
    return layer(x, weights, row, parameters, save, tile, backend)


def feed_forward(
    x: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    variant: str | Variant = "swiglu",
    save: Save = "gate_up",
    tile: int | None = None,
    backend: str = "auto",
    **parameters: Value,
) -> Tensor:
    """The whole layer, `h W_down^T + b_down` (Shazeer 2020, eqs. 2, 3 and 6).

    Gated: `h = phi(x W_gate^T + b_gate) * psi(x W_up^T + b_up)`.
    Not gated: `h = phi(x W_up^T + b_up)`, and `gate_weight` is None.

    Args:
        x: (..., d_model).
        gate_weight, up_weight: (d_hidden, d_model), as `torch.nn.Linear` stores them.
        down_weight: (d_out, d_hidden).
        gate_bias, up_bias, down_bias: (d_hidden,), (d_hidden,), (d_out,) or None.
        variant: any name of the table.
        save, tile, backend: as in `gated_linear`.
        **parameters: the variant's parameters.

    Returns: (..., d_out).

    Raises:
        UnknownVariant, ParameterError: as `gating`; or a gate came for a variant without one, or
            none for one that has it.
        ShapeError: the shapes do not fit together.
        SettingError, BackendError: as `gated_linear`.

    >>> eye = torch.eye(2)
    >>> feed_forward(torch.tensor([-1.0, 2.0]), None, eye, 3.0 * eye, variant="relu")
    tensor([0., 6.])
    """
    row = get_variant(variant)
    if row.gated:
        if gate_weight is None:
            raise ParameterError(f"{row.name!r} is gated: gate_weight must not be None")
        weights = Weights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    else:
        if gate_weight is not None or gate_bias is not None:
            raise ParameterError(
                f"{row.name!r} has no gate: gate_weight and gate_bias must be None"
            )
        weights = Weights(up_weight, None, down_weight, up_bias, None, down_bias)
    return layer(x, weights, row, parameters, save, tile, backend)


def layer(
    x: Tensor,
    weights: Weights,
    row: Variant,
    parameters: dict[str, Value],
    save: str,
    tile: int | None,
    backend: str,
) -> Tensor:
    """`feed_forward` with its operands in the operator's roles: what `FeedForward` calls.

    Raises: as `feed_forward`, and before any way of computing it is looked at.

    >>> eye = torch.eye(2)
    >>> weights = Weights(eye, None, None, None, None, None)
    >>> layer(-eye, weights, get_variant("relu"), {}, "gate_up", None, "auto")
    tensor([[0., 0.],
            [0., 0.]])
    """
    check_engine(save, tile, backend)
    seen = known(x, weights)
    if seen is None:
        _check_projections(x, weights, row)
    hidden = (*x.shape[:-1], weights.gate.shape[0])
    complete = _complete(row, parameters, hidden, x.device)
    return _feed_forward(x, weights, row.name, complete, save, tile or 0, backend, seen)


def _check_projections(x: Tensor, weights: Weights, row: Variant) -> None:
    """Raises unless the operands of a layer fit together."""
    first = "gate" if row.gated else "up"
    _check_projection(first, x, x.shape, weights.gate, weights.gate_bias)
    if weights.up is not None:
        _check_projection("up", x, x.shape, weights.up, weights.up_bias)
        if weights.up.shape != weights.gate.shape:
            raise ShapeError(
                f"gate_weight is {tuple(weights.gate.shape)} and up_weight "
                f"{tuple(weights.up.shape)}: they must be equal, (d_hidden, d_model)"
            )
    if weights.down is not None:
        hidden = (*x.shape[:-1], weights.gate.shape[0])
        _check_projection("down", x, hidden, weights.down, weights.down_bias)


def check_engine(save: str, tile: int | None, backend: str) -> None:
    """Raises unless the options of the engine are among those that exist.

    Raises:
        SettingError: `save` or `tile` is none that exists.
        BackendError: `backend` is none that exists.

    >>> check_engine("input", 4096, "auto")
    """
    if save not in SAVES:
        raise SettingError(f"save is {save!r}: it must be one of {', '.join(SAVES)}")
    wrong: object = tile
    if wrong is not None and (type(wrong) is not int or wrong < 1):
        raise SettingError(f"tile is {tile!r}: it must be a positive number of tokens, or None")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}: it must be one of {', '.join(BACKENDS)}")


def check_parameters(row: Variant, parameters: dict[str, Value]) -> dict[str, Value]:
    """Every parameter of the row in its order: the given ones where given, else the defaults.

    Raises:
        ParameterError: a name that the row does not have, or a value out of range.

    >>> check_parameters(get_variant("swiglu_oai"), {"limit": 5.0})
    {'beta': 1.702, 'limit': 5.0}
    """
    unknown = [name for name in parameters if name not in row.defaults]
    if unknown:
        known = ", ".join(row.defaults) or "none"
        raise ParameterError(
            f"{row.name!r} has no parameter {', '.join(unknown)}; its parameters: {known}"
        )
    for parameter in row.parameters:
        if parameter.name in parameters:
            _check_value(row, parameter, parameters[parameter.name])
    return {**row.defaults, **parameters}


def _check_value(row: Variant, parameter: Parameter, value: Value) -> None:
    where = f"{parameter.name} of {row.name!r}"
    if isinstance(value, Tensor):
        if not parameter.learnable:
            raise ParameterError(f"{where} is not learnable: give a number, not a tensor")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ParameterError(f"{where} is {value!r}: it must be a number")
    if value != value:
        raise ParameterError(f"{where} is NaN")
    if abs(value) > LARGEST and not (parameter.unbounded and value == math.inf):
        raise ParameterError(f"{where} must be finite, in the range of float32")
    if parameter.above is not None and value <= parameter.above:
        raise ParameterError(f"{where} is {value}: it must be above {parameter.above}")
    if parameter.below is not None and value >= parameter.below:
        raise ParameterError(f"{where} is {value}: it must be below {parameter.below}")


def _complete(
    row: Variant, parameters: dict[str, Value], shape: Sequence[int], device: torch.device
) -> dict[str, Value]:
    """Every parameter of the row, fit for hidden values of that shape."""
    complete = check_parameters(row, parameters)
    for name, value in complete.items():
        if not isinstance(value, Tensor):
            complete[name] = float(value)
        elif not _broadcasts(value.shape, shape):
            raise ShapeError(
                f"{name} of {row.name!r} is {tuple(value.shape)}: it must broadcast to the hidden "
                f"values, {tuple(shape)}"
            )
        elif not value.is_floating_point():
            raise ShapeError(f"{name} of {row.name!r} is {value.dtype}: it must be floating")
        elif value.device != device:
            raise ShapeError(f"{name} of {row.name!r} is on {value.device}, the rest on {device}")
    return complete


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is of type {type(x).__name__}: it must be a tensor")
    if not x.is_floating_point():
        raise ShapeError(f"{name} is {x.dtype}: it must be a floating dtype")


def _check_projection(
    name: str, x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor | None
) -> None:
    """Raises unless values of a shape can go through a projection."""
    _check_floating("x", x)
    _check_floating(f"{name}_weight", weight)
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
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"{name}_bias is {tuple(bias.shape)}: it must be ({weight.shape[0]},), "
            f"the first size of {name}_weight"
        )
