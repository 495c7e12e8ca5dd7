"""The list of workloads, and how the command line chooses among them."""

import itertools

import pytest

from gatedffn.bench.workloads import MAIN, QUICK, Workload, choose, own_workload
from gatedffn.errors import SettingError, UnknownVariant

SIZES = [(1, 4096, 11008), (16, 2048, 5632), (512, 768, 2048), (2048, 1024, 2816)]


def test_the_rows_are_those_of_the_table() -> None:
    expected = [
        *((*sizes, dtype, False) for dtype in ("float32", "bfloat16") for sizes in SIZES),
        *((*sizes, dtype, True) for dtype in ("float32", "bfloat16") for sizes in SIZES[2:]),
    ]
    workloads = [(r.tokens, r.d_model, r.d_hidden, r.dtype, r.training) for r in MAIN]
    assert workloads == expected
    assert {workload.variant for workload in MAIN} == {"swiglu"}


def test_names_tell_rows_apart() -> None:
    assert len({workload.name for workload in MAIN}) == len(MAIN)


def test_the_quick_rows_are_of_the_table_and_of_each_kind() -> None:
    assert set(QUICK) < set(MAIN)
    assert {workload.training for workload in QUICK} == {True, False}
    assert {workload.dtype for workload in QUICK} == {"float32", "bfloat16"}


def test_work_of_a_row() -> None:
    workload = Workload(tokens=10, d_model=3, d_hidden=5, dtype="bfloat16")
    assert workload.weights == 3 * 3 * 5
    assert workload.weight_bytes == 2 * 45
    assert workload.flops == 2 * 10 * 45
    assert (
        Workload(tokens=10, d_model=3, d_hidden=5, variant="relu", training=True).flops == 3 * 600
    )


def test_choosing() -> None:
    assert choose([], "swiglu", quick=False) == MAIN
    assert choose([], "swiglu", quick=True) == QUICK
    assert len(choose(["training"], "swiglu", quick=False)) == 4
    assert {workload.variant for workload in choose(["bfloat16"], "SiLU", quick=True)} == {"swish"}


def test_the_small_suite() -> None:
    small = choose([], "swiglu", quick=False, suite="small")
    assert len(small) == 64
    sizes = {(64, 172), (128, 344), (256, 688), (512, 1376)}
    assert {(w.d_model, w.d_hidden) for w in small} == sizes
    assert {w.tokens for w in small} == {1, 8, 64, 512}
    assert {(w.dtype, w.training) for w in small} == set(
        itertools.product(("float32", "bfloat16"), (False, True))
    )
    assert choose([], "swiglu", quick=True, suite="small") == small
    assert not set(small) & set(MAIN)


def test_the_gating_suite() -> None:
    gating = choose([], "swiglu", quick=False, suite="gating")
    names = [workload.name for workload in gating]
    assert len(set(names)) == len(names) == 48
    assert {(w.tokens, w.d_hidden) for w in gating} == {(1, 172), (64, 688), (512, 1376)}
    assert {"gating-1x172-float32", "packed-training-64x688-bfloat16"} < set(names)
    assert "gating-512x1376-float32-swish-beta1.5" in names
    assert len(choose(["training"], "swiglu", quick=False, suite="gating")) == 24


@pytest.mark.parametrize(("variant", "count"), [("geglu", 48), ("relu", 36)])
def test_another_variant_of_the_gating_suite(variant: str, count: int) -> None:
    gating = choose([], variant, quick=False, suite="gating")
    assert len(gating) == count
    assert {w.variant for w in gating} == {variant, "swish"}
    assert {w.variant for w in gating if w.part == "packed"} <= {"geglu"}


def test_what_gating_alone_moves() -> None:
    sizes = {"tokens": 2, "d_model": 0, "d_hidden": 5}
    made = [
        Workload(**sizes, part="gating", **more).least_bytes  # type: ignore[arg-type]
        for more in ({}, {"training": True}, {"training": True, "backward": True})
    ]
    assert made == [3 * 40, 8 * 40, 5 * 40]


def test_mistakes() -> None:
    with pytest.raises(SettingError, match="cuda has no suite 'small': it must be one of main"):
        choose([], "swiglu", quick=False, device="cuda", suite="small")
    with pytest.raises(
        SettingError, match="no workload has '3x3' in its name; the workloads are 1x4096"
    ):
        choose(["3x3"], "swiglu", quick=False)
    with pytest.raises(UnknownVariant, match="did you mean"):
        choose([], "swigul", quick=False)
    sizes = {"tokens": 1, "d_model": 8, "d_hidden": None}
    with pytest.raises(SettingError, match="dtype is 'int8': it must be one of float32"):
        own_workload(**sizes, dtype="int8", training=False, variant="relu")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="tokens is 0: it must be at least 1"):
        own_workload(
            tokens=0, d_model=8, d_hidden=8, dtype="float32", training=False, variant="relu"
        )
