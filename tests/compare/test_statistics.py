import math
from typing import Any

import pytest

from gatedffn.compare.settings import make_setting
from gatedffn.compare.statistics import (
    best_rate,
    expected_reach,
    expected_seeds,
    rank,
    selection_loss,
)
from gatedffn.compare.store import Record
from gatedffn.variants import PAPER


def record(variant: str, seed: int, loss: float | None, **changes: Any) -> Record:
    result = {"held_out": loss, "selection": loss, "diverged": loss is None, "step_time": 0.1}
    cost = {"width": 8, "parameters": 10, "compared": 5, "flops": 60, "memory": 1000}
    run = {"variant": variant, "seed": seed, "learning_rate": 1e-3}
    return {"run": run | changes, "result": result, "cost": cost}


def runs(variant: str, losses: list[float | None]) -> list[Record]:
    return [record(variant, seed, loss) for seed, loss in enumerate(losses)]


def test_one_seed_has_no_interval() -> None:
    rows = rank({"relu": runs("relu", [2.0]), "glu": runs("glu", [1.5])}, "relu", 1.0)
    assert [row.verdict for row in rows] == ["no interval", "baseline"]
    assert rows[0].difference == -0.5
    assert rows[0].detectable is None


def test_verdicts_follow_the_interval() -> None:
    rows = rank(
        {
            "relu": runs("relu", [2.0, 2.1, 2.2]),
            "swiglu": runs("swiglu", [1.80, 1.91, 2.00]),
            "glu": runs("glu", [2.00, 2.09, 2.21]),
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
    assert row.alone_low is not None
    assert row.alone_high is not None
    assert row.low < row.alone_low < row.alone_high < row.high
    assert row.detectable == pytest.approx((row.high - row.low) / 2)


def test_a_single_interval_that_leaves_out_zero_is_no_verdict() -> None:
    losses = {
        "relu": [2.00, 2.00, 2.00],
        "gelu": [2.01, 1.98, 2.00],
        "swiglu": [1.955, 1.970, 1.965],
        "geglu": [1.990, 2.000, 2.010],
    }
    rows = rank({arm: runs(arm, list(values)) for arm, values in losses.items()}, "relu", 1.0)
    row = {row.variant: row for row in rows}["swiglu"]
    assert row.alone_high is not None
    assert row.high is not None
    assert row.alone_high < 0 < row.high
    assert row.verdict == "no difference shown"


def test_diverged_runs_are_counted_and_rank_last() -> None:
    whole = {"relu": runs("relu", [2.0, 2.1]), "tanh": runs("tanh", [3.0, 3.12])}
    rows = rank({**whole, "glu": runs("glu", [1.0, None])}, "relu", 1.0)
    assert rows[:2] == rank(whole, "relu", 1.0)
    assert [row.variant for row in rows] == ["relu", "tanh", "glu"]
    assert (rows[2].verdict, rows[2].diverged, rows[2].seeds) == ("diverged", 1, 2)
    assert math.isinf(rows[2].loss)
    assert rows[2].difference is None


def test_what_a_preset_will_show_is_known_before() -> None:
    of_quick = expected_reach(make_setting("quick", "decoder"))
    more = expected_reach(make_setting("quick", "decoder", seeds=16))
    assert of_quick.keys() == set(PAPER) - {"relu"}
    # Sixteen seeds halve the error of four, and their t is smaller too.
    assert all(2 * more[arm] < half for arm, half in of_quick.items())
    assert expected_reach(make_setting("quick", "decoder", steps=60)) == {}
    assert expected_seeds(make_setting("quick", "decoder"), max(of_quick.values())) == 4
    assert expected_seeds(make_setting("quick", "decoder", steps=60), 0.01) is None
    assert expected_reach(make_setting("quick", "decoder", learning_rates=(0.1,))) == {}
    assert expected_reach(make_setting("quick", "decoder", seeds=1)) == {}


def test_bits_per_byte_counts_bytes() -> None:
    (row,) = rank({"relu": runs("relu", [math.log(2), math.log(2)])}, "relu", 4.0)
    assert row.bits_per_byte == pytest.approx(0.25)


def test_the_best_rate_is_by_the_selection_part() -> None:
    grid = [
        record("relu", 0, loss, learning_rate=rate) for loss, rate in ((2.0, 1e-3), (1.9, 3e-3))
    ]
    grid.append(record("relu", 0, None, learning_rate=1e-2))
    grid[0]["result"]["held_out"] = 0.0
    curve = {run["run"]["learning_rate"]: selection_loss(run) for run in grid}
    assert curve == {1e-3: 2.0, 3e-3: 1.9, 1e-2: math.inf}
    assert best_rate(curve) == 3e-3
    assert best_rate({2e-3: math.inf, 1e-3: math.inf}) == 1e-3, "whatever the order"


def test_a_diverged_baseline_shows_nothing() -> None:
    rows = rank({"relu": runs("relu", [None, 2.0]), "glu": runs("glu", [1.0, 1.1])}, "relu", 1.0)
    assert [row.verdict for row in rows] == ["no interval", "diverged"]


def test_a_run_that_diverged_with_a_number_has_no_interval() -> None:
    bad = runs("glu", [1.0, 9.0, 1.1])
    bad[1]["result"]["diverged"] = True
    rows = rank({"relu": runs("relu", [2.0, 2.1, 2.0]), "glu": bad}, "relu", 1.0)
    assert (rows[1].verdict, rows[1].difference, rows[1].low) == ("diverged", None, None)


def test_a_seed_is_not_counted_twice() -> None:
    twice = [record("relu", 0, 2.0), record("relu", 0, 2.0)]
    with pytest.raises(AssertionError, match="has a seed twice"):
        rank({"relu": twice}, "relu", 1.0)


def test_arms_of_other_seeds_are_not_compared() -> None:
    other = [record("glu", seed, 2.0) for seed in (0, 2)]
    with pytest.raises(
        AssertionError, match=r"glu ran with the seeds \[0, 2\], relu with \[0, 1\]"
    ):
        rank({"relu": runs("relu", [2.0, 2.0]), "glu": other}, "relu", 1.0)
