"""The layers as functions of tensors: thin, checked, without state.

Every function that takes `**parameters` takes the parameters of the named variant: numbers, or
for the learnable ones tensors that broadcast against the hidden values and get gradients.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.fx

from gatedffn.activations import Value
from gatedffn.errors import ParameterError
from gatedffn.ops import sharded
from gatedffn.ops.checks import complete
from gatedffn.ops.experts import Stack
from gatedffn.ops.experts import experts as _experts
from gatedffn.ops.feed_forward import Weights
from gatedffn.ops.feed_forward import feed_forward as _feed_forward
from gatedffn.ops.gating.op import check_packed
from gatedffn.ops.gating.op import gating as _gating
from gatedffn.ops.gating.op import packed_gating as _packed_gating
from gatedffn.ops.gating.reference import ORDERS as ORDERS
from gatedffn.ops.gating.reference import Order as Order
from gatedffn.ops.gating.reference import branches
from gatedffn.ops.operator import Call
from gatedffn.variants import VARIANTS, Variant, get_variant

Tensor = torch.Tensor
Save = Literal["gate_up", "input"]
Weigh = Literal["output", "input"]


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
    return _gating((x, None), Call(row, complete(row, parameters)))


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
    return _gating((gate, up), Call(row, complete(row, parameters)))


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
    return _packed_gating((x,), Call(row, complete(row, parameters), (dim, order)))


def split_packed(x: Tensor, dim: int, order: Order) -> tuple[Tensor, Tensor]:
    """The gate and the up part of a packed tensor, in that sequence; views where strides allow.

    >>> split_packed(torch.tensor([1.0, 2.0]), 0, "up_gate")
    (tensor([2.]), tensor([1.]))
    """
    check_packed(x, dim, order)
    return sharded.branches(x, dim, order) if sharded.is_sharded(x) else branches(x, dim, order)


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
        tile: how many tokens backward works on at a time, where there are at least twice as many,
            or a 64th of them where that is more, as sums of more parts lose digits; None is all
            of them.
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
    return layer(x, weights, row.name, complete(row, parameters), save, tile, backend)


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
    return layer(x, weights, row.name, complete(row, parameters), save, tile, backend)


def layer(
    x: Tensor,
    weights: Weights,
    variant: str,
    parameters: Mapping[str, Value],
    save: str,
    tile: int | None,
    backend: str,
) -> Tensor:
    """`feed_forward` in the operator's own terms: what `FeedForward` calls.

    The operands are in the operator's roles, and `parameters` are all of the row, in its order.

    Raises: as `feed_forward`.

    >>> eye = torch.eye(2)
    >>> weights = Weights(eye, None, None, None, None, None)
    >>> layer(-eye, weights, "relu", {}, "gate_up", None, "auto")
    tensor([[0., 0.],
            [0., 0.]])
    """
    return _feed_forward((x, *weights), Call(VARIANTS[variant], parameters, (save, tile), backend))


def experts(
    x: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    down_weight: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    variant: str | Variant = "swiglu",
    order: Order | None = None,
    weigh: Weigh = "output",
    save: Save = "gate_up",
    backend: str = "auto",
    **parameters: Value,
) -> Tensor:
    """A mixture of layers: `y[s] = sum_k weights[s, k] FFN_index[s, k](x[s])`.

    Each expert is a whole `feed_forward` (Shazeer et al. 2017, eq. 1).

    Args:
        x: (..., d_model), the tokens.
        gate_weight, up_weight: (experts, d_hidden, d_model), of any strides: weights stored
            (experts, d_model, d_hidden) are given as `.transpose(1, 2)`. Without a gate
            `gate_weight` is None. Packed, both branches are one `gate_weight`, (experts,
            2 * d_hidden, d_model), and `up_weight` is None.
        down_weight: (experts, d_out, d_hidden).
        index: (..., slots), int64 or int32, the experts of each token. The number of experts or
            more is an expert that is elsewhere: its slot gives nothing. A token may name one twice.
        weights: (..., slots), floating: what each is weighed by.
        gate_bias, up_bias, down_bias: (experts, d_hidden), the same, (experts, d_out), or None;
            packed as the weights are.
        variant: any name of the table.
        order: where the gate is in packed weights, as in `glu`; None where they are not packed.
        weigh: "output" weighs what an expert gives, "input" what it is given.
        save: what backward keeps: "gate_up" the input, and gate and up of each slot; "input" the
            input alone.
        backend: as in `gated_linear`.
        **parameters: the variant's parameters, the same for all experts.

    Returns: (..., d_out). What experts give is added up in float32 in a fixed order.

    Raises:
        UnknownVariant, ParameterError: as `gating`; or a gate came for a variant without one, or
            none for one that has it.
        ShapeError: the shapes do not fit together, or an expert is below 0.
        SettingError, BackendError: a wrong option; a `backend` that cannot compute it.

    >>> eye = torch.eye(2)
    >>> up, down = torch.stack([eye, -eye]), torch.stack([eye, 3.0 * eye])
    >>> x, index = torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1]])
    >>> experts(x, None, up, down, index, torch.tensor([[1.0, 0.5]]), variant="relu")
    tensor([[1.5000, 2.0000]])
    """
    row = get_variant(variant)
    if row.gated:
        if gate_weight is None:
            raise ParameterError(f"{row.name!r} is gated: gate_weight must not be None")
        if (up_weight is None) != (order is not None):
            raise ParameterError(
                "up_weight and order exclude each other: packed weights come as gate_weight with "
                "an order, others as gate_weight and up_weight without one"
            )
        stack = Stack(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    else:
        if gate_weight is not None or gate_bias is not None or order is not None:
            raise ParameterError(
                f"{row.name!r} has no gate: gate_weight, gate_bias and order must be None"
            )
        if up_weight is None:
            raise ParameterError(f"{row.name!r} has one branch: up_weight must not be None")
        stack = Stack(up_weight, None, down_weight, up_bias, None, down_bias)
    call = Call(row, complete(row, parameters), (order or "", weigh, save), backend)
    return _experts((x, index, weights, *stack), call)


# To `torch.fx.symbolic_trace` each of them is one call, as PyTorch's own functions are.
for _function in (
    *(activation, swish, gating, glu, split_packed),
    *(gated_linear, feed_forward, layer, experts),
):
    torch.fx.wrap(_function)
