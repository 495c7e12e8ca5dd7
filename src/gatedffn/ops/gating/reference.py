"""The definition of gating and of its gradients, in plain PyTorch.

`gate` is the branch that goes through phi: the gate, or the up branch of a variant without
a gate, for which `up` is None.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gatedffn.activations import SCALARS, Scalar, Value
from gatedffn.ops.spec import Parameters
from gatedffn.variants import VARIANTS, Variant


def gating(gate: Tensor, up: Tensor | None, variant: str, parameters: Parameters) -> Tensor:
    """`phi(gate) * psi(up)`, computed in at least float32 and rounded once."""
    row = VARIANTS[variant]
    hidden = _apply(row.phi, gate, parameters)
    if row.psi is not None:
        assert up is not None
        hidden = hidden * _apply(row.psi, up, parameters)
    return hidden.to(result_dtype(gate, up))


def gating_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    variant: str,
    parameters: Parameters,
    wanted: Sequence[str],
) -> list[Tensor]:
    """The gradients that are wanted, in that order: "gate", "up" or a parameter's name.

    d_gate = grad phi'(gate) psi(up)      d_up = grad phi(gate) psi'(up)
    """
    row = VARIANTS[variant]
    grad = widened(grad)
    through_phi = grad
    if row.psi is not None:
        assert up is not None
        through_phi = grad * _apply(row.psi, up, parameters)
    gradients = []
    for name in wanted:
        if name == "gate":
            gradient = through_phi * _derivative(row.phi, gate, parameters)
            gradients.append(gradient.to(gate.dtype))
        elif name == "up":
            assert up is not None
            through_psi = grad * _apply(row.phi, gate, parameters)
            gradient = through_psi * _derivative(_psi(row), up, parameters)
            gradients.append(gradient.to(up.dtype))
        else:
            parameter = parameters[name]
            assert isinstance(parameter, Tensor)
            function = SCALARS[row.phi]
            by_parameter = function.by_parameter[name]
            slope = by_parameter(widened(gate), *_arguments(function, parameters))
            gradient = (through_phi * slope).sum_to_size(parameter.shape)
            gradients.append(gradient.to(parameter.dtype))
    return gradients


Order = Literal["gate_up", "up_gate", "interleaved"]
ORDERS: tuple[Order, ...] = ("gate_up", "up_gate", "interleaved")


def branches(packed: Tensor, dim: int, order: str) -> tuple[Tensor, Tensor]:
    """The gate and the up branch of a packed tensor; views where strides allow."""
    half = packed.shape[dim] // 2
    if order == "interleaved":
        dim %= packed.dim()
        pairs = packed.reshape(*packed.shape[:dim], half, 2, *packed.shape[dim + 1 :])
        gate, up = pairs.unbind(dim + 1)
        return gate, up
    first, second = packed.narrow(dim, 0, half), packed.narrow(dim, half, half)
    return (first, second) if order == "gate_up" else (second, first)


def joined(gate: Tensor, up: Tensor, dim: int, order: str) -> Tensor:
    """The packed tensor of a gate and an up branch."""
    dim %= gate.dim()
    if order == "interleaved":
        shape = (*gate.shape[:dim], 2 * gate.shape[dim], *gate.shape[dim + 1 :])
        return torch.stack([gate, up], dim + 1).reshape(shape)
    return torch.cat([gate, up] if order == "gate_up" else [up, gate], dim)


def result_dtype(gate: Tensor, up: Tensor | None) -> torch.dtype:
    """The dtype of the hidden values: the one that PyTorch's promotion gives the two branches."""
    return gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype that is computed in: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def _psi(row: Variant) -> str:
    assert row.psi is not None
    return row.psi


def _apply(name: str, x: Tensor, parameters: Parameters) -> Tensor:
    function = SCALARS[name]
    return function.value(widened(x), *_arguments(function, parameters))


def _derivative(name: str, x: Tensor, parameters: Parameters) -> Tensor:
    function = SCALARS[name]
    return function.derivative(widened(x), *_arguments(function, parameters))


def _arguments(function: Scalar, parameters: Parameters) -> list[Value]:
    values = (parameters[name] for name in function.parameters)
    return [widened(value) if isinstance(value, Tensor) else value for value in values]
