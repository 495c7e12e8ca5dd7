"""The gradients of experts.

A run takes the gradient of the output, what forward kept (nothing, or gate and up), the operands
and the parameters, and returns the gradients that the spec wants, in its order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gatedffn.ops.experts.forward import Mixture, Slots
from gatedffn.ops.experts.reference import Stack
from gatedffn.ops.feed_forward import feed_forward
from gatedffn.ops.operator import Call
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Parameters, Spec, Tensors

STACKED = frozenset(Stack._fields)


def linear(spec: Spec) -> Run:
    """Expert by expert as the layer's way of this name."""
    mixture = Mixture(spec)
    order, row = mixture.order, mixture.row
    learned = [name for name in spec.wanted if name in row.defaults]
    stacked = [name for name in spec.wanted if name in STACKED]
    by_weights, by_x = "weights" in spec.wanted, "x" in spec.wanted
    # Of packed operands the layer has two.
    packed = {"gate": ("gate", "up"), "gate_bias": ("gate_bias", "up_bias")} if order else {}
    asked = [one for name in stacked for one in packed.get(name, (name,))]
    needs_x = by_x or (by_weights and mixture.weigh == "input")
    wanted = (*(["x"] if needs_x else []), *asked, *learned)

    def run(
        grad: Tensor, saved: Sequence[Tensor], tensors: Tensors, parameters: Parameters
    ) -> list[Tensor]:
        operands = dict(zip(("x", "index", "weights", *Stack._fields), tensors, strict=True))
        slots, stack = Slots(mixture, tensors), Stack(*tensors[3:])  # type: ignore[arg-type]
        flat_grad = grad.reshape(-1, mixture.d_out)
        made = {name: torch.zeros_like(operands[name]) for name in stacked}  # type: ignore[arg-type]
        places = Stack(*(made.get(name) for name in Stack._fields))  # type: ignore[arg-type]
        sums = flat_grad.new_zeros(mixture.tokens if by_x else 0, mixture.d_model, dtype=slots.wide)
        of_weights = slots.weights.new_zeros(len(slots.weights) if by_weights else 0)
        of_learned = {
            name: torch.zeros_like(parameters[name], dtype=torch.float64)  # type: ignore[arg-type]
            for name in learned
        }
        call = Call(row, parameters, (mixture.save, None), "linear")
        for expert, part in slots.pairs:
            given = (slots.rows(part), *stack.one(expert, order))
            given_grad = flat_grad[slots.tokens[part]]
            if mixture.weigh == "output":
                if by_weights:
                    y = feed_forward.found("inference", given, call).run(given, parameters)
                    of_weights[part] = (y.to(slots.wide) * given_grad).sum(1)
                given_grad = slots.weighed(given_grad, part)
            if not wanted:
                continue
            held = (given_grad, *(branch[part] for branch in saved))
            plan = feed_forward.found("backward", given, call, wanted, held)
            found = dict(zip(wanted, plan.run(held[0], held[1:], given, parameters), strict=True))
            if needs_x:
                of_x = found["x"].to(slots.wide)
                if mixture.weigh == "input":
                    if by_weights:
                        x = operands["x"].reshape(-1, mixture.d_model)  # type: ignore[union-attr]
                        of_weights[part] = (of_x * x[slots.tokens[part]]).sum(1)
                    of_x *= slots.weights[part]
                if by_x:
                    sums.index_add_(0, slots.tokens[part], of_x)
            for name, place in places.one(expert, order)._asdict().items():
                if place is not None:
                    place.copy_(found[name])
            for name in learned:
                of_learned[name] += found[name]
        if by_x:
            made["x"] = sums.to(mixture.dtype).view(mixture.x.shape)
        if by_weights:
            weights = operands["weights"]
            assert weights is not None
            of_slots = torch.zeros_like(of_weights)
            of_slots[slots.pairs.sorted] = of_weights
            made["weights"] = of_slots.view(weights.shape).to(weights.dtype)
        for name in learned:
            made[name] = of_learned[name].to(parameters[name].dtype)  # type: ignore[union-attr]
        return [made[name] for name in spec.wanted]

    return run
