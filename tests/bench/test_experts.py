"""Experts in the bench: who takes part, what is counted, and that wrong ones are found."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from gatedffn.bench.check import cut, make_judge, make_slices
from gatedffn.bench.contestants import EXPERTS_CONTESTANTS, Contestant, find, for_workload, kind_of
from gatedffn.bench.inputs import make_experts_inputs
from gatedffn.bench.report import color, title
from gatedffn.bench.workloads import Dtype, Workload, choose
from gatedffn.sizing import experts_touched

TINY = Workload(
    part="experts", tokens=70, d_model=32, d_hidden=80, experts=8, slots=2, training=True
)
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)


def results(kind: type[Contestant], workload: Workload) -> dict[str, Tensor]:
    contestant = kind(workload, make_experts_inputs(workload), 1)
    with contestant.mode():
        contestant.step()
        contestant.step()
    return cut(contestant.results(), make_slices(workload))


def ratio(found: dict[str, Tensor], workload: Workload) -> float:
    judge = make_judge(workload, make_experts_inputs(workload), make_slices(workload))
    return judge.verdict(found).ratio


@needs_transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
def test_right_ones_pass(dtype: Dtype, training: bool) -> None:
    workload = Workload(
        part="experts", tokens=70, d_model=32, d_hidden=80, experts=8, slots=2,
        dtype=dtype, training=training,
    )  # fmt: skip
    for name in ("gatedffn", "eager", "grouped_mm", "batched_mm"):
        kind = kind_of(EXPERTS_CONTESTANTS[name])
        found = results(kind, workload)
        expected = {"output", *(["x", "weights", "gate", "up", "down"] if training else [])}
        assert found.keys() == expected
        assert ratio(found, workload) <= kind.tolerance(workload)


def test_each_result_is_judged() -> None:
    kind = kind_of(EXPERTS_CONTESTANTS["gatedffn"])
    right = results(kind, TINY)
    assert ratio(right, TINY) <= 1.0
    for name, result in right.items():
        for wrong in (result.roll(1, 0), 1.05 * result, result.index_fill(0, torch.tensor(0), 0)):
            assert ratio({**right, name: wrong}, TINY) > 8.0, name


def test_the_suite() -> None:
    suite = choose([], "swiglu", quick=False, suite="experts")
    quick = choose([], "swiglu", quick=True, suite="experts")
    assert len({w.name for w in suite}) == len(suite) == 26
    assert set(quick) < set(suite)
    assert {w.training for w in quick} == {False, True}
    assert {(w.d_model, w.d_hidden, w.experts, w.slots, w.training) for w in suite} == {
        (2048, 768, 128, 8, False),
        (2048, 4096, 8, 2, False),
        (2048, 768, 32, 8, True),
    }
    assert title(suite[1]) == "forward, SwiGLU, 8 tokens, 2048 x 768, 8 of 128 experts, float32"
    assert suite[1].name == "experts-8x2048x768-8of128-float32"


def test_what_experts_read_and_compute() -> None:
    """Every expert that is named is read once, and every slot computed."""
    one = Workload(part="experts", tokens=1, d_model=4, d_hidden=6, experts=8, slots=3)
    assert one.least_bytes == 3 * (3 * 4 * 6) * 4
    assert one.flops == 2 * 3 * (3 * 4 * 6)
    many = Workload(part="experts", tokens=40, d_model=4, d_hidden=6, experts=128, slots=8)
    touched = many.least_bytes / (3 * 4 * 6 * 4)
    assert touched == len({*many.index.flatten().tolist()})
    assert touched == pytest.approx(experts_touched(128, 8, 40), rel=0.1)
    assert torch.equal(many.index, many.index)
    assert all(len({*row}) == 8 for row in many.index.tolist())


def test_who_takes_part() -> None:
    everyone = for_workload(find(()), TINY)
    assert list(everyone) == ["gatedffn", "eager", "compile", "grouped_mm", "batched_mm"]
    assert len({color(name) for name in EXPERTS_CONTESTANTS}) == len(EXPERTS_CONTESTANTS)
    assert "grouped_mm" not in for_workload(find(()), Workload(tokens=1, d_model=8, d_hidden=8))
    long = Workload(part="experts", tokens=2048, d_model=2048, d_hidden=768, experts=128, slots=8)
    kind = kind_of(EXPERTS_CONTESTANTS["batched_mm"])
    assert kind.refusal(long) == "a call copies 288 GiB of weights"
    relu = Workload(part="experts", tokens=1, d_model=8, d_hidden=8, variant="relu")
    assert kind_of(everyone["gatedffn"]).refusal(relu) == "experts are measured with a gate"
