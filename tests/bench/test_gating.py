"""Gating alone on the processor: every spelling computes it, and eager's is a user's."""

import pytest
import torch
import torch.nn.functional as F

from bench.test_check import USERS, judge, results, torch_uses_jit
from gatedffn.bench import gating
from gatedffn.bench.contestants import Contestant, find, for_workload, kind_of
from gatedffn.bench.gating import plain_gating, plain_packed_gating
from gatedffn.bench.workloads import GATING, Workload
from gatedffn.variants import VARIANTS

SMALLEST = [workload for workload in GATING if workload.tokens == 1]


def named(workload: Workload) -> str:
    return workload.name


@pytest.mark.parametrize("kind", [gating.Eager, gating.Ours], ids=["eager", "ours"])
@pytest.mark.parametrize("workload", SMALLEST, ids=named)
def test_right_ones_pass(kind: type[Contestant], workload: Workload) -> None:
    assert judge(workload).verdict(results(kind, workload)).ratio <= 1.0


@torch_uses_jit
@pytest.mark.slow
@pytest.mark.parametrize("kind", [gating.Compiled, gating.OursCompiled], ids=["eager", "ours"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_ones_pass(kind: type[Contestant], training: bool) -> None:
    workload = Workload(tokens=64, d_model=0, d_hidden=172, part="packed", training=training)
    assert judge(workload).verdict(results(kind, workload)).ratio <= kind.tolerance(workload)


@pytest.mark.parametrize("part", ["gating", "packed"])
def test_each_result_of_a_training_step_is_judged(part: str) -> None:
    workload = Workload(tokens=70, d_model=0, d_hidden=96, part=part, training=True)  # type: ignore[arg-type]
    right = results(gating.Eager, workload)
    assert right.keys() == {"hidden", "d_gate", "d_up"}
    for name, tensor in right.items():
        for wrong in (tensor.roll(1, 0), tensor.flip(1), 1.05 * tensor, tensor * torch.nan):
            verdict = judge(workload).verdict({**right, name: wrong})
            assert verdict.name == name
            assert verdict.ratio > Contestant.tolerance(workload)


def test_another_beta_is_found() -> None:
    workload = Workload(tokens=70, d_model=0, d_hidden=96, part="gating", variant="swish")
    other = Workload(tokens=70, d_model=0, d_hidden=96, part="gating", variant="swish", beta=1.5)
    assert judge(other).verdict(results(gating.Ours, workload)).ratio > 8.0


@pytest.mark.parametrize("variant", list(USERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_what_a_user_writes(variant: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 10, dtype=dtype, generator=torch.Generator().manual_seed(0))
    gate, up = x.chunk(2, -1)
    expected = USERS[variant](gate, up)
    workload = Workload(tokens=3, d_model=0, d_hidden=5, part="gating", variant=variant)
    assert torch.equal(plain_gating(workload)(gate, up), expected)
    assert torch.equal(plain_packed_gating(workload)(x), expected)


def test_eager_swish_is_what_a_user_writes() -> None:
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    plain = Workload(tokens=3, d_model=0, d_hidden=5, part="gating", variant="swish")
    own = Workload(tokens=3, d_model=0, d_hidden=5, part="gating", variant="swish", beta=1.5)
    assert plain_gating(plain) is F.silu
    assert torch.equal(plain_gating(own)(x), x * torch.sigmoid(1.5 * x))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_can_be_packed(variant: str) -> None:
    if not VARIANTS[variant].gated:
        return
    workload = Workload(tokens=4, d_model=0, d_hidden=8, part="packed", variant=variant)
    for kind in (gating.Eager, gating.Ours):
        assert judge(workload).verdict(results(kind, workload)).ratio <= 1.0


def test_backward_alone_is_for_a_gpu() -> None:
    workload = Workload(
        tokens=4, d_model=0, d_hidden=8, part="gating", training=True, backward=True
    )
    assert (gating.Eager.refusal(workload) or "").startswith("backward alone is measured on a GPU")


def test_who_takes_part() -> None:
    packed = Workload(tokens=4, d_model=0, d_hidden=8, part="packed")
    taking_part = for_workload(find(()), packed)
    assert list(taking_part) == ["gatedffn", "eager", "compile"]
    everyone = for_workload(find(("gatedffn-compile", "jax", "compile")), packed)
    assert list(everyone) == ["compile", "gatedffn-compile"]
    assert kind_of(everyone["gatedffn-compile"]) is gating.OursCompiled
