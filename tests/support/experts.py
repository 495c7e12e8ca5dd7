"""Mixtures of experts: what is drawn, and an oracle that goes through them token by token."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.functional import experts
from gatedffn.ops.experts.ways import WAYS
from gatedffn.ops.plan import DEFINITION
from gatedffn.variants import VARIANTS, Variant
from support.compare import assert_matches
from support.eager import eager_gating
from support.layers import Learned, Results

BACKENDS = (*dict.fromkeys(way.name for way in WAYS.ways if "cpu" in way.hardware), DEFINITION)
STACKED = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
COUNT = 5  # experts, of which index 5 and beyond are elsewhere
ELSEWHERE = (5, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is drawn: `order` is that of packed weights, `by_columns` stores (in, out)."""

    row: Variant = VARIANTS["swiglu"]
    tokens: int = 8
    slots: int = 3
    sizes: tuple[int, int, int] = (6, 10, 7)  # d_model, d_hidden, d_out
    dtype: torch.dtype = torch.float64
    order: str | None = None
    weigh: str = "output"
    bias: bool = True
    learned: Learned = ""
    by_columns: bool = False


@dataclass(frozen=True, slots=True)
class Mixture:
    """The operands of a call, its parameters, and the gradient of what it gives."""

    case: Case
    x: Tensor
    index: Tensor
    weights: Tensor
    stack: Mapping[str, Tensor | None]
    parameters: Mapping[str, Value]
    grad: Tensor

    def tensors(self) -> Results:
        """Everything that a gradient can be asked of, by name."""
        named = {"x": self.x, "weights": self.weights, **self.stack, **self.parameters}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Mixture":
        """The same with every operand but the index changed; `change` gets its name."""
        made = {name: change(name, t) for name, t in self.tensors().items()}
        return replace(
            self,
            x=made["x"],
            weights=made["weights"],
            stack={name: made.get(name) for name in self.stack},
            parameters={name: made.get(name, value) for name, value in self.parameters.items()},
        )

    def to(self, dtype: torch.dtype) -> "Mixture":
        """The same numbers in another dtype, each tensor a leaf of the same strides."""
        made = self.mapped(lambda _, t: t.detach().to(dtype, copy=True).requires_grad_())
        return replace(made, grad=self.grad.to(dtype))


def draw(case: Case, index: Tensor | None = None, seed: int = 0) -> Mixture:
    """A mixture; unless given, the index has every kind of expert: one without tokens, one that a
    token names twice, two that are elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    (d_model, d_hidden, d_out), row = case.sizes, case.row

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if index is None:
        shape = (case.tokens, case.slots)
        index = torch.randint(COUNT, shape, generator=generator)
        index[index == 2] = 1  # which leaves the third without tokens
        index[0] = 0
        index[-1, 0], index[1, -1] = ELSEWHERE
    scale = row.defaults.get("limit", 1.0)
    rows = 2 * d_hidden if case.order else d_hidden
    first = normal(COUNT, rows, d_model) / d_model**0.5
    apart = row.gated and not case.order
    stack: dict[str, Tensor | None] = {
        "gate": first,
        "up": normal(COUNT, d_hidden, d_model) / d_model**0.5 if apart else None,
        "down": normal(COUNT, d_out, d_hidden) / d_hidden**0.5,
        "gate_bias": normal(COUNT, rows) if case.bias else None,
        "up_bias": normal(COUNT, d_hidden) if case.bias and apart else None,
        "down_bias": normal(COUNT, d_out) if case.bias else None,
    }
    if case.by_columns:
        for name in ("gate", "up", "down"):
            if (t := stack[name]) is not None:
                stack[name] = t.transpose(1, 2).contiguous().transpose(1, 2)
    parameters: dict[str, Value] = dict(row.defaults)
    for parameter in row.parameters if case.learned else ():
        if parameter.learnable:
            size = d_hidden if case.learned == "unit" else 1
            parameters[parameter.name] = 0.9 + torch.linspace(-0.1, 0.1, d_hidden).double()[:size]
    x = scale * normal(*index.shape[:-1], d_model)
    weights, grad = normal(*index.shape), normal(*index.shape[:-1], d_out)
    return Mixture(case, x, index, weights, stack, parameters, grad).to(case.dtype)


def ours(mixture: Mixture, **options: Any) -> Tensor:
    """The public function."""
    case, s = mixture.case, mixture.stack
    first = (s["gate"], s["up"]) if case.row.gated else (None, s["gate"])
    bias = (s["gate_bias"], s["up_bias"]) if case.row.gated else (None, s["gate_bias"])
    down: Any = s["down"]
    given: dict[str, Any] = {"order": case.order, "weigh": case.weigh, **mixture.parameters}
    index, weights, down_bias = mixture.index, mixture.weights, s["down_bias"]
    given |= {"variant": case.row, **options}
    return experts(mixture.x, *first, down, index, weights, *bias, down_bias, **given)


def oracle(mixture: Mixture) -> Tensor:
    """Token by token and slot by slot, in PyTorch's own functions."""
    case, stack = mixture.case, mixture.stack

    def branches(name: str, expert: int) -> tuple[Any, Any]:
        packed, up = stack[f"gate{name}"], stack[f"up{name}"]
        if packed is None:
            return None, None
        half = packed.shape[1] // 2
        one = packed[expert]
        if case.order == "gate_up":
            return one[:half], one[half:]
        if case.order == "up_gate":
            return one[half:], one[:half]
        if case.order == "interleaved":
            return one[0::2], one[1::2]
        return one, None if up is None else up[expert]

    def one(x: Tensor, expert: int) -> Tensor:
        (gate, up), (gate_bias, up_bias) = branches("", expert), branches("_bias", expert)
        down, down_bias = stack["down"], stack["down_bias"]
        assert down is not None
        hidden = eager_gating(
            F.linear(x, gate, gate_bias),
            F.linear(x, up, up_bias) if case.row.gated else None,
            case.row,
            mixture.parameters,
        )
        return F.linear(hidden, down[expert], None if down_bias is None else down_bias[expert])

    def flat(t: Tensor) -> Tensor:
        return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])

    x, index, weights = map(flat, (mixture.x, mixture.index, mixture.weights))
    nothing = 0.0 * x.sum().expand(mixture.grad.shape[-1])  # which has a gradient
    rows = []
    for token, row in enumerate(x):
        total = nothing
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert >= COUNT:
                continue
            by_input = case.weigh == "input"
            total = total + (one(weight * row, expert) if by_input else weight * one(row, expert))
        rows.append(total)
    made = torch.stack(rows) if rows else nothing.expand(0, -1)
    return made.view(mixture.grad.shape)


def with_gradients(mixture: Mixture, output: Tensor) -> Results:
    """The output and the gradient of every operand, by name."""
    tensors = mixture.tensors()
    found = torch.autograd.grad(
        output,
        list(tensors.values()),
        mixture.grad.to(output.dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    return {"output": output.detach(), **dict(zip(tensors, found, strict=True))}


Yardstick = tuple[Results, Results]


def yardstick(mixture: Mixture) -> Yardstick:
    """The truth in float64, and what eager PyTorch makes of it."""
    double = mixture.to(torch.float64)
    truth = with_gradients(double, oracle(double))
    if mixture.case.dtype == torch.float64:
        # Nothing is truer: what may differ is the rounding of sums, 1e-12 of the largest number.
        return truth, {name: t + 0.5e-12 * t for name, t in truth.items()}
    return truth, with_gradients(mixture, oracle(mixture))


def judge(found: Results, against: Yardstick, by: str = "") -> None:
    """Holds all results to the truth, and to what eager PyTorch makes of it."""
    truth, eager = against
    assert found.keys() == truth.keys()
    for name, actual in found.items():
        assert_matches(actual, truth[name], eager[name], f"{name} {by}")


def check(mixture: Mixture, ways: Sequence[str] = BACKENDS, **options: Any) -> None:
    """Judges the output and every gradient that each way gives."""
    against = yardstick(mixture)
    for way in ways:
        output = ours(mixture, backend=way, **options)
        judge(with_gradients(mixture, output), against, way)
