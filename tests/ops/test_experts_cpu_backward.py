"""The gradients of experts by own code: every instruction set, every kind of operand."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.cases import dtypes
from support.compare import assert_matches, same_bits
from support.layers import Case, Layer, Learned, by_hand, draw
from support.levels import LEVELS, at, guarded_outputs, guarded_scratch, needs_kernels
from torch import Tensor

from gatedffn.functional import experts
from gatedffn.ops import kernels
from gatedffn.ops.experts import backward
from gatedffn.ops.gating.reference import ORDERS, joined
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels
saves = pytest.mark.parametrize("save", ["gate_up", "input"])
weighs = pytest.mark.parametrize("weigh", ["output", "input"])
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def guards() -> Iterator[None]:
    """Gradients lie amid NaNs and scratch memory between canaries."""
    with guarded_outputs(backward) as outputs, guarded_scratch() as scratches:
        yield
    assert outputs, "no gradient was guarded"
    assert scratches, "no call of own code was made"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Operands by name, weights stacked; `layers` are the experts, which share x and parameters."""

    layers: tuple[Layer, ...]
    index: Tensor
    weights: Tensor
    grad: Tensor

    def tensors(self) -> Results:
        """Everything that a gradient can be asked of."""
        first = self.layers[0]
        stacks = {
            name: torch.stack([getattr(layer.weights, name).detach() for layer in self.layers])
            for name, of in first.weights._asdict().items()
            if of is not None
        }
        named = {"x": first.x, "routing": self.weights, **stacks, **first.parameters}
        return {n: t.detach() for n, t in named.items() if isinstance(t, Tensor)}

    def to(self, dtype: torch.dtype) -> "Mixture":
        layers = tuple(layer.to(dtype) for layer in self.layers)
        weights = self.weights.to(dtype)
        return replace(self, layers=layers, weights=weights, grad=self.grad.to(dtype))


def routed(kind: str, tokens: int, slots: int, count: int, generator: torch.Generator) -> Tensor:
    """Which expert each slot has."""
    if kind == "one":  # and it has all tokens, some of them twice
        return torch.full((tokens, slots), count - 1)
    index = torch.randint(0, count - 1, (tokens, slots), generator=generator)
    # Slots of experts elsewhere, a token that names one twice, and the last expert has no tokens.
    index[::5, 0], index[1, :] = count + 3, index[1, 0]
    return index


@functools.lru_cache(maxsize=64)
def drawn(
    case: Case,
    count: int = 5,
    slots: int = 3,
    kind: str = "some",
    draws: int = 4,
    weigh: str = "output",
) -> tuple[Sequence[Mixture], Results, Results]:
    """Mixtures, their gradients in float64, and what eager PyTorch makes of these."""
    mixtures = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        first, *rest = [draw(case, 16 * seed + expert) for expert in range(count)]
        layers = (first, *(replace(r, x=first.x, parameters=first.parameters) for r in rest))
        index = routed(kind, len(first.x), slots, count, generator)
        weights = torch.rand(index.shape, generator=generator).to(case.dtype)
        mixtures.append(Mixture(layers, index, weights, first.grad))
    truth = stacked([found(m.to(torch.float64), eager, weigh=weigh) for m in mixtures])
    return mixtures, truth, stacked([found(m, eager, weigh=weigh) for m in mixtures])


def stacked(results: Sequence[Results]) -> Results:
    return {name: torch.stack([each[name] for each in results]) for name in results[0]}


def eager(mixture: Mixture, t: Results, weigh: str = "output") -> Tensor:
    """Expert by expert."""
    first = mixture.layers[0]
    y = torch.zeros_like(mixture.grad)
    for expert in range(len(mixture.layers)):
        token, slot = (mixture.index == expert).nonzero(as_tuple=True)
        own = {name: None if of is None else t[name][expert]
               for name, of in first.weights._asdict().items()}  # fmt: skip
        weight = t["routing"][token, slot].unsqueeze(1)
        rows = t["x"][token]
        layer = replace(
            first,
            x=rows * weight if weigh == "input" else rows,
            weights=first.weights._replace(**own),  # type: ignore[arg-type]
            parameters={n: t.get(n, value) for n, value in first.parameters.items()},
        )
        made = by_hand(layer)
        y = y.index_add(0, token, made if weigh == "input" else made * weight)
    return y


def ours(mixture: Mixture, t: Results, order: str = "", **options: Any) -> Tensor:
    row = mixture.layers[0].row
    gate, up, gate_bias, up_bias = (t.get(n) for n in ("gate", "up", "gate_bias", "up_bias"))
    if order:
        gate, up = joined(gate, up, 1, order), None  # type: ignore[arg-type]
        gate_bias, up_bias = joined(gate_bias, up_bias, 1, order), None  # type: ignore[arg-type]
    if not row.gated:
        gate, up, gate_bias, up_bias = None, gate, None, gate_bias
    given: dict[str, Any] = {"order": order or None, "weigh": "output", **options}
    given |= {n: t.get(n, value) for n, value in mixture.layers[0].parameters.items()}
    return experts(
        t["x"], gate, up, t["down"], mixture.index, t["routing"], gate_bias, up_bias,
        t.get("down_bias"), variant=row, backend="own", **given,
    )  # fmt: skip


def found(mixture: Mixture, function: Any, **options: Any) -> Results:
    """The gradient of every operand."""
    tensors = {name: t.clone().requires_grad_() for name, t in mixture.tensors().items()}
    y = function(mixture, tensors, **options)
    return dict(
        zip(tensors, torch.autograd.grad(y, [*tensors.values()], mixture.grad), strict=True)
    )


def judge(actual: Results, truth: Results, of_eager: Results) -> None:
    for name in truth:
        assert_matches(actual[name], truth[name], of_eager[name], name)


def check(case: Case, kind: str = "some", weigh: str = "output", draws: int = 4, **of: Any) -> None:
    mixtures, truth, of_eager = drawn(case, kind=kind, draws=draws, weigh=weigh)
    judge(stacked([found(m, ours, weigh=weigh, **of) for m in mixtures]), truth, of_eager)


@pytest.fixture
def threads() -> Iterator[int]:
    """Several threads, whatever the work."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MULTIPLY_ADDS_PER_THREAD", 1)
        torch.set_num_threads(3)
        yield 3
        torch.set_num_threads(before)


def swiglu(tokens: int, *sizes: int, **options: Any) -> Case:
    return Case(row=VARIANTS["swiglu"], batch=(tokens,), sizes=sizes, **options)  # type: ignore[arg-type]


@dtypes
@weighs
@pytest.mark.parametrize("tokens", [19, 90], ids=["few", "blocks"])
def test_every_level(dtype: torch.dtype, weigh: str, tokens: int) -> None:
    for level in LEVELS:
        with at(level):
            check(swiglu(tokens, 67, 35, 18, dtype=dtype), weigh=weigh, order="gate_up")


@saves
@pytest.mark.parametrize("tokens", [9, 120], ids=["few", "blocks"])
@pytest.mark.parametrize(
    ("name", "learned"), [("gelu", ""), ("xielu", "layer"), ("swiglu", "unit"), ("swiglu", "layer")]
)
def test_every_kind(name: str, learned: Learned, tokens: int, save: str) -> None:
    check(Case(row=VARIANTS[name], batch=(tokens,), learned=learned), save=save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("weigh", "save"), [("output", "gate_up"), ("input", "input")])
def test_more_tokens_of_an_expert_than_are_worked_on_at_a_time(
    dtype: torch.dtype, weigh: str, save: str, threads: int
) -> None:
    # So wide that a tile has 352 tokens.
    case = swiglu(130, 4100, 6, 5, dtype=dtype, learned="unit")
    check(case, "one", weigh, draws=1, save=save, order="interleaved")
    assert threads > 1


@pytest.mark.parametrize("sizes", [(1, 1, 1), (131, 97, 116), (16, 8, 16)], ids=str)
def test_ragged_sizes(sizes: tuple[int, int, int]) -> None:
    check(swiglu(40, *sizes), draws=12 if sizes[0] == 1 else 4)


@saves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_gradients_are_those_of_the_branches(dtype: torch.dtype, save: str) -> None:
    mixture = drawn(swiglu(30, 24, 40, 80, dtype=dtype))[0][0]
    expected = found(mixture, ours, save=save)
    for order in ORDERS:
        packed = found(mixture, ours, save=save, order=order)
        assert all(same_bits(packed[name], expected[name]) for name in expected), order


@weighs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_numbers_for_any_threads(dtype: torch.dtype, weigh: str, threads: int) -> None:
    mixture = drawn(swiglu(200, 67, 35, 18, dtype=dtype), 9)[0][0]
    several = found(mixture, ours, weigh=weigh)
    torch.set_num_threads(1)
    alone = found(mixture, ours, weigh=weigh)
    assert threads > 1
    assert all(same_bits(several[name], alone[name]) for name in alone)


def test_experts_without_tokens_and_slots_without_experts_get_zeros() -> None:
    mixture = drawn(swiglu(19, 67, 35, 18))[0][0]
    skipped = mixture.index >= len(mixture.layers)
    mixture = replace(mixture, weights=mixture.weights.masked_fill(skipped, torch.nan))
    gradients = found(mixture, ours)
    assert skipped.any()
    assert (gradients["routing"][skipped] == 0).all()
    for name in mixture.layers[0].weights._fields:
        assert (gradients[name][-1] == 0).all(), name
        assert gradients[name][:-1].flatten(1).any(1).all(), name
    assert all(of.isfinite().all() for of in gradients.values())


def test_operands_that_are_parts_of_larger_ones() -> None:
    mixture = drawn(swiglu(30, 24, 40, 16))[0][0]
    expected = found(mixture, ours)

    def amid_nans(t: Tensor) -> Tensor:
        larger = torch.full([n + 3 for n in t.shape], torch.nan, dtype=t.dtype)
        part = larger[tuple(slice(1, 1 + n) for n in t.shape)]
        return part.copy_(t)

    tensors = {name: amid_nans(t).requires_grad_() for name, t in mixture.tensors().items()}
    y = ours(mixture, tensors)
    gradients = torch.autograd.grad(y, [*tensors.values()], amid_nans(mixture.grad))
    assert all(map(same_bits, gradients, expected.values()))
    assert all(of.is_contiguous() for of in gradients)


@pytest.mark.parametrize("wanted", ["x", "routing", "gate", "down", "gate_bias", "down_bias"])
def test_what_is_wanted_alone_is_what_it_is_with_the_rest(wanted: str) -> None:
    for weigh in ("output", "input"):
        mixture = drawn(swiglu(60, 24, 40, 16))[0][0]
        expected = found(mixture, ours, weigh=weigh)[wanted]
        tensors = mixture.tensors()
        of = tensors[wanted].requires_grad_()
        (gradient,) = torch.autograd.grad(ours(mixture, tensors, weigh=weigh), of, mixture.grad)
        assert same_bits(gradient, expected), weigh


def _of_another_expert(_: Mixture, right: Results) -> Results:
    return right | {"gate": right["gate"].roll(1, 0)}


def _not_weighed(mixture: Mixture, _: Results) -> Results:
    return found(replace(mixture, weights=torch.ones_like(mixture.weights)), ours)


def _without_the_last_token(mixture: Mixture, _: Results) -> Results:
    index = mixture.index.clone()
    index[-1] = len(mixture.layers)
    return found(replace(mixture, index=index), ours)


@dtypes
@pytest.mark.parametrize(
    ("mutant", "wrong_in"),
    [
        (_of_another_expert, ("gate",)),
        (_not_weighed, ("gate", "down", "x", "down_bias")),
        (_without_the_last_token, ("gate", "down", "x", "routing")),
    ],
)
def test_faults_are_seen(mutant: Any, wrong_in: Sequence[str], dtype: torch.dtype) -> None:
    mixtures, truth, of_eager = drawn(swiglu(90, 67, 35, 18, dtype=dtype))
    right = [found(m, ours) for m in mixtures]
    judge(stacked(right), truth, of_eager)
    wrong = stacked(list(map(mutant, mixtures, right)))
    for name in wrong_in:
        with pytest.raises(AssertionError):
            assert_matches(wrong[name], truth[name], of_eager[name], name)
