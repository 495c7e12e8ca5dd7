"""Gating of one packed tensor, as operators: `gatedffn::packed_gating` and its backward.

The gradient of the packed tensor is written in place: with an operator of two branches, PyTorch
would make a tensor of zeros for the gradient of each branch, copy, and add the two. Forward saves
the packed tensor and the learned parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.gating import engine, op, reference
from gatedffn.ops.parameters import join, no_gradient, split
from gatedffn.ops.transforms import batched, transformed
from gatedffn.variants import VARIANTS, Variant


def packed_gating(
    packed: Tensor, dim: int, order: str, row: Variant, parameters: dict[str, Value]
) -> Tensor:
    """`phi(gate) * psi(up)` of a gate and an up branch that lie along `dim` of one tensor.

    `order` says how: "gate_up", "up_gate" or "interleaved".
    """
    if transformed() or torch.compiler.is_exporting():
        gate, up = branches(packed, dim, order)
        return reference.gating(gate, up, row.name, parameters)
    learned, fixed = split(parameters, packed)
    return cast(Tensor, _packed_gating(packed, dim, order, learned, fixed, row.name))


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


@torch.library.custom_op(
    "gatedffn::packed_gating",
    mutates_args=(),
    schema="(Tensor packed, int dim, str order, Tensor[] learned, float[] fixed, str variant)"
    " -> Tensor",
)
def _packed_gating(
    packed: Tensor,
    dim: int,
    order: str,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
) -> Tensor:
    parameters = join(variant, learned, fixed)
    return reference.gating(*branches(packed, dim, order), variant, parameters).contiguous()


@_packed_gating.register_kernel(("cpu", "cuda"))
def _(
    packed: Tensor,
    dim: int,
    order: str,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
) -> Tensor:
    gate, up = branches(packed, dim, order)
    parameters = join(variant, learned, fixed)
    return engine.gating(gate, up, variant, parameters)


@_packed_gating.register_fake
def _(
    packed: Tensor,
    dim: int,
    order: str,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
) -> Tensor:
    return packed.new_empty(branches(packed, dim, order)[0].shape)


Backward = Callable[..., list[Tensor]]


def _gradients(
    backward: Backward,
    grad: Tensor,
    packed: Tensor,
    dim: int,
    order: str,
    parameters: Mapping[str, Value],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    """The gradients that are wanted, in that order: "packed" or a parameter's name."""
    gate, up = branches(packed, dim, order)
    names = [name for name in wanted if name != "packed"]
    places = {}
    if "packed" in wanted:
        d_packed = packed.new_empty(packed.shape)
        places = dict(zip(("gate", "up"), branches(d_packed, dim, order), strict=True))
    asked = [*places, *names]
    found = backward(grad, gate, up, variant, parameters, asked, places)
    by_name = dict(zip(asked, found, strict=True))
    return [d_packed if name == "packed" else by_name[name] for name in wanted]


@torch.library.custom_op(
    "gatedffn::packed_gating_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor packed, int dim, str order, Tensor[] learned, float[] fixed,"
    " str variant, str[] wanted) -> Tensor[]",
)
def _packed_gating_backward(
    grad: Tensor,
    packed: Tensor,
    dim: int,
    order: str,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    parameters = join(variant, learned, fixed)
    return _gradients(_by_reference, grad, packed, dim, order, parameters, variant, wanted)


def _by_reference(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    variant: str,
    parameters: Mapping[str, Value],
    wanted: Sequence[str],
    into: Mapping[str, Tensor],
) -> list[Tensor]:
    gradients = reference.gating_backward(grad, gate, up, variant, parameters, wanted)
    return reference.delivered(wanted, gradients, into)


@_packed_gating_backward.register_kernel(("cpu", "cuda"))
def _(
    grad: Tensor,
    packed: Tensor,
    dim: int,
    order: str,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    parameters = join(variant, learned, fixed)
    backward = engine.gating_backward
    return _gradients(backward, grad, packed, dim, order, parameters, variant, wanted)


@_packed_gating_backward.register_fake
def _(
    grad: Tensor,
    packed: Tensor,
    dim: int,
    order: str,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    sources: dict[str, Any] = {**join(variant, learned, fixed), "packed": packed}
    return [sources[name].new_empty(sources[name].shape) for name in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, ctx.dim, ctx.order, learned, ctx.fixed, ctx.variant = inputs
    ctx.save_for_backward(packed, *learned)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, *learned = ctx.saved_tensors
    names = ["packed", *list(VARIANTS[ctx.variant].defaults)[: len(learned)]]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3]]
    wanted = [name for name, needed in zip(names, needs, strict=True) if needed]
    arguments = (grad, packed, ctx.dim, ctx.order)
    if batched(grad):
        results = _definition(
            *arguments, join(ctx.variant, learned, ctx.fixed), ctx.variant, wanted
        )
    else:
        results = _packed_gating_backward(*arguments, learned, ctx.fixed, ctx.variant, wanted)
    by_name = dict(zip(wanted, results, strict=True))
    d_packed, *d_learned = (by_name.get(name) for name in names)
    return d_packed, None, None, d_learned, no_gradient(ctx.fixed), None


_packed_gating.register_autograd(_backward, setup_context=_save)


def _definition(
    grad: Tensor,
    packed: Tensor,
    dim: int,
    order: str,
    parameters: Mapping[str, Value],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    """The gradients by the reference's formulas, which can be differentiated and batched."""
    asked = [name for name in wanted if name != "packed"]
    if "packed" in wanted:
        asked += ["gate", "up"]
    gate, up = branches(packed, dim, order)
    found = reference.gating_backward(grad, gate, up, variant, parameters, asked)
    by_name = dict(zip(asked, found, strict=True))
    if "packed" in wanted:
        by_name["packed"] = _joined(by_name["gate"], by_name["up"], dim, order)
    return [by_name[name] for name in wanted]


def _joined(gate: Tensor, up: Tensor, dim: int, order: str) -> Tensor:
    """The packed tensor of a gate and an up branch."""
    dim %= gate.dim()
    if order == "interleaved":
        shape = (*gate.shape[:dim], 2 * gate.shape[dim], *gate.shape[dim + 1 :])
        return torch.stack([gate, up], dim + 1).reshape(shape)
    return torch.cat([gate, up] if order == "gate_up" else [up, gate], dim)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, packed, ctx.dim, ctx.order, learned, ctx.fixed, ctx.variant, ctx.wanted = inputs
    ctx.save_for_backward(grad, packed, *learned)


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """The gradients of the backward, by differentiating the reference's formulas."""

    def again(tensors: Sequence[Tensor]) -> list[Tensor]:
        grad, packed, *learned = tensors
        parameters = join(ctx.variant, learned, ctx.fixed)
        return _definition(grad, packed, ctx.dim, ctx.order, parameters, ctx.variant, ctx.wanted)

    needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4]]
    d_grad, d_packed, *d_learned = op.differentiated(again, ctx.saved_tensors, grads, needs)
    return d_grad, d_packed, None, None, d_learned, no_gradient(ctx.fixed), None, None


_packed_gating_backward.register_autograd(_double_backward, setup_context=_save_backward)
