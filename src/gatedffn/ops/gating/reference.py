"""The definition of gating and of its gradients, in plain PyTorch.

`gate` is the branch that goes through phi: the gate, or the up branch of a variant without
a gate, for which `up` is None.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gatedffn.activations import SCALARS, Scalar, Value
from gatedffn.ops.spec import Parameters, dispatched, transformed
from gatedffn.variants import VARIANTS, Variant


def gating(gate: Tensor, up: Tensor | None, variant: str, parameters: Parameters) -> Tensor:
    """`phi(gate) * psi(up)`, computed in at least float32 and rounded once.

    Its gradients are those of `gating_backward`. Of nested tensors they are autograd's, as under a
    compiler, which shall join the formula with what is around it, and in a graph under torch.func.
    """
    followed = torch.is_grad_enabled() or transformed()
    if torch.compiler.is_compiling() or dispatched() or not followed:
        return _formula(gate, up, variant, parameters)
    if gate.is_nested or (up is not None and up.is_nested):
        return _formula(gate, up, variant, parameters)
    # Beside a learned parameter the others, which have no gradient, travel as tensors too.
    by_parameter = SCALARS[VARIANTS[variant].phi].by_parameter
    names = [name for name in by_parameter if isinstance(parameters[name], Tensor)]
    learned = [parameters[name] for name in names]
    numbers = {name: v for name, v in parameters.items() if name not in names}
    made: Tensor = _Differentiated.apply(  # type: ignore[no-untyped-call]
        variant, numbers, names, gate, up, *learned
    )
    return made


def _formula(gate: Tensor, up: Tensor | None, variant: str, parameters: Parameters) -> Tensor:
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
    gradients = []
    for name in wanted:
        gradient = _through(name, widened(grad), gate, up, variant, parameters)
        if name in parameters:
            # Added up as the kernels do; Apple's GPUs have no float64.
            wide = gradient.dtype if gradient.device.type == "mps" else torch.float64
            gradient = gradient.to(wide).sum_to_size(parameters[name].shape)  # type: ignore[union-attr]
        like = {"gate": gate, "up": up}.get(name, parameters.get(name))
        gradients.append(gradient.to(like.dtype))  # type: ignore[union-attr]
    return gradients


def _through(
    name: str,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    variant: str,
    parameters: Parameters,
) -> Tensor:
    """`grad` times the derivative of each hidden value by its gate, its up or a parameter."""
    row = VARIANTS[variant]
    if name == "up":
        assert up is not None
        return grad * _apply(row.phi, gate, parameters) * _derivative(_psi(row), up, parameters)
    if row.psi is not None:
        assert up is not None
        grad = grad * _apply(row.psi, up, parameters)
    if name == "gate":
        return grad * _derivative(row.phi, gate, parameters)
    function = SCALARS[row.phi]
    slope = function.by_parameter[name]
    return grad * slope(widened(gate), *_arguments(function, gate, parameters))


class _Differentiated(torch.autograd.Function):
    """Autograd of the formula would have a NaN where a slope has a limit, and 0 for some NaNs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        variant: str,
        numbers: Parameters,
        names: Sequence[str],
        gate: Tensor,
        up: Tensor | None,
        *learned: Tensor,
    ) -> Tensor:
        return _formula(gate, up, variant, {**numbers, **dict(zip(names, learned, strict=True))})

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.variant, ctx.numbers, ctx.names, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)  # 0 times an infinite slope is NaN

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        of = zip(("gate", "up", *ctx.names), needs, strict=True)
        wanted = [name for name, needed in of if needed]
        found = iter(gating_backward(grad, *_of(ctx), wanted))
        return (None, None, None, *[next(found) if needed else None for needed in needs])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        of = zip(("gate", "up", *ctx.names), tangents[3:], strict=True)
        given = _of(ctx)
        parts = [_through(name, widened(t), *given) for name, t in of if t is not None]
        return sum(parts[1:], parts[0]).to(result_dtype(*given[:2]))


def _of(ctx: Any) -> tuple[Tensor, Tensor | None, str, Parameters]:
    """What a call was given."""
    gate, up, *learned = ctx.saved_tensors
    return gate, up, ctx.variant, {**ctx.numbers, **dict(zip(ctx.names, learned, strict=True))}


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
    return x.to(widened_dtype(x.dtype))


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _psi(row: Variant) -> str:
    assert row.psi is not None
    return row.psi


def _apply(name: str, x: Tensor, parameters: Parameters) -> Tensor:
    function = SCALARS[name]
    return function.value(widened(x), *_arguments(function, x, parameters))


def _derivative(name: str, x: Tensor, parameters: Parameters) -> Tensor:
    function = SCALARS[name]
    return function.derivative(widened(x), *_arguments(function, x, parameters))


def _arguments(function: Scalar, x: Tensor, parameters: Parameters) -> list[Value]:
    """The parameters of a function, tensors in no narrower a dtype than `x` is computed in."""
    dtype = widened_dtype(x.dtype)
    values = (parameters[name] for name in function.parameters)
    return [
        v.to(torch.promote_types(v.dtype, dtype)) if isinstance(v, Tensor) else v for v in values
    ]
