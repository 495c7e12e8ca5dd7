"""How the ways of experts run forward.

A run takes the operands in the order of the operator and the parameters by name. In inference it
returns the output; in the forward of a training step a tuple of it and of what is kept: gate, and
up where there is a gate, of all slots as `reference.Pairs` sorts them.
"""

from typing import Any

from torch import Tensor

from gatedffn.ops.experts.reference import Pairs, Stack
from gatedffn.ops.feed_forward import feed_forward
from gatedffn.ops.gating.reference import widened_dtype
from gatedffn.ops.operator import Call
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Parameters, Spec, Tensors
from gatedffn.variants import VARIANTS


class Mixture:
    """A spec in the experts' own words."""

    def __init__(self, spec: Spec) -> None:
        x, index, weights, gate, _, down, *_ = spec.operands
        assert x is not None
        assert index is not None
        assert weights is not None
        assert gate is not None
        assert down is not None
        self.spec, self.x = spec, x
        self.dtype = x.dtype
        self.order, self.weigh, self.save = spec.settings
        self.row = VARIANTS[spec.variant]
        self.gated = self.row.gated
        self.experts, d_gate, self.d_model = gate.shape
        self.d_hidden = d_gate // 2 if self.order else d_gate
        self.d_out = down.shape[1]
        self.slots = index.shape[-1]
        self.tokens = x.numbers // max(self.d_model, 1)
        self.saves = spec.stage == "forward" and self.save == "gate_up"
        self.shape = (*x.shape[:-1], self.d_out)


class Slots:
    """The slots of a call as rows: the tokens of each, in the order of `Pairs`."""

    def __init__(self, mixture: Mixture, tensors: Tensors) -> None:
        x, index, weights, *_ = tensors
        assert x is not None
        assert index is not None
        assert weights is not None
        self._mixture = mixture
        self.wide = widened_dtype(mixture.dtype)
        self.pairs = Pairs(index, mixture.experts)
        self.tokens = self.pairs.sorted // max(mixture.slots, 1)
        self.weights = weights.reshape(-1)[self.pairs.sorted].to(self.wide).unsqueeze(1)
        self._x = x.reshape(-1, mixture.d_model)

    def rows(self, part: slice) -> Tensor:
        """What an expert is given."""
        rows = self._x[self.tokens[part]]
        return self.weighed(rows, part) if self._mixture.weigh == "input" else rows

    def weighed(self, rows: Tensor, part: slice) -> Tensor:
        """Rows times the routing weights, in the dtype of `x`."""
        return (rows * self.weights[part]).to(self._mixture.dtype)


def linear(spec: Spec) -> Run:
    """Expert by expert as the layer's way of this name."""
    mixture = Mixture(spec)

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        slots, stack = Slots(mixture, tensors), Stack(*tensors[3:])  # type: ignore[arg-type]
        x = tensors[0]
        assert x is not None
        sums = x.new_zeros(mixture.tokens, mixture.d_out, dtype=slots.wide)
        kept = [
            x.new_empty(mixture.tokens * mixture.slots, mixture.d_hidden)
            for _ in range((1 + mixture.gated) * mixture.saves)
        ]
        call = Call(mixture.row, parameters, (mixture.save, None), "linear")
        for expert, part in slots.pairs:
            given = (slots.rows(part), *stack.one(expert, mixture.order))
            made = feed_forward.found(spec.stage, given, call).run(given, parameters)
            y, *branches = made if spec.stage == "forward" else (made,)
            for place, branch in zip(kept, branches, strict=True):
                place[part] = branch
            y = y.to(slots.wide)
            if mixture.weigh == "output":
                y *= slots.weights[part]
            sums.index_add_(0, slots.tokens[part], y)
        y = sums.to(mixture.dtype).view(mixture.shape)
        return (y, *kept) if spec.stage == "forward" else y

    return run
