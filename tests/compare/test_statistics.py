import math
from typing import Any

import pytest
from scipy import stats

from gatedffn.compare.statistics import best, interval, rank
from gatedffn.compare.store import Record


def record(variant: str, seed: int, loss: float | None, **changes: Any) -> Record:
    result = {"held_out": loss, "selection": loss, "diverged": loss is None, "step_time": 0.1}
    cost = {"width": 8, "parameters": 10, "mismatch": 0.0, "flops": 60, "memory": 1000}
    run = {"variant": variant, "seed": seed, "learning_rate": 1e-3}
    return {"run": run | changes, "result": result, "cost": cost}


def runs(variant: str, losses: list[float | None]) -> list[Record]:
    return [record(variant, seed, loss) for seed, loss in enumerate(losses)]


def test_the_interval_is_scipys_paired_t_interval() -> None:
    a, b = [1.90, 1.95, 1.88, 1.99], [2.00, 2.02, 2.01, 2.04]
    bounds = interval([x - y for x, y in zip(a, b, strict=True)])
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert bounds is not None
    assert bounds == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_one_seed_has_no_interval() -> None:
    assert interval([0.1]) is None
    rows = rank({"relu": runs("relu", [2.0]), "glu": runs("glu", [1.0])}, "relu", 1.0)
    assert [row.verdict for row in rows] == ["no interval", "baseline"]
    assert rows[0].detectable is None


def test_verdicts_follow_the_interval() -> None:
    rows = rank(
        {
            "relu": runs("relu", [2.0, 2.1, 2.2]),
            "swiglu": runs("swiglu", [1.90, 2.01, 2.10]),
            "glu": runs("glu", [2.1, 2.2, 2.1]),
            "tanh": runs("tanh", [2.2, 2.31, 2.4]),
        },
        "relu",
        1.0,
    )
    verdicts = {row.variant: row.verdict for row in rows}
    assert verdicts == {
        "relu": "baseline",
        "swiglu": "better",
        "glu": "no difference shown",
        "tanh": "worse",
    }
    assert [row.variant for row in rows] == ["swiglu", "relu", "glu", "tanh"]
    by_name = {row.variant: row for row in rows}
    row = by_name["swiglu"]
    assert row.low is not None
    assert row.high is not None
    assert row.detectable == pytest.approx((row.high - row.low) / 2)


def test_diverged_runs_are_counted_and_rank_last() -> None:
    rows = rank(
        {
            "relu": runs("relu", [2.0, 2.1]),
            "glu": runs("glu", [1.0, None]),
            "tanh": runs("tanh", [3.0, 3.1]),
        },
        "relu",
        1.0,
    )
    assert [row.variant for row in rows] == ["relu", "tanh", "glu"]
    assert (rows[2].verdict, rows[2].diverged, rows[2].seeds) == ("diverged", 1, 2)
    assert math.isinf(rows[2].loss)
    assert rows[2].difference is None


def test_bits_per_byte_counts_bytes() -> None:
    (row,) = rank({"relu": runs("relu", [math.log(2), math.log(2)])}, "relu", 4.0)
    assert row.bits_per_byte == pytest.approx(0.25)


def test_the_best_rate_is_by_the_selection_part() -> None:
    grid = [
        record("relu", 0, loss, learning_rate=rate) for loss, rate in ((2.0, 1e-3), (1.9, 3e-3))
    ]
    grid.append(record("relu", 0, None, learning_rate=1e-2))
    grid[0]["result"]["held_out"] = 0.0
    assert best(grid) is grid[1]


def test_a_diverged_baseline_shows_nothing() -> None:
    rows = rank({"relu": runs("relu", [None, 2.0]), "glu": runs("glu", [1.0, 1.1])}, "relu", 1.0)
    assert [row.verdict for row in rows] == ["no interval", "diverged"]


def test_a_seed_is_not_counted_twice() -> None:
    twice = [record("relu", 0, 2.0), record("relu", 0, 2.0)]
    with pytest.raises(AssertionError, match="has a seed twice"):
        rank({"relu": twice}, "relu", 1.0)
