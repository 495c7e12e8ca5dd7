"""The plan of a call: decided once from one table, with reasons, and kept for equal calls."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.compare import same_bits
from support.layers import BACKENDS, needs
from torch import Tensor
from torch.utils._pytree import tree_leaves

import gatedffn as gf
from gatedffn import functional
from gatedffn.errors import BackendError
from gatedffn.ops import measure, operator, plan
from gatedffn.ops.plan import Plan, Run, Way, Ways
from gatedffn.ops.spec import Spec, facts, matrices

SPEC = Spec(
    *("swiglu", "inference", torch.device("cpu"), "cpu", matrices(facts([torch.zeros(2, 3)]))), ()
)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, measure.Choice]:
    """What was measured, by key; the last of the ways is always the fastest."""
    made: dict[str, measure.Choice] = {}

    def choose(key: str, names: list[str], trials: Any, finish: Callable[[], None]) -> Any:
        if key not in made or made[key].chosen not in names:
            runs = trials()
            assert list(runs) == names
            for run in runs.values():
                run()
                finish()
            made[key] = measure.Choice(names[-1], dict.fromkeys(names, 1.0), "measured")
        return made[key]

    monkeypatch.setattr(measure, "tuning", lambda: True)
    monkeypatch.setattr(measure, "known", made.get)
    monkeypatch.setattr(measure, "choose", choose)
    return made


# deciding, from a table of this file's own


def way(name: str, why_not: str | None = None, not_worth: str | None = None, **row: Any) -> Way:
    given: dict[str, Any] = {"why_not": lambda _: why_not, "not_worth": lambda _: not_worth}
    given |= {"name": name, "bind": lambda _: lambda: name}
    return Way(**(given | row))


def decide(
    *ways: Way, spec: Spec = SPEC, backend: str = "auto", finish: Any = measure.nothing, **of: Any
) -> Plan:
    given: dict[str, Any] = {
        "definition": lambda *_: "definition",
        "gradients": lambda *_: [],
        "why_definition": lambda _: None,
        "key": lambda spec: f"of {spec.stage}",
    }
    return plan.plan(Ways(ways, **(given | of)), spec, backend, lambda run: run, finish)


FIRST, SECOND, THIRD = map(way, ("first", "second", "third"))


def failing(name: str) -> Way:
    def run() -> None:
        raise RuntimeError("no such instruction")

    return way(name, bind=lambda _: run)


@pytest.mark.usefixtures("measured")
def test_by_rule_a_way_that_fails_on_a_gpu_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "tuning", lambda: False)
    on_gpu = SPEC._replace(hardware="gpu")
    found = decide(failing("odd"), SECOND, spec=on_gpu)
    assert (found.chosen, found.reason) == ("second", "the rule without measuring")
    assert found.against == {"odd": "it failed with: no such instruction"}
    assert "odd is out, it failed with: no such instruction" in caplog.text
    assert decide(failing("odd"), spec=on_gpu).chosen == "definition"
    # Elsewhere nothing is compiled at a first call, and while a graph is captured nothing may run.
    assert decide(failing("odd"), SECOND).chosen == "odd"
    assert decide(failing("odd"), SECOND, spec=on_gpu, finish=None).chosen == "odd"


@pytest.mark.usefixtures("measured")
def test_a_way_that_ran_on_a_gpu_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "tuning", lambda: False)
    ran: list[str] = []
    first = way("first", bind=lambda _: lambda: ran.append("first"))
    for _ in range(3):
        decide(first, SECOND, spec=SPEC._replace(hardware="gpu"))
    assert ran == ["first"]


def test_what_speaks_against_a_way(measured: dict[str, Any]) -> None:
    ways = (way("first", "it is too odd"), way("second", None, "it is too slow"), THIRD)
    found = decide(*ways)
    assert (found.chosen, found.reason) == ("third", "nothing else runs here")
    assert found.against == {"first": "it is too odd", "second": "it is too slow"}
    assert found.run() == "third"
    named = decide(*ways, backend="second")  # what is slow may be asked for
    assert (named.chosen, named.reason) == ("second", "it was asked for")
    assert named.against == {"first": "it is too odd"}
    with pytest.raises(BackendError, match="'first' cannot compute this call: it is too odd"):
        decide(*ways, backend="first")
    assert not measured


@pytest.mark.parametrize(
    ("row", "stage", "reason"),
    [
        ({"hardware": ("gpu",)}, "inference", "it does not run on cpu"),
        (
            {"hardware": ("cpu",), "stages": ("inference",)},
            "forward",
            "it is not for training: it saves nothing",
        ),
    ],
    ids=["hardware", "stage"],
)
def test_a_named_way_that_has_no_row_here(row: Any, stage: str, reason: str) -> None:
    spec = SPEC._replace(stage=stage)
    with pytest.raises(BackendError, match=f"'mine' cannot compute this call: {reason}"):
        decide(FIRST, way("mine", **row), spec=spec, backend="mine")
    assert decide(FIRST, way("mine", **row), spec=spec).against == {}


def test_a_name_for_forward_alone_leaves_backward_to_the_others() -> None:
    backward = SPEC._replace(stage="backward")
    mine = way("mine", stages=("inference", "forward"))
    assert decide(FIRST, mine, backend="mine").chosen == "mine"
    assert decide(FIRST, mine, backend="mine", spec=backward).chosen == "first"


def test_what_is_left_to_the_definition() -> None:
    unfit: Any = {"why_definition": lambda _: "a width is 0"}
    found = decide(FIRST, SECOND, **unfit)
    assert (found.chosen, found.reason, found.against) == ("definition", "a width is 0", {})
    with pytest.raises(BackendError, match="'first' cannot compute this call: a width is 0"):
        decide(FIRST, SECOND, backend="first", **unfit)
    asked = decide(FIRST, SECOND, backend="definition", **unfit)
    assert (asked.chosen, asked.reason) == ("definition", "it was asked for")
    found = decide(way("first", "it is too odd"), way("second", None, "it is too slow"))
    assert (found.chosen, found.reason) == ("definition", "nothing else computes it")
    assert found.against == {"first": "it is too odd", "second": "it is too slow"}


def test_what_can_be_taken_is_measured_once(measured: dict[str, Any]) -> None:
    bound: list[str] = []

    def noted(way: Way) -> Way:
        def bind(_: Spec) -> Run:
            bound.append(way.name)
            return lambda: way.name

        return way._replace(bind=bind)

    odd, slow = way("odd", "it is too odd"), way("slow", None, "it is too slow")
    ways = list(map(noted, (FIRST, odd, SECOND, slow, THIRD)))
    found = decide(*ways)
    assert (found.chosen, found.reason, found.run()) == ("third", "measured", "third")
    assert found.milliseconds == {"first": 1.0, "second": 1.0, "third": 1.0}
    assert set(found.against) == {"odd", "slow"}
    assert bound == ["first", "second", "third"]
    assert decide(*ways) == found
    assert bound[3:] == ["third"]
    assert list(measured) == ["of inference: first or second or third"]
    assert decide(*ways, order=lambda ways, _: ways[::-1], key=lambda _: "other").chosen == "first"


def test_the_rule_where_nothing_is_measured(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = SPEC._replace(operands=matrices(facts([torch.zeros(0, 3)])))
    assert decide(FIRST, SECOND, spec=empty).chosen == "first"
    monkeypatch.setattr(measure, "tuning", lambda: False)
    found = decide(FIRST, SECOND)
    assert (found.chosen, found.reason) == ("first", "the rule without measuring")
    assert decide(FIRST, SECOND, order=lambda ways, _: ways[::-1]).chosen == "second"
    assert not measured


def test_nothing_is_measured_while_a_graph_is_captured(measured: dict[str, Any]) -> None:
    found = decide(FIRST, SECOND, finish=None)
    assert (found.chosen, found.lasting) == ("first", False)
    assert found.reason == "nothing can be measured while a graph is captured"
    assert not measured
    assert decide(FIRST, SECOND).chosen == "second"
    known = decide(FIRST, SECOND, finish=None)
    assert (known.chosen, known.lasting) == ("second", True)
    # A choice among others says nothing of these.
    found = decide(FIRST, THIRD, finish=None)
    assert (found.chosen, found.lasting) == ("first", False)
    assert measured["of inference: first or second"].chosen == "second"


# keeping, by the operators


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """The spec of every decision."""
    specs: list[Spec] = []
    real = plan.plan

    def decide(table: Ways, spec: Spec, *of: Any) -> Plan:
        specs.append(spec)
        return real(table, spec, *of)

    monkeypatch.setattr(plan, "plan", decide)
    return specs


def operands(tokens: int = 3, **of: Any) -> list[Tensor]:
    return [torch.randn(*size, **of) for size in ((tokens, 24), (40, 24), (40, 24), (24, 40))]


def train(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = layer(x)
    torch.autograd.backward(y, torch.ones_like(y))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("variant", ["gelu", "swiglu", "xielu"])
def test_explain_and_calls_use_the_same_plans(
    variant: str, backend: str, planned: list[Spec]
) -> None:
    dtype = torch.bfloat16 if backend == "tiles" else torch.float32
    needs(backend, dtype)
    layer = gf.FeedForward(24, 40, variant=variant, bias=True, backend=backend, dtype=dtype)
    x = torch.randn(3, 24, dtype=dtype, requires_grad=True)

    def calls() -> None:
        with torch.no_grad():
            layer(x)
        train(layer, x)

    def explained() -> list[Plan]:
        return list(gf.explain(layer, x)[0].plans.values())

    found = explained()
    decided = len(planned)
    assert 2 <= decided <= 3
    calls()
    assert len(planned) == decided
    assert all(a is b for a, b in zip(explained(), found, strict=True))
    operator.forget_plans()
    calls()
    assert explained() == found
    assert len(planned) == 2 * decided


def layer_call() -> None:
    functional.feed_forward(*operands())


def training_call() -> None:
    x, *weights = operands(requires_grad=True)
    train(lambda x: functional.feed_forward(x, *weights), x)


def learned_call() -> None:
    beta, (x, *weights) = torch.ones(40, requires_grad=True), operands()
    train(lambda x: functional.feed_forward(x, *weights, beta=beta), x)


def gating_call() -> None:
    gate, up = torch.randn(2, 3, 40).requires_grad_().unbind()
    train(lambda gate: functional.gating(gate, up), gate)


def packed_call() -> None:
    train(functional.glu, torch.randn(3, 40).requires_grad_())


@pytest.mark.parametrize(
    ("call", "stages"),
    [
        (layer_call, ["inference"]),
        (training_call, ["forward", "backward"]),
        (learned_call, ["forward", "backward"]),
        (gating_call, ["forward", "backward"]),
        (packed_call, ["forward", "backward"]),
    ],
)
def test_equal_calls_have_equal_specs(
    call: Callable[[], None], stages: list[str], planned: list[Spec]
) -> None:
    call()
    call()
    assert [spec.stage for spec in planned] == stages  # planned once
    operator.forget_plans()
    call()
    first, again = planned[: len(stages)], planned[len(stages) :]
    assert first == again
    assert list(map(hash, first)) == list(map(hash, again))
    assert not any(isinstance(leaf, Tensor) for leaf in tree_leaves(planned))


CHANGES: dict[str, Callable[[list[Tensor]], tuple[list[Tensor], dict[str, Any]]]] = {
    "tokens": lambda of: ([of[0][:2], *of[1:]], {}),
    "batch": lambda of: ([of[0][None], *of[1:]], {}),
    "strides": lambda of: ([*of[:3], of[3].t().contiguous().t()], {}),
    "dtype": lambda of: ([t.to(torch.bfloat16) for t in of], {}),
    "needed": lambda of: ([*of[:3], of[3].clone().requires_grad_()], {}),
    "bias": lambda of: (of, {"down_bias": torch.randn(24)}),
    "variant": lambda of: (of, {"variant": "geglu"}),
    "parameter": lambda of: (of, {"beta": 2.0}),
    "learned": lambda of: (of, {"beta": torch.full((40,), 2.0)}),
    "save": lambda of: (of, {"save": "input"}),
    "tile": lambda of: (of, {"tile": 1}),
    "backend": lambda of: (of, {"backend": "torch"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_calls_that_differ_are_planned_apart(change: Any, planned: list[Spec]) -> None:
    of = operands()
    functional.feed_forward(*of)
    tensors, options = change(of)
    y = functional.feed_forward(*tensors, **options)
    assert len(planned) == 2
    operator.forget_plans()
    assert same_bits(y, functional.feed_forward(*tensors, **options))


def test_what_surrounds_a_call_counts(planned: list[Spec]) -> None:
    threads = torch.get_num_threads()
    try:
        for now, deterministic in ((1, False), (2, False), (2, True)):
            torch.set_num_threads(now)
            torch.use_deterministic_algorithms(deterministic)
            layer_call()
            layer_call()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert [spec.threads for spec in planned] == [1, 2, 2]


def test_a_plan_that_is_not_to_last_is_not_kept(
    planned: list[Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plan.plan
    monkeypatch.setattr(plan, "plan", lambda *of: replace(real(*of), lasting=False))
    training_call()
    training_call()
    assert [spec.stage for spec in planned] == ["forward", "backward"] * 2


def test_so_many_are_kept_and_no_more(planned: list[Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "MOST_ENTRIES", 2)
    for tokens in (1, 2, 3, 3, 1):
        functional.feed_forward(*operands(tokens))
    assert [spec.x.shape[0] for spec in planned] == [1, 2, 3, 1]


def test_nothing_is_kept_alive() -> None:
    layer = gf.FeedForward(24, 40, variant="xielu")
    x = torch.randn(3, 24, requires_grad=True)
    train(layer, x)
    gf.explain(layer, x)
    ends = [weakref.ref(tensor) for tensor in (x, *layer.parameters())]
    del layer, x
    gc.collect()
    assert [end() for end in ends] == [None] * len(ends)
