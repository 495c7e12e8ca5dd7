"""Which runs there are, in which order, and when it is enough: decided without training."""

from dataclasses import replace

import pytest

from gatedffn.compare.schedule import (
    Extent,
    another,
    blocks,
    number_of_runs,
    read_shard,
    schedule,
)
from gatedffn.compare.settings import Run, Setting
from gatedffn.compare.store import Record
from gatedffn.errors import SettingError


def run(arm: str, seed: int, rate: float = 3e-3) -> Run:
    return Run(variant=arm, seed=seed, learning_rate=rate)


def done(*runs: Run, worse: float = 0.0) -> dict[Run, Record]:
    """Records in which a rate of 3e-3 is best, or worst."""
    return {
        r: {
            "run": {"variant": r.variant, "seed": r.seed, "learning_rate": r.learning_rate},
            "result": {"selection": abs(r.learning_rate - 3e-3) * (-1) ** worse, "diverged": False},
        }
        for r in runs
    }


def test_every_variant_of_a_seed_comes_before_the_next_seed(tiny: Setting) -> None:
    missing = schedule(tiny, {}, [0, 1, 2])
    assert missing == [run(arm, seed) for seed in range(3) for arm in ("relu", "swiglu")]
    records = done(run("relu", 0), run("swiglu", 1))
    rest = [run("swiglu", 0), run("relu", 1), run("relu", 2), run("swiglu", 2)]
    assert schedule(tiny, records, [0, 1, 2]) == rest
    assert schedule(tiny, records | done(*rest), [0, 1, 2]) == []


def test_a_variant_goes_on_when_its_own_grid_is_done(tiny: Setting) -> None:
    tuned = replace(tiny, learning_rates=(1e-3, 3e-3))
    grid = [run(arm, 0, rate) for rate in (1e-3, 3e-3) for arm in ("relu", "swiglu")]
    assert schedule(tuned, {}, [0, 1]) == grid
    relu = done(run("relu", 0, 1e-3), run("relu", 0, 3e-3))
    assert schedule(tuned, relu, [0, 1]) == [
        run("swiglu", 0, 1e-3),
        run("swiglu", 0, 3e-3),
        run("relu", 1, 3e-3),
    ]
    other = done(run("relu", 0, 1e-3), run("relu", 0, 3e-3), worse=1.0)
    assert schedule(tuned, other, [0, 1])[-1] == run("relu", 1, 1e-3)


def test_shards_have_every_seed_once_and_all_search_the_rate(tiny: Setting) -> None:
    shards = [Extent(shard=(part, 3)).seeds(8) for part in (1, 2, 3)]
    assert shards == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert {r.seed for r in schedule(tiny, {}, shards[1])} == {1, 4, 7}
    tuned = replace(tiny, learning_rates=(1e-3, 3e-3))
    assert {r.seed for r in schedule(tuned, {}, shards[1])} == {0}
    assert Extent(shard=(2, 3), minutes=5).seeds(3) == [1, 4, 7]


def test_another_first_seed_is_another_study(tiny: Setting) -> None:
    later = replace(tiny, first_seed=100, learning_rates=(1e-3, 3e-3))
    assert Extent(first_seed=100).seeds(3) == [100, 101, 102]
    assert Extent(first_seed=100, shard=(2, 2), minutes=1).seeds(2) == [101, 103]
    assert {r.seed for r in schedule(later, {}, [100, 101])} == {100}


@pytest.mark.parametrize("rates", [(3e-3,), (1e-3, 3e-3)])
@pytest.mark.parametrize("seeds", [[0, 1, 2], [1, 3]])
def test_the_number_of_runs(tiny: Setting, rates: tuple[float, ...], seeds: list[int]) -> None:
    setting = replace(tiny, learning_rates=rates)
    records: dict[Run, Record] = {}
    while missing := schedule(setting, records, seeds):
        records |= done(*missing)
    assert len(records) == number_of_runs(setting, seeds)
    table = blocks(setting, records, seeds)
    assert {arm: [r["run"]["seed"] for r in runs] for arm, runs in table.items()} == {
        "relu": seeds,
        "swiglu": seeds,
    }


def test_only_whole_blocks_count(tiny: Setting) -> None:
    records = done(*(run(arm, seed) for arm in ("relu", "swiglu") for seed in (0, 2)))
    records |= done(run("relu", 1))
    table = blocks(tiny, records, [0, 1, 2])
    assert [r["run"]["seed"] for r in table["relu"]] == [0, 2]
    tuned = replace(tiny, learning_rates=(1e-3, 3e-3))
    assert blocks(tuned, records, [0, 1, 2]) == {"relu": [], "swiglu": []}


def test_a_block_is_begun_only_if_it_ends_in_time() -> None:
    extent = Extent(minutes=10)
    assert another(extent, 1, elapsed=900, expected=900, half_width=None), "two in any case"
    assert another(extent, 2, elapsed=400, expected=199, half_width=0.5)
    assert not another(extent, 2, elapsed=400, expected=201, half_width=0.5)
    # A week on a cluster may well hold more than the 50 after which --until gives up.
    assert another(extent, 1000, elapsed=400, expected=199, half_width=0.001)
    assert not another(replace(extent, most=1000), 1000, elapsed=400, expected=1, half_width=0.1)


def test_blocks_are_added_until_the_widest_interval_is_narrow() -> None:
    extent = Extent(until=0.01, most=20)
    assert another(extent, 2, 0, 0, half_width=0.001), "three in any case"
    assert another(extent, 3, 0, 0, half_width=0.011)
    assert not another(extent, 3, 0, 0, half_width=0.01)
    assert another(extent, 3, 0, 0, half_width=None), "no interval yet"
    assert not another(extent, 20, 0, 0, half_width=0.5), "the maximum"
    assert not another(Extent(until=0.01), 50, 0, 0, half_width=0.5), "the maximum unless told"
    both = replace(extent, minutes=1)
    assert not another(both, 3, elapsed=50, expected=11, half_width=0.5)


def test_studies_one_after_the_other_share_the_minutes() -> None:
    extent = Extent(minutes=30, shard=(2, 3))
    shares = [extent.of_several(number, 3) for number in (1, 2, 3)]
    assert shares == [replace(extent, minutes=end) for end in (10, 20, 30)]
    assert Extent(until=0.1).of_several(1, 3) == Extent(until=0.1)


def test_what_a_shard_is() -> None:
    assert read_shard("2/8") == (2, 8)
    for text in ("2", "2/", "a/b", "2/8/9", "-1/2"):
        with pytest.raises(SettingError, match="it must be PART/PARTS"):
            read_shard(text)
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(SettingError, match="it must be 1/N to N/N"):
            Extent(shard=shard)


def test_an_extent_that_cannot_be() -> None:
    with pytest.raises(SettingError, match="minutes is 0: it must be above 0"):
        Extent(minutes=0)
    with pytest.raises(SettingError, match="until is inf: it must be above 0"):
        Extent(until=float("inf"))
    with pytest.raises(SettingError, match=r"seeds is 2: .* at least 3"):
        Extent(until=0.1, most=2)
