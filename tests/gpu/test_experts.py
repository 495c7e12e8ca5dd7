"""Experts by a GPU's kernels: every variant, dtype, layout and routing, forward and backward.

In the interpreter, tensors of the CPU stand for those of a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import DTYPES
from support.compare import assert_matches, same_bits
from support.experts import (
    COUNT,
    Case,
    Mixture,
    Yardstick,
    draw,
    judge,
    ours,
    with_gradients,
    yardstick,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gatedffn.errors import BackendError
from gatedffn.functional import experts as experts_of
from gatedffn.ops import gpu, measure
from gatedffn.ops.experts.gpu import products, routes
from gatedffn.ops.experts.op import experts
from gatedffn.ops.gating.reference import ORDERS
from gatedffn.ops.operator import Call
from gatedffn.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("on_gpu")
SMALL = (24, 40, 16)
DRAWN = list(DTYPES.values())


def of_two(tokens: int) -> Tensor:
    """An index of two experts of five, and one elsewhere: few blocks, which the interpreter takes
    one after the other.
    """
    index = torch.tensor([0, 3]).repeat(tokens, 1)
    index[0, 0] = COUNT
    return index


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "tuning", lambda: False)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaNs."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on(device: torch.device, mixture: Mixture) -> Mixture:
    """The same there, each tensor a leaf as it lies."""
    moved = mixture.mapped(lambda _, t: t.detach().to(device).requires_grad_())
    return replace(moved, index=mixture.index.to(device), grad=mixture.grad.to(device))


def by_kernels(mixture: Mixture, device: torch.device, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient, all on the CPU."""
    there = on(device, mixture)
    with poisoned():
        made = with_gradients(there, ours(there, backend="grouped", **options))
    return {name: t.cpu() for name, t in made.items()}


def judged(mixture: Mixture, device: torch.device, **options: Any) -> None:
    judge(by_kernels(mixture, device, **options), yardstick(mixture))


# Of each kind of variant one: the functions are the layer's, whose tests have every variant.
KINDS = {
    (row.gated, row.psi, tuple(p.learnable for p in row.parameters)): name
    for name, row in VARIANTS.items()
}


@pytest.mark.parametrize(("number", "name"), [*enumerate(KINDS.values())])
def test_every_kind_of_variant(number: int, name: str, device: torch.device) -> None:
    row = VARIANTS[name]
    orders = (None, *ORDERS) if row.gated else (None,)
    case = Case(
        row=row,
        sizes=(24, 24, 40),
        dtype=DRAWN[number % 3],
        order=orders[number % len(orders)],
        weigh=("output", "input")[number // 2 % 2],
        bias=number % 5 != 0,
        learned="unit",
        by_columns=number // 3 % 2 == 1,
    )
    judged(draw(case, of_two(24)), device, save=("gate_up", "input")[number // 4 % 2])


# Blocks that are full and not, several of an expert, and tiles beyond the widths on every side.
@pytest.mark.parametrize(
    "case",
    [
        Case(sizes=(40, 70, 70), dtype=torch.float32, order="interleaved", by_columns=True),
        Case(sizes=(40, 140, 40), dtype=torch.bfloat16, order="gate_up", weigh="input"),
    ],
    ids=["fp32", "bf16"],
)
def test_several_tiles(case: Case, device: torch.device) -> None:
    judged(draw(replace(case, learned="unit"), of_two(34)), device)


def test_what_slots_give_is_held_for_some_columns_at_a_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(sizes=(70, 24, 70), dtype=torch.float32, weigh="input")
    mixture = draw(case, of_two(16))
    whole = by_kernels(mixture, device)
    judge(whole, yardstick(mixture))
    monkeypatch.setattr(products, "PARTS", 1)
    parts = by_kernels(mixture, device)
    assert all(same_bits(parts[name], t) for name, t in whole.items())


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([[3]]),
        torch.tensor([[1, 1, 1]] * 9),
        torch.full((6, 2), COUNT),
        torch.tensor([[4, 0], [0, 4], [2**40, 2]] * 6),
        torch.arange(8, dtype=torch.int32).view(2, 2, 2),
        torch.tensor([2, 0, 2]),
    ],
    ids=["one", "all on one", "elsewhere", "far", "batch", "vector"],
)
def test_every_kind_of_index(index: Tensor, device: torch.device) -> None:
    judged(draw(Case(sizes=SMALL, dtype=torch.float32, order="gate_up"), index), device)


def test_operands_may_lie_anyhow(device: torch.device) -> None:
    mixture = draw(Case(sizes=SMALL, dtype=torch.float32))
    against = yardstick(mixture)

    def laid(_: str, t: Tensor) -> Tensor:
        """Amid NaNs, each number of a tensor two from the next."""
        wide = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)
        wide[..., 1] = t.detach()
        return wide[..., 1].requires_grad_()

    judge(by_kernels(mixture.mapped(laid), device), against)


def test_a_weight_of_an_expert_elsewhere_does_not_matter(device: torch.device) -> None:
    mixture = draw(Case(sizes=SMALL, dtype=torch.float32))
    elsewhere = mixture.index >= COUNT
    spoilt = mixture.mapped(
        lambda name, t: (
            t.detach().masked_fill(elsewhere, torch.nan).requires_grad_()
            if name == "weights"
            else t
        )
    )
    found = by_kernels(spoilt, device)
    judge(found, yardstick(mixture))
    assert not found["weights"][elsewhere].any()


def test_equal_calls_give_equal_bits_and_gradients_lie_as_operands_do(
    device: torch.device,
) -> None:
    mixture = draw(Case(sizes=SMALL, dtype=torch.float32, by_columns=True))
    found, again = (by_kernels(mixture, device) for _ in range(2))
    assert all(same_bits(again[name], t) for name, t in found.items())
    assert not any(found[name][2].any() for name in ("gate", "up", "down"))  # it has no token
    for name, t in mixture.tensors().items():
        assert found[name].stride() == t.stride()


def some_of(mixture: Mixture, wanted: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    """Some gradients alone."""
    there = on(device, mixture)
    asked = {name: t.requires_grad_(name in wanted) for name, t in there.tensors().items()}
    asked = {name: asked[name] for name in wanted}
    made = torch.autograd.grad(ours(there, backend="grouped"), list(asked.values()), there.grad)
    return {name: t.cpu() for name, t in zip(asked, made, strict=True)}


@pytest.mark.parametrize(
    ("wanted", "weigh"),
    [
        (("x",), "output"),
        (("x",), "input"),
        (("weights",), "output"),
        (("weights",), "input"),
        (("gate",), "output"),
        (("down",), "output"),
        (("down_bias",), "output"),
        (("beta", "up_bias"), "input"),
    ],
)
def test_some_gradients(wanted: tuple[str, ...], weigh: str, device: torch.device) -> None:
    case = Case(sizes=SMALL, dtype=torch.float32, weigh=weigh, learned="unit")
    mixture = draw(case, of_two(16))
    truth, eager = yardstick(mixture)
    for name, found in some_of(mixture, wanted, device).items():
        assert_matches(found, truth[name], eager[name], name)


def test_a_parameter_of_the_layer_gathers_those_of_the_units(device: torch.device) -> None:
    mixture = draw(Case(sizes=SMALL, dtype=torch.float32, learned="layer"))
    one = mixture.parameters["beta"]
    assert isinstance(one, Tensor)
    each = one.detach().expand(SMALL[1]).clone().requires_grad_()
    apart = replace(mixture, parameters={"beta": each})
    found, of_each = (some_of(m, ("beta",), device)["beta"] for m in (mixture, apart))
    torch.testing.assert_close(found, of_each.double().sum(0, keepdim=True).float())


def test_what_experts_give_is_not_rounded_before_it_is_added_up(device: torch.device) -> None:
    def weight(*values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.bfloat16, device=device)

    up = weight(*[[[1.0], [1.0]]] * 3)
    down = weight([[256.0, 1.0]], [[-256.0, 0.0]], [[0.0, 0.0]])  # 257 is no bfloat16
    index, weights = torch.tensor([[0, 1, 2]], device=device), weight([1.0, 1.0, 1.0])
    given = (weight([1.0]), None, up, down, index, weights)
    assert experts_of(*given, variant="relu", backend="grouped").item() == 1.0


# What waits


class Waits(TorchDispatchMode):
    """Raises where the host asks for numbers of the device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select"}
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    mixture = on(device, draw(Case(sizes=SMALL, dtype=torch.float32, learned="unit")))
    named = {**mixture.stack, "x": mixture.x, "index": mixture.index, "weights": mixture.weights}
    tensors = [None if (t := named[name]) is None else t.detach() for name in experts.operands]
    parameters = {name: v.detach() for name, v in mixture.parameters.items()}  # type: ignore[union-attr]
    call = Call(mixture.case.row, parameters, ("", "output", "gate_up"), "grouped")
    wanted = tuple(mixture.tensors())
    forward = experts.found("forward", tensors, call)
    _, *saved = forward.run(tensors, parameters)
    backward = experts.found("backward", tensors, call, wanted, (mixture.grad, *saved))
    with Waits():
        forward.run(tensors, parameters)
        backward.run(mixture.grad, saved, tensors, parameters)


def test_an_expert_below_0_is_refused_without_waiting(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("it ends all work of this process on the device")
    mixture = draw(Case(dtype=torch.float32), torch.tensor([[0, 1], [2, -1]]))
    with pytest.raises(RuntimeError, match="index holds a number below 0"):
        ours(mixture, backend="grouped")


def test_it_is_taken_and_what_waits_is_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = on(device, draw(Case(dtype=torch.float32)))
    named = {**mixture.stack, "x": mixture.x, "index": mixture.index, "weights": mixture.weights}
    tensors = [named[name] for name in experts.operands]
    call = Call(mixture.case.row, {"beta": 1.0}, ("", "output", "gate_up"))
    plans = experts.plans(tensors, call, ("x", "gate"))
    assert {plan.chosen for plan in plans.values()} == {"grouped"}
    assert all("it waits for the device" in plan.against["linear"] for plan in plans.values())
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    plans = experts.plans(wide, call, ("x",))
    assert {plan.chosen for plan in plans.values()} == {"linear"}
    assert plans["inference"].against["grouped"] == "there is no kernel for torch.float64"
    # Within a graph the one says so, and the other has another way.
    expected = ours(mixture, backend="definition").detach()
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    with pytest.raises(BackendError, match="take the backend 'grouped' or 'definition'"):
        ours(mixture, backend="linear")
    with Waits():
        made = ours(mixture, backend="definition")
    torch.testing.assert_close(made.detach(), expected)


# known-wrong kernels


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Mixture]:
    return lambda mixture: mixture.mapped(lambda n, t: change(t.detach()) if n == name else t)


def _in_order(mixture: Mixture) -> Mixture:
    return replace(mixture, case=replace(mixture.case, order="up_gate"))


MUTANTS: dict[str, Callable[[Mixture], Mixture]] = {
    "experts swapped": _changed("down", lambda t: t.roll(1, 0)),
    "weight applied twice": _changed("weights", torch.square),
    "weighed at the other side": lambda m: replace(m, case=replace(m.case, weigh="input")),
    "gate and up swapped": _in_order,
    "first bias forgotten": _changed("gate_bias", torch.zeros_like),
    "last bias forgotten": _changed("down_bias", torch.zeros_like),
    "skipped tail": _changed("x", lambda t: t.index_fill(1, torch.tensor(t.shape[1] - 1), 0.0)),
    "elsewhere taken for the last": lambda m: replace(m, index=m.index.clamp(max=COUNT - 1)),
}


@pytest.fixture(scope="module")
def right() -> Mixture:
    return draw(Case(sizes=SMALL, dtype=torch.float32, order="gate_up"), of_two(24))


@pytest.fixture(scope="module")
def against(right: Mixture) -> Yardstick:
    return yardstick(right)


def judged_output(mixture: Mixture, against: Yardstick, device: torch.device) -> None:
    truth, eager = against
    made = ours(on(device, mixture), backend="grouped").detach().cpu()
    assert_matches(made, truth["output"], eager["output"])


def test_the_right_one_is_accepted(
    right: Mixture, against: Yardstick, device: torch.device
) -> None:
    judged_output(right, against, device)


@pytest.mark.parametrize("wrong", MUTANTS.values(), ids=list(MUTANTS))
def test_mutants_are_rejected(
    wrong: Callable[[Mixture], Mixture],
    right: Mixture,
    against: Yardstick,
    device: torch.device,
) -> None:
    with pytest.raises(AssertionError):
        judged_output(wrong(right), against, device)


def _last_block_lost(made: routes.Blocks) -> None:
    made.table[0, made.table[0] == made.table[0, 0]] = COUNT


def _a_row_off(made: routes.Blocks) -> None:
    made.table[1] += 1


@pytest.mark.parametrize("fault", [_last_block_lost, _a_row_off])
def test_wrong_routes_are_rejected(
    fault: Callable[..., None],
    right: Mixture,
    against: Yardstick,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = routes.Routes.blocks

    def wrong(self: routes.Routes, of: int) -> routes.Blocks:
        known = of in self._blocks
        made = blocks(self, of)
        if not known:
            fault(made)
        return made

    monkeypatch.setattr(routes.Routes, "blocks", wrong)
    with pytest.raises(AssertionError):
        judged_output(right, against, device)
