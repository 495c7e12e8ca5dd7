"""Gating as `torch.library` operators: `gatedffn::gating` and `gatedffn::gating_backward`.

Forward saves its two input branches and the learned parameters, nothing else of their size. The
backward operator is differentiable in turn, through the reference's own formulas.

`gatedffn.ops.parameters` says how the parameters of a row travel.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.gating import engine, reference
from gatedffn.ops.parameters import join, no_gradient, split
from gatedffn.ops.transforms import batched, transformed
from gatedffn.variants import VARIANTS, Variant


def gating(gate: Tensor, up: Tensor | None, row: Variant, parameters: dict[str, Value]) -> Tensor:
    """`phi(gate) * psi(up)`; `parameters` holds every parameter of the row, in order."""
    if transformed() or torch.compiler.is_exporting():
        return reference.gating(gate, up, row.name, parameters)
    learned, fixed = split(parameters, gate)
    return cast(Tensor, _gating(gate, up, learned, fixed, row.name))


@torch.library.custom_op(
    "gatedffn::gating",
    mutates_args=(),
    schema="(Tensor gate, Tensor? up, Tensor[] learned, float[] fixed, str variant) -> Tensor",
)
def _gating(
    gate: Tensor,
    up: Tensor | None,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
) -> Tensor:
    hidden = reference.gating(gate, up, variant, join(variant, learned, fixed))
    return hidden.contiguous()


@_gating.register_kernel(("cpu", "cuda"))
def _(
    gate: Tensor,
    up: Tensor | None,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
) -> Tensor:
    return engine.gating(gate, up, variant, join(variant, learned, fixed))


@_gating.register_fake
def _(
    gate: Tensor,
    up: Tensor | None,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
) -> Tensor:
    return gate.new_empty(gate.shape, dtype=reference.result_dtype(gate, up))


@torch.library.custom_op(
    "gatedffn::gating_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor? up, Tensor[] learned, float[] fixed,"
    " str variant, str[] wanted) -> Tensor[]",
)
def _gating_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    parameters = join(variant, learned, fixed)
    gradients = reference.gating_backward(grad, gate, up, variant, parameters, wanted)
    return [gradient.contiguous() for gradient in gradients]


@_gating_backward.register_kernel(("cpu", "cuda"))
def _(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    parameters = join(variant, learned, fixed)
    return engine.gating_backward(grad, gate, up, variant, parameters, wanted)


@_gating_backward.register_fake
def _(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    learned: Sequence[Tensor],
    fixed: Sequence[float],
    variant: str,
    wanted: Sequence[str],
) -> list[Tensor]:
    sources: dict[str, Any] = join(variant, learned, fixed)
    sources |= {"gate": gate, "up": up}
    return [sources[name].new_empty(sources[name].shape) for name in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, learned, ctx.fixed, ctx.variant = inputs
    ctx.save_for_backward(gate, up, *learned)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up, *learned = ctx.saved_tensors
    names = ["gate", "up", *list(VARIANTS[ctx.variant].defaults)[: len(learned)]]
    needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[2]]
    wanted = [name for name, needed in zip(names, needs, strict=True) if needed]
    if batched(grad):
        parameters = join(ctx.variant, learned, ctx.fixed)
        results = reference.gating_backward(grad, gate, up, ctx.variant, parameters, wanted)
    else:
        results = _gating_backward(grad, gate, up, learned, ctx.fixed, ctx.variant, wanted)
    by_name = dict(zip(wanted, results, strict=True))
    d_gate, d_up, *d_learned = (by_name.get(name) for name in names)
    return d_gate, d_up, d_learned, no_gradient(ctx.fixed), None


_gating.register_autograd(_backward, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, gate, up, learned, ctx.fixed, ctx.variant, ctx.wanted = inputs
    ctx.save_for_backward(grad, gate, up, *learned)


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """The gradients of `gating_backward`, by differentiating the reference's formulas."""

    def again(tensors: Sequence[Any]) -> list[Tensor]:
        grad, gate, up, *learned = tensors
        parameters = join(ctx.variant, learned, ctx.fixed)
        return reference.gating_backward(grad, gate, up, ctx.variant, parameters, ctx.wanted)

    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    found = differentiated(again, ctx.saved_tensors, grads, needs)
    d_grad, d_gate, d_up, *d_learned = found
    return d_grad, d_gate, d_up, d_learned, no_gradient(ctx.fixed), None, None


def differentiated(
    function: Callable[[Sequence[Any]], list[Tensor]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `function(tensors)` by those of the tensors that need one, else None."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of its own for each role: gate and up may be one tensor.
        inputs = [None if t is None else t.view_as(t) for t in tensors]
        outputs = function(inputs)
    asked = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    connected = [(out, g) for out, g in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in connected],
        cast(list[Tensor], asked),
        [g for _, g in connected],
        create_graph=create_graph,
        allow_unused=True,
    )
    remaining = iter(found)
    return [next(remaining) if needed else None for needed in needs]


_gating_backward.register_autograd(_double_backward, setup_context=_save_backward)
