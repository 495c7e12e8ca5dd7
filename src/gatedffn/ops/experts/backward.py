"""The gradients of experts.

A run takes the gradient of the output, what forward kept (nothing, or gate and up), the operands
and the parameters, and returns the gradients that the spec wants, in its order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gatedffn.activations import SCALARS
from gatedffn.ops import kernels
from gatedffn.ops.experts.forward import Mixture, Slots, Stacked
from gatedffn.ops.experts.reference import Stack
from gatedffn.ops.feed_forward import feed_forward
from gatedffn.ops.gating import parameter_gradient
from gatedffn.ops.gating.reference import joined
from gatedffn.ops.kernels import scratch
from gatedffn.ops.operator import Call
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Matrix, Parameters, Spec, Tensors

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


WEIGHTS = ("gate", "up", "down")
# Tokens of an expert up to which its weights are read as they lie: beyond, it pays to pack them.
MOST_FEW, FEW_BESIDE_TILES = 32, 16


def own(spec: Spec) -> Run:
    """All experts in one call of own code; see cpu/backward.h."""
    mixture = Mixture(spec)
    order, d_hidden = mixture.order, mixture.d_hidden
    wanted = frozenset(spec.wanted)
    stack = dict(zip(Stack._fields, spec.operands[3:], strict=True))
    places = Stacked(mixture, spec.operands[3:])
    # Those of biases are written beside each other, and packed in the end.
    weights_of = [n for n in WEIGHTS if n in wanted]
    sums = Stacked(mixture, [_alike(stack[n]) if n in weights_of else None for n in WEIGHTS])
    packs = bool(order) and "gate_bias" in wanted
    by_tiles = mixture.dtype == torch.bfloat16 and kernels.has_tiles()
    not_saved = (None,) * (3 - len(spec.given))
    laid = kernels.Laid((mixture.x, *spec.given, *not_saved))
    x_stride, grad_stride, gate_stride, up_stride = laid.strides
    facts = {
        **{"x_stride": x_stride, "grad_stride": grad_stride, "saved_gate_stride": gate_stride},
        **{"saved_up_stride": up_stride, "sum_x_stride": mixture.d_model},
        **{
            f"sum_{n}_{way}": sums.facts[f"{n}_{way}"] for n in WEIGHTS for way in ("expert", "row")
        },
        **{"few": FEW_BESIDE_TILES if by_tiles else MOST_FEW, "saved": len(spec.given) > 1},
        **{**mixture.facts, **places.facts},
    }
    call, size = kernels.EXPERTS_BACKWARD.bind(**facts), kernels.EXPERTS_BACKWARD.scratch(**facts)
    formulas = kernels.formulas(kernels.describe, spec)
    of_phi = SCALARS[mixture.row.phi].parameters

    def run(
        grad: Tensor, saved: Sequence[Tensor], tensors: Tensors, parameters: Parameters
    ) -> list[Tensor]:
        x, index, weights, *stack = tensors
        assert x is not None
        assert index is not None
        assert weights is not None
        # What is copied to be read must live until it was, as must scratch memory not kept.
        (x_at, *given_at), _given = laid.addresses((x, grad, *saved, *not_saved))
        found, _stack = places.addresses(stack)
        index = index.to(torch.int64).contiguous()
        routing = weights.to(torch.float32).contiguous()
        operands = dict(zip(Stack._fields, stack, strict=True))
        made = {n: torch.empty_like(operands[n]) for n in weights_of}  # type: ignore[arg-type]
        sums_at, _made = sums.addresses([made.get(n) for n in WEIGHTS])
        biases = {}
        for n in WEIGHTS:
            if f"{n}_bias" in wanted or (packs and n != "down"):
                width = mixture.d_out if n == "down" else d_hidden
                biases[f"{n}_bias"] = x.new_empty(mixture.experts, width)
        made |= biases
        if "x" in wanted:
            made["x"] = x.new_empty(x.shape)
        if "weights" in wanted:
            made["weights"] = routing.new_zeros(routing.shape)
        learned = {
            n: x.new_empty(mixture.experts, d_hidden, dtype=torch.float64)
            for n in of_phi
            if n in wanted
        }
        memory, formula = scratch(size), formulas(parameters)
        written = [made.get(n) for n in (*(f"{n}_bias" for n in WEIGHTS), "weights")]
        written += [learned.get(n) for n in (*of_phi, "", "")[:2]]
        call(
            *(formula.pointer, x_at, *found, index.data_ptr(), routing.data_ptr(), *given_at),
            *(_at(made.get("x")), *sums_at[:3], *map(_at, written), memory.data_ptr()),
        )
        if packs:
            made["gate_bias"] = joined(biases["gate_bias"], biases["up_bias"], 1, order)
        if "weights" in wanted:
            made["weights"] = made["weights"].to(weights.dtype)
        for n, of_units in learned.items():
            made[n] = parameter_gradient(of_units.sum(0), parameters[n])
        return [made[n] for n in spec.wanted]

    return run


def _alike(matrix: Matrix | None) -> Matrix | None:
    """How `torch.empty_like` of an operand lies."""
    assert matrix is not None
    of = torch.empty_strided(matrix.shape, matrix.strides, device="meta")
    return matrix._replace(strides=torch.empty_like(of).stride())


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
