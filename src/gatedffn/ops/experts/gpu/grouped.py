"""The way `grouped`, forward and backward, by the grouped products of products.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedffn.ops import gpu
from gatedffn.ops.experts.forward import Mixture
from gatedffn.ops.experts.gpu import products
from gatedffn.ops.experts.gpu.routes import Routes
from gatedffn.ops.experts.reference import Stack
from gatedffn.ops.feed_forward.forward import rows
from gatedffn.ops.gating.reference import branches
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Parameters, Spec, Tensors


class _Given:
    """The operands of a call as the kernels take them; the weights are of one side's rows."""

    def __init__(self, mixture: Mixture, tensors: Tensors) -> None:
        x, index, weights, *stack = tensors
        assert x is not None
        assert index is not None
        assert weights is not None
        self.x = rows(x)
        self.routes = Routes(index, mixture.experts)
        flat = weights.reshape(-1).contiguous()
        self.of_input, self.of_output = (
            flat if mixture.weigh == side else None for side in ("input", "output")
        )
        self.stack = unpacked(Stack(*stack), mixture.order)  # type: ignore[arg-type]
        self.biases = [None if b is None else b.contiguous() for b in self.stack[3:]]

    def branches(
        self, mixture: Mixture, formula: gpu.Formula, hidden: Tensor | None, keeps: bool
    ) -> list[Tensor]:
        """Writes the hidden values of all rows; gate and up too, which are returned, if it keeps
        them.
        """
        gate, up, *_ = self.stack
        shape = (self.routes.rows, mixture.d_hidden)
        kept = [self.x.new_empty(shape) for _ in range((1 + mixture.gated) * keeps)]
        out_gate, out_up = (*kept, None, None)[:2]
        products.hidden_values(
            self.routes,
            self.x,
            self.of_input,
            gate,
            up,
            self.biases[0],
            self.biases[1],
            formula,
            hidden,
            out_gate,
            out_up,
        )
        return kept


def unpacked(stack: Stack, order: str) -> Stack:
    """The weights of all experts with both branches apart: views."""
    if not order:
        return stack
    (gate, up), (gate_bias, up_bias) = (
        (None, None) if t is None else branches(t, 1, order) for t in (stack.gate, stack.gate_bias)
    )
    return Stack(gate, up, stack.down, gate_bias, up_bias, stack.down_bias)  # type: ignore[arg-type]


def forward(spec: Spec) -> Run:
    mixture = Mixture(spec)

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        given, formula = _Given(mixture, tensors), gpu.describe(spec.variant, parameters)
        hidden = given.x.new_empty(given.routes.rows, mixture.d_hidden)
        kept = given.branches(mixture, formula, hidden, mixture.saves)
        y = given.x.new_empty(mixture.tokens, mixture.d_out)
        made = ((hidden, given.stack.down),)
        products.summed(given.routes, given.of_output, made, given.biases[2], y)
        y = y.view(mixture.shape)
        return (y, *kept) if spec.stage == "forward" else y

    return run


def backward(spec: Spec) -> Run:
    mixture, wanted = Mixture(spec), frozenset(spec.wanted)
    learned = [name for name in spec.wanted if name in mixture.row.defaults]
    weighs_input = mixture.weigh == "input"
    through_x = "x" in wanted or (weighs_input and "weights" in wanted)
    first = {"gate", "up", "gate_bias", "up_bias"} & wanted
    dotted = "weights" in wanted and not weighs_input

    def run(
        grad: Tensor, saved: Sequence[Tensor], tensors: Tensors, parameters: Parameters
    ) -> list[Tensor]:
        given, formula = _Given(mixture, tensors), gpu.describe(spec.variant, parameters)
        x, routes, grad = given.x, given.routes, rows(grad)
        gate_weight, up_weight, down, *_ = given.stack
        named = dict(zip(("x", "index", "weights", *Stack._fields), tensors, strict=True))
        made = {
            name: torch.empty_like(named[name])  # type: ignore[arg-type]
            for name in spec.wanted
            if name in Stack._fields
        }
        out = unpacked(Stack(*(made.get(n) for n in Stack._fields)), mixture.order)  # type: ignore[arg-type]
        if wanted - {"down_bias"}:
            shape = (routes.rows, mixture.d_hidden)
            kept = [t.reshape(shape).contiguous() for t in saved]
            kept = kept or given.branches(mixture, formula, None, True)
            places = x.new_empty(1 + mixture.gated if first or through_x else 0, *shape).unbind()
            d_gate, d_up = (*places, None, None)[:2]
            hidden = x.new_empty(shape) if "down" in wanted else None
            gate, up, *_ = (*kept, None)
            assert gate is not None
            sums, dots = products.branch_gradients(
                routes,
                grad,
                given.of_output,
                down.transpose(1, 2),
                given.biases[2],
                gate,
                up,
                formula,
                d_gate,
                d_up,
                hidden,
                learned,
                dotted,
            )
            for d, weight, bias in ((d_gate, out.gate, out.gate_bias), (d_up, out.up, out.up_bias)):
                if weight is not None:
                    products.weight_gradient(routes, d, x, given.of_input, weight)  # type: ignore[arg-type]
                if bias is not None:
                    products.bias_gradient(routes, d, None, False, bias)  # type: ignore[arg-type]
            if hidden is not None:
                place = out.down.transpose(1, 2)
                products.weight_gradient(routes, hidden, grad, None, place)
            if through_x:
                of_x = x.new_empty(x.shape) if "x" in wanted else None
                pairs = ((d_gate, gate_weight), (d_up, up_weight))
                terms = tuple((d, w.transpose(1, 2)) for d, w in pairs if d is not None)  # type: ignore[union-attr]
                meets = x if weighs_input and "weights" in wanted else None
                found = products.summed(routes, given.of_input, terms, None, of_x, meets)
                dots = found if meets is not None else dots
                if of_x is not None:
                    made["x"] = of_x.view(mixture.x.shape)
            if dots is not None:
                like = named["weights"]
                made["weights"] = dots.view(like.shape).to(like.dtype)  # type: ignore[union-attr]
            for name in learned:
                value = parameters[name]
                assert isinstance(value, Tensor)
                total = sums[name] if value.numel() > 1 else sums[name].sum()
                made[name] = total.view(value.shape).to(value.dtype)
        if out.down_bias is not None:
            products.bias_gradient(routes, grad, given.of_output, True, out.down_bias)
        return [made[name] for name in spec.wanted]

    return run
