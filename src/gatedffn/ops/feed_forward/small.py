"""Training a small layer: gate and up by PyTorch's own linear layers, the rest by one function.

What a small layer costs is Python between its products, and PyTorch's own functions have none of
it. Saved for backward are the input, gate and up, as by the operator; see op.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_layer

from gatedffn.activations import Value
from gatedffn.ops import choice
from gatedffn.ops.feed_forward.call import Call, apply_gating, key_of
from gatedffn.ops.feed_forward.engine import ways_of
from gatedffn.ops.feed_forward.ways import down_of, is_small
from gatedffn.ops.feed_forward.weights import in_memory
from gatedffn.ops.gating import reference
from gatedffn.ops.transforms import batched, watched

# A step by the operator takes 0.15 ms longer in Python, and the products of a step are three times
# those of its forward.
BEHIND = 0.05
REASON = "small: the products are made by PyTorch's own linear layers"


def suits(call: Call, save: str, tile: int, backend: str) -> bool:
    """Whether a call is small, and PyTorch's products are about as fast as those chosen for it."""
    return (
        save == "gate_up"
        and is_small(call)
        and not 0 < 2 * tile <= call.tokens
        and call.weights.down is not None
        and call.described is not None
        and not any(isinstance(value, Tensor) for value in call.parameters.values())
        and backend == "auto"
        and _behind(call) < BEHIND
    )


def _behind(call: Call) -> float:
    """The milliseconds of a forward that PyTorch's products take longer than the chosen way."""
    chosen = ways_of(call).chosen(call, True)
    if chosen == "torch":
        return 0.0
    made = choice.known(key_of(call, True, "forward"))
    times = {} if made is None else made.milliseconds
    return times.get("torch", math.inf) - times.get(chosen, 0.0)


def feed_forward(call: Call) -> Tensor:
    """The layer, for autograd to differentiate."""
    w, x = call.weights, call.x
    gate = linear_layer(x, w.gate, w.gate_bias)
    up = None if w.up is None else linear_layer(x, w.up, w.up_bias)
    y: Tensor = _Rest.apply(gate, up, w.down, w.down_bias, call)
    return y


class _Rest(torch.autograd.Function):
    """`(phi(gate) psi(up)) W_down^T + b`: the hidden values are made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        down: Tensor,
        _bias: Tensor | None,  # of the call: here it is for autograd to see
        call: Call,
    ) -> Tensor:
        # Not the call, which holds tensors that nothing but what is saved may keep alive.
        ctx.row = call.device, call.described, call.variant, call.parameters
        ctx.save_for_backward(gate, up, down)
        hidden = torch.empty_like(gate)
        apply_gating(call, gate, up, hidden)
        return down_of(call, hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up, down = ctx.saved_tensors
        grad = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        needs = ctx.needs_input_grad
        device, described, variant, parameters = ctx.row
        d_hidden = torch.mm(grad, down)
        seen_through = torch.is_grad_enabled() or watched() or batched(grad)
        if seen_through or not _readable(d_hidden, gate, up):
            return _by_formulas(grad, d_hidden, gate, up, needs, variant, parameters)
        hidden = torch.empty_like(gate)
        d_up = None if up is None else torch.empty_like(up)
        # Each element is read before it is written, so that d_hidden becomes d_gate.
        places = (d_hidden, gate, up, d_hidden, d_up, hidden)
        device.gating.run_backward(described, *places, ())
        return (
            d_hidden,
            d_up,
            torch.mm(grad.t(), hidden) if needs[2] else None,
            grad.sum(0) if needs[3] else None,
            None,
        )


def _readable(d_hidden: Tensor, gate: Tensor, up: Tensor | None) -> bool:
    """Whether a kernel can read these: what is handed out need not be as what was saved, a gradient
    may be anyone's, and under autocast a product has another dtype.
    """
    for t in (gate, up):
        if t is not None and not (
            type(t) is Tensor
            and t.dtype is d_hidden.dtype
            and t.shape == d_hidden.shape
            and t.is_contiguous()
            and in_memory(t)
        ):
            return False
    return type(d_hidden) is Tensor


def _by_formulas(
    grad: Tensor,
    d_hidden: Tensor,
    gate: Tensor,
    up: Tensor | None,
    needs: tuple[bool, ...],
    variant: str,
    parameters: Mapping[str, Value],
) -> Any:
    """The gradients by PyTorch's own operators, which have derivatives in turn."""
    branches = gate, up, variant, parameters
    wanted = [n for n, needed in zip(("gate", "up"), needs, strict=False) if needed]
    made = reference.gating_backward(d_hidden, *branches, wanted)
    found = dict(zip(wanted, made, strict=True))
    return (
        found.get("gate"),
        found.get("up"),
        torch.mm(grad.t(), reference.gating(*branches)) if needs[2] else None,
        grad.sum(0) if needs[3] else None,
        None,
    )
