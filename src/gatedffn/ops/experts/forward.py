"""How the ways of experts run forward.

A run takes the operands in the order of the operator and the parameters by name. In inference it
returns the output; in the forward of a training step a tuple of it and of what is kept: gate, and
up where there is a gate, of all slots as `reference.Pairs` sorts them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedffn.ops import kernels
from gatedffn.ops.experts.reference import Pairs, Stack, check_index
from gatedffn.ops.feed_forward import feed_forward
from gatedffn.ops.gating.reference import branches, widened_dtype
from gatedffn.ops.operator import Call
from gatedffn.ops.plan import Run
from gatedffn.ops.spec import Matrix, Parameters, Spec, Tensors
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

    @property
    def no_kernel(self) -> str | None:
        """Why the own kernel cannot take it; None when it can."""
        if self.dtype not in kernels.DTYPES:
            return f"there is no kernel for {self.dtype}"
        if not self.tokens * self.slots:
            return "there are no slots"
        return self.spec.own_functions or kernels.missing()

    @property
    def facts(self) -> dict[str, int]:
        """What own kernels are told besides how operands lie."""
        work = 3 * self.tokens * self.slots * self.d_model * self.d_hidden
        return {
            **{"weigh_input": int(self.weigh == "input"), "tokens": self.tokens},
            **{"slots": self.slots, "experts": self.experts, "d_model": self.d_model},
            **{"d_hidden": self.d_hidden, "d_out": self.d_out},
            "dtype": kernels.DTYPES[self.dtype],
            "threads": kernels.threads(work, kernels.MULTIPLY_ADDS_PER_THREAD),
        }

    def branches(self, matrix: Matrix, packed: bool) -> tuple[Tensor, ...]:
        """How those of a weight or a bias lie in it: tensors without numbers."""
        whole = torch.empty_strided(matrix.shape, matrix.strides, device="meta")
        return branches(whole, 1, self.order) if packed and self.order else (whole,)


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


# The own kernel


def own(spec: Spec) -> Run:
    """All experts in one call; see cpu/forward.h."""
    mixture = Mixture(spec)
    laid, places = kernels.Laid([mixture.x]), Stacked(mixture, spec.operands[3:])
    facts = {"x_stride": laid.strides[0], **mixture.facts, **places.facts}
    call, size = kernels.EXPERTS.bind(**facts), kernels.EXPERTS.scratch(**facts)
    formulas = kernels.formulas(kernels.describe, spec)
    pairs, kept = mixture.tokens * mixture.slots, (1 + mixture.gated) * mixture.saves

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        x, index, weights, *stack = tensors
        assert x is not None
        assert index is not None
        assert weights is not None
        check_index(index)
        index = index.to(torch.int64).contiguous()
        weights = weights.to(torch.float32).contiguous()
        # What is copied to be read must live until it was, as must scratch memory not kept.
        (x_at,), _x = laid.addresses([x])
        found, _stack = places.addresses(stack)
        formula, memory = formulas(parameters), kernels.scratch(size)
        y = x.new_empty(mixture.shape)
        saved = [x.new_empty(pairs, mixture.d_hidden) for _ in range(kept)]
        routed = index.data_ptr(), weights.data_ptr(), y.data_ptr()
        saved_at = [*(t.data_ptr() for t in saved), 0, 0][:2]
        call(formula.pointer, x_at, *found, *routed, *saved_at, memory.data_ptr())
        return (y, *saved) if spec.stage == "forward" else y

    return run


class Stacked:
    """Weights and biases of experts as the own kernel takes them: strides, and addresses in a call.

    What is packed is taken where it lies.
    """

    NAMES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")

    def __init__(self, mixture: Mixture, stack: Sequence[Matrix | None]) -> None:
        self.facts: dict[str, int] = {}
        self._given: list[tuple[int, int, list[tuple[int, int]]]] = []
        self._copied = False
        for place, of in enumerate(stack):
            if of is None:
                continue
            bytes_of = of.dtype.itemsize
            if place == len(stack) - 1 and not of.by_rows:
                self._copied = True
                of = of._replace(strides=(mixture.d_out, 1))
            lain = mixture.branches(of, self.NAMES[place] in ("gate", "gate_bias"))
            # Packed, `gate` and `gate_bias` are also what `up` and `up_bias` would be.
            at = [(place + i, int(view.storage_offset()) * bytes_of) for i, view in enumerate(lain)]
            for (target, _), view in zip(at, lain, strict=True):
                self._add(self.NAMES[target], view)
            self._given.append((place, of.end, at))
        for name in self.NAMES:  # those that are missing lie by rows
            self._add(name, torch.empty((1, 1) if "bias" in name else (1, 1, 1), device="meta"))

    def _add(self, name: str, view: Tensor) -> None:
        expert, row, *deep = view.stride()
        named = {f"{name}_expert": expert}
        if deep:
            # A weight of one column or one row lies as one likes.
            by_rows = deep[0] == 1 or view.shape[2] == 1
            named |= {f"{name}_row": row, f"{name}_deep": 1 if by_rows else deep[0]}
        elif name != "down_bias":
            named[f"{name}_step"] = row
        self.facts = named | self.facts

    def addresses(self, tensors: Tensors) -> tuple[list[int], Any]:
        """Where they are, 0 for those that are missing; and what must live while they are read.

        Raises:
            Unreadable: as `kernels.address`.
        """
        if self._copied:
            *others, down_bias = tensors
            assert down_bias is not None
            tensors = (*others, down_bias.contiguous())
        found = [0] * len(self.NAMES)
        for place, end, at in self._given:
            first = kernels.address(tensors[place], end)  # type: ignore[arg-type]
            for target, offset in at:
                found[target] = first + offset
        return found, tensors
