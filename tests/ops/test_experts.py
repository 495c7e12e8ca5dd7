"""Experts: every variant and way against an oracle token by token, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.compare import same_bits
from support.experts import (
    BACKENDS,
    COUNT,
    STACKED,
    Case,
    Mixture,
    Yardstick,
    check,
    draw,
    judge,
    oracle,
    ours,
    with_gradients,
    yardstick,
)
from torch import Tensor

from gatedffn.errors import GatedFFNError, ParameterError, SettingError, ShapeError
from gatedffn.functional import experts
from gatedffn.ops import measure
from gatedffn.ops.gating.reference import ORDERS
from gatedffn.variants import VARIANTS, Variant

backends = pytest.mark.parametrize("backend", BACKENDS)
OF_DOUBLES = tuple(name for name in BACKENDS if name != "own")


def of(backend: str, **more: Any) -> Case:
    """A case that a way takes, large enough that nothing is exact by luck."""
    dtype = torch.float32 if backend == "own" else torch.float64
    return Case(dtype=dtype, tokens=40, sizes=(24, 40, 24), **more)


rows = pytest.mark.parametrize("row", VARIANTS.values(), ids=list(VARIANTS))
WEIGHS, SAVES = ("output", "input"), ("gate_up", "input")


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


@rows
def test_every_variant_and_every_order(row: Variant) -> None:
    orders = (None, *ORDERS) if row.gated else (None, None)
    # All orders with some variants, two with each.
    place = list(VARIANTS).index(row.name) % (len(orders) - 1)
    for number in (0, 1 + place):
        order = orders[number]
        case = Case(
            row=row,
            order=order,
            weigh=WEIGHS[number % 2],
            bias=number != 1,
            learned=("unit", "layer")[number % 2],
            by_columns=number > 1,
        )
        check(draw(case), OF_DOUBLES, save=SAVES[number // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weigh", WEIGHS)
@pytest.mark.parametrize("save", SAVES)
def test_every_dtype(dtype: torch.dtype, weigh: str, save: str) -> None:
    order = None if save == "input" else "interleaved"
    case = Case(tokens=60, sizes=(24, 40, 16), dtype=dtype, weigh=weigh, order=order)
    check(draw(case), save=save)


@pytest.mark.parametrize(
    "index",
    [
        torch.zeros(0, 3, dtype=torch.int64),
        torch.zeros(4, 0, dtype=torch.int64),
        torch.tensor([[3]]),
        torch.tensor([[1, 1, 1]] * 9),
        torch.full((6, 2), COUNT),
        torch.tensor([[4, 0], [0, 4], [2**40, 2]]),
        torch.arange(8, dtype=torch.int32).view(2, 2, 2),
        torch.tensor([2, 0, 2]),
    ],
    ids=["none", "no slots", "one", "all on one", "elsewhere", "far", "batch", "vector"],
)
def test_every_kind_of_index(index: Tensor) -> None:
    check(draw(Case(order="gate_up"), index), OF_DOUBLES)


@backends
@pytest.mark.parametrize("weigh", WEIGHS)
def test_a_weight_of_an_expert_elsewhere_does_not_matter(weigh: str, backend: str) -> None:
    mixture = draw(of(backend, weigh=weigh))
    elsewhere = mixture.index >= COUNT
    spoilt = mixture.mapped(
        lambda name, t: (
            t.detach().masked_fill(elsewhere, torch.nan).requires_grad_()
            if name == "weights"
            else t
        )
    )
    found = with_gradients(spoilt, ours(spoilt, backend=backend))
    judge(found, yardstick(mixture))
    assert not found["weights"][elsewhere].any()


@backends
def test_gradients_lie_as_the_operands_do(backend: str) -> None:
    for by_columns in (False, True):
        if backend == "own" and by_columns:
            continue  # its backward takes rows alone
        mixture = draw(of(backend, by_columns=by_columns))
        found = with_gradients(mixture, ours(mixture, backend=backend))
        if backend == "definition":  # autograd's gradients lie as they come
            continue
        for name, t in mixture.tensors().items():
            assert found[name].stride() == t.stride()


@backends
def test_equal_calls_give_equal_bits_and_the_rest_is_zero(backend: str) -> None:
    mixture = draw(Case(dtype=torch.float32, tokens=40))
    found = with_gradients(mixture, ours(mixture, backend=backend))
    again = with_gradients(mixture, ours(mixture, backend=backend))
    assert all(same_bits(found[name], again[name]) for name in found)
    assert not any(found[name][2].any() for name in STACKED)  # no token names it


@pytest.mark.parametrize(
    ("tokens", "backend"), [(0, "auto"), (0, "definition"), *((3, name) for name in BACKENDS)]
)
def test_without_pairs_there_are_gradients_and_theirs(tokens: int, backend: str) -> None:
    """All slots are of experts elsewhere, or there are none: as a rank of many may have it."""
    mixture = draw(Case(order="gate_up", dtype=torch.float32), torch.full((tokens, 2), COUNT))
    y = ours(mixture, backend=backend)
    first = torch.autograd.grad(y.square().sum(), [*mixture.tensors().values()], create_graph=True)
    assert not any(gradient.any() for gradient in first)
    torch.autograd.backward([gradient.square().sum() for gradient in first])
    assert not any(t.grad.any() for t in mixture.tensors().values() if t.grad is not None)


def test_operands_apart_in_memory() -> None:
    """A view of every other number, and one tensor as weights of both branches."""
    mixture = draw(Case())

    def spread(_: str, t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)
        wide[..., 0] = t.detach()
        return wide[..., 0].requires_grad_()

    apart = mixture.mapped(spread)
    judge(with_gradients(apart, ours(apart)), yardstick(mixture))
    gate: Any = mixture.stack["gate"]
    same = replace(mixture, stack={**mixture.stack, "up": gate})
    (found,) = torch.autograd.grad(ours(same).sum(), [gate])
    (truth,) = torch.autograd.grad(oracle(same).sum(), [gate])
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


# Wrong ones: each must be rejected.


def _swapped(mixture: Mixture) -> Mixture:
    return mixture.mapped(lambda name, t: t.roll(1, 0) if name in STACKED else t)


def _branches_swapped(mixture: Mixture) -> Mixture:
    stack = mixture.stack
    return replace(mixture, stack={**stack, "gate": stack["up"], "up": stack["gate"]})


def _weight_twice(mixture: Mixture) -> Mixture:
    return replace(mixture, weights=mixture.weights.square())


def _neighbour(mixture: Mixture) -> Mixture:
    return replace(mixture, weights=mixture.weights.flip(-1))


def _other_end(mixture: Mixture) -> Mixture:
    return replace(mixture, case=replace(mixture.case, weigh="input"))


def _last_dropped(mixture: Mixture) -> Mixture:
    index = mixture.index.clone()
    index[-1] = COUNT
    return replace(mixture, index=index)


def _no_down_bias(mixture: Mixture) -> Mixture:
    return replace(mixture, stack={**mixture.stack, "down_bias": None})


@cache
def right(dtype: torch.dtype) -> tuple[Mixture, Yardstick]:
    mixture = draw(Case(dtype=dtype, tokens=40, sizes=(24, 40, 16)))
    return mixture, yardstick(mixture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        *(_swapped, _branches_swapped, _weight_twice, _neighbour),
        *(_other_end, _last_dropped, _no_down_bias),
    ],
)
def test_wrong_ones_are_rejected(wrong: Callable[[Mixture], Mixture], dtype: torch.dtype) -> None:
    mixture, (truth, eager) = right(dtype)
    output = {"output": ours(wrong(mixture)).detach()}
    with pytest.raises(AssertionError, match="error is"):
        judge(output, ({"output": truth["output"]}, {"output": eager["output"]}))


def test_a_sum_in_bfloat16_is_rejected() -> None:
    """Over many slots, where every partial sum is rounded."""
    index = torch.arange(COUNT).repeat(20).expand(30, 100)
    mixture = draw(Case(dtype=torch.bfloat16, sizes=(24, 40, 16)), index)
    mixture = mixture.mapped(lambda name, t: t.detach().abs() if name == "weights" else t)
    double = mixture.to(torch.float64)
    truth = oracle(double).detach()
    parts = [
        ours(replace(mixture, index=index[:, k, None], weights=mixture.weights[:, k, None]))
        for k in range(index.shape[-1])
    ]
    rounded = torch.zeros_like(parts[0])
    for part in parts:
        rounded = rounded + part
    # Held to what our own sum is known to reach: half a unit at the end, once.
    once = torch.stack([part.float() for part in parts]).sum(0).to(torch.bfloat16)
    judge({"output": ours(mixture).detach()}, ({"output": truth}, {"output": once}))
    with pytest.raises(AssertionError, match="error is"):
        judge({"output": rounded.detach()}, ({"output": truth}, {"output": once}))


# What is refused.


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_an_expert_below_zero_is_refused_everywhere(backend: str) -> None:
    mixture = draw(of(backend, order="gate_up"))
    mixture.index[3, 1] = -2

    def call(x: Tensor) -> Tensor:
        return ours(replace(mixture, x=x), backend=backend)

    with pytest.raises(ShapeError, match="index holds -2: experts count from 0"):
        call(mixture.x)
    with torch.no_grad(), pytest.raises(ShapeError, match="index holds -2"):
        call(mixture.x)
    if backend == "auto":
        return
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises((ShapeError, RuntimeError), match="index holds"):
        compiled(mixture.x)
    if backend != "definition":
        return
    with pytest.raises(ShapeError, match="index holds -2"):
        torch.func.grad(lambda x: call(x).sum())(mixture.x)
    with pytest.raises(ShapeError, match="index holds -2"):
        torch.func.vmap(lambda index: ours(replace(mixture, index=index)))(mixture.index[None])


def given(**changed: Any) -> dict[str, Any]:
    """Operands that fit, some of them changed."""
    return {
        "x": torch.ones(3, 4),
        "gate_weight": torch.ones(2, 5, 4),
        "up_weight": torch.ones(2, 5, 4),
        "down_weight": torch.ones(2, 4, 5),
        "index": torch.zeros(3, 2, dtype=torch.int64),
        "weights": torch.ones(3, 2),
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"x": torch.ones(3, 5)}, ShapeError, "the last size of both must be d_model"),
        ({"x": torch.ones(2, 4)}, ShapeError, r"x is \(2, 4\), index \(3, 2\) and weights"),
        ({"weights": torch.ones(3, 1)}, ShapeError, r"must be .* \(..., slots\) and"),
        (
            {"weights": torch.ones(3, 2).long()},
            ShapeError,
            "weights is torch.int64: it must be",
        ),
        ({"index": torch.ones(3, 2)}, ShapeError, "index is torch.float32: .* int64 or int32"),
        ({"index": [[0, 1]] * 3}, ShapeError, "index is list: it must be a tensor of int64"),
        ({"gate_weight": torch.ones(5, 4)}, ShapeError, r"must be \(experts, d_hidden, d_model\)"),
        (
            {"up_weight": torch.ones(2, 6, 4)},
            ShapeError,
            r"up_weight is \(2, 6, 4\): .* 5, 4\)",
        ),
        ({"down_weight": torch.ones(3, 4, 5)}, ShapeError, r"down_weight is \(3, 4, 5\)"),
        ({"gate_bias": torch.ones(2, 4)}, ShapeError, r"gate_bias is \(2, 4\): .* \(2, 5\)"),
        ({"down_bias": torch.ones(4)}, ShapeError, r"down_bias is \(4,\): .* be \(2, 4\)"),
        ({"index": torch.zeros(3, 2, device="meta").long()}, ShapeError, "index is on meta"),
        ({"gate_weight": None}, ParameterError, "gate_weight must not be None"),
        ({"up_weight": None}, ParameterError, "up_weight and order exclude each other"),
        ({"order": "gate_up"}, ParameterError, "up_weight and order exclude each other"),
        ({"variant": "relu"}, ParameterError, "gate_weight, gate_bias and order must be None"),
        (
            {"variant": "relu", "gate_weight": None, "up_weight": None},
            ParameterError,
            "up_weight must not be None",
        ),
        (
            {"up_weight": None, "order": "gate_up"},
            ShapeError,
            r"\(2, 5, 4\): packed, its second size must be even",
        ),
        (
            {"up_weight": None, "order": "first", "gate_weight": torch.ones(2, 10, 4)},
            SettingError,
            "order is 'first': it must be one of gate_up",
        ),
        ({"weigh": "both"}, SettingError, "weigh is 'both': it must be one of output, input"),
        ({"save": "all"}, SettingError, "save is 'all'"),
        ({"backend": "fast"}, GatedFFNError, "backend is 'fast': it must be one of auto"),
        ({"beta": torch.ones(3, 1)}, ShapeError, r"beta of 'swiglu' is \(3, 1\)"),
        ({"alpha": 1.0}, ParameterError, "has no parameter alpha"),
    ],
)
def test_what_does_not_fit_is_told(
    changed: dict[str, Any], kind: type[Exception], words: str
) -> None:
    experts(**given())
    with pytest.raises(kind, match=words):
        experts(**given(**changed))
