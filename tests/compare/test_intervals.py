"""The intervals against SciPy, against published tables, and by simulation of whole studies."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from gatedffn.compare.intervals import analyse, pairs, reach, seeds_for, spreads
from gatedffn.errors import SettingError

GATED = tuple(f"gated {i}" for i in range(5))
OTHERS = tuple(f"not gated {i}" for i in range(3))
ARMS = (*GATED, *OTHERS)
BASELINE = OTHERS[0]
KINDS = {arm: "gated" if arm in GATED else "not gated" for arm in ARMS}
ALIKE = dict.fromkeys(ARMS, "all")
"""What a pooled variance takes for granted."""


def losses(table: NDArray[np.float64]) -> dict[str, list[float]]:
    return dict(zip(ARMS, table.tolist(), strict=False))


# --- one study against SciPy and published tables ------------------------------------------------


@pytest.mark.parametrize("kinds", [KINDS, ALIKE])
def test_two_arms_have_the_paired_t_interval(kinds: Mapping[str, str]) -> None:
    a, b = [1.90, 1.95, 1.88, 1.99], [2.00, 2.02, 2.01, 2.04]
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    pair = {GATED[0]: a, BASELINE: b}
    for contrast in (
        analyse(pair, BASELINE, kinds)[GATED[0]],
        pairs(pair, kinds)[GATED[0], BASELINE],
    ):
        bounds = (contrast.low, contrast.high, contrast.alone_low, contrast.alone_high)
        assert bounds == pytest.approx((*expected, *expected), rel=1e-6)


# Two-sided 5% points of Dunnett (1964) for 2 and 5 contrasts; 5% points of the studentised range.
@pytest.mark.parametrize(
    ("arms", "seeds", "dunnett"),
    [(3, 6, 2.57), (3, 11, 2.38), (6, 2, 3.62), (6, 4, 2.82), (6, 5, 2.73)],
)
def test_arms_of_one_kind_have_dunnetts_points(arms: int, seeds: int, dunnett: float) -> None:
    kinds = dict.fromkeys(ARMS[:arms], "all")
    (point,) = set(reach({("all", "all"): math.sqrt(seeds)}, seeds, kinds, ARMS[0]).values())
    assert point == pytest.approx(dunnett, abs=0.005 + 1e-4)


@pytest.mark.parametrize(("arms", "seeds", "tukey"), [(3, 6, 3.88), (4, 5, 4.20), (5, 6, 4.23)])
def test_all_pairs_have_tukeys_points(arms: int, seeds: int, tukey: float) -> None:
    study = losses(np.random.default_rng(0).normal(size=(arms, seeds)))
    error = spreads(study, ALIKE)["all", "all"] / math.sqrt(2 * seeds)
    for contrast in pairs(study, ALIKE).values():
        assert contrast.detectable / error == pytest.approx(tukey, abs=0.005 + 1e-4)


def test_dunnetts_point_is_scipys() -> None:
    # One-way with four arms of four runs, and blocked with five seeds: both have 12 degrees.
    samples = np.random.default_rng(0).normal(size=(4, 4))
    result = stats.dunnett(*samples[1:], control=samples[0], rng=np.random.default_rng(0))
    interval = result.confidence_interval(0.95)
    error = math.sqrt(samples.var(axis=1, ddof=1).mean() * 2 / 4)
    scipys = (interval.high - interval.low) / 2 / error
    kinds = dict.fromkeys(ARMS[:4], "all")
    ours = reach({("all", "all"): math.sqrt(5)}, 5, kinds, ARMS[0])
    # SciPy keeps its confidence within 0.0005, and so this point within 0.005.
    assert list(ours.values()) == pytest.approx(scipys.tolist(), abs=0.005)


@pytest.mark.parametrize(("gated", "other"), [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)])
def test_unequal_spreads_have_multivariate_ts_points(gated: float, other: float) -> None:
    seeds = 3
    mixed = gated**2 + other**2
    known = {
        ("gated", "gated"): gated * math.sqrt(2),
        ("gated", "not gated"): math.sqrt(mixed),
        ("not gated", "not gated"): other * math.sqrt(2),
    }
    halves = reach(known, seeds, KINDS, BASELINE)
    # The covariance of the differences: what the baseline varies by is in all of them.
    own = [gated**2] * 5 + [other**2] * 2
    covariance = np.diag(own) + other**2
    scale = np.sqrt(np.diag(covariance))
    # Mean squares: of the kinds' means, and within the kinds.
    parts = {2: gated**2 / 5 + other**2 / 3, 8: gated**2 * 4 / 5, 4: other**2 * 2 / 3}
    degrees = mixed**2 / sum(part**2 / count for count, part in parts.items())
    for arm, count in ((GATED[0], degrees), (OTHERS[1], 4)):
        point = halves[arm] * math.sqrt(seeds) / scale[list(halves).index(arm)]
        # SciPy takes broken degrees of freedom, its types do not.
        correlation = covariance / np.outer(scale, scale)
        distribution = stats.multivariate_t(shape=correlation, df=count, seed=0)  # type: ignore[arg-type]
        inside = distribution.cdf([point] * 7, lower_limit=[-point] * 7)
        # SciPy integrates by quasi-Monte Carlo; its error is below 0.0005 here.
        assert inside == pytest.approx(0.95, abs=5e-4)


def test_a_kind_of_one_arm_takes_no_spread_from_another() -> None:
    random = np.random.default_rng(0)
    study = dict(zip(GATED, random.normal(size=(5, 4)).tolist(), strict=True))
    study[BASELINE] = (100 * random.normal(size=4)).tolist()
    own = np.std(
        np.subtract(np.mean([study[arm] for arm in GATED], axis=0), study[BASELINE]), ddof=1
    )
    found = analyse(study, BASELINE, KINDS)[GATED[0]]
    # Nearly all of the variance is the baseline's: nearly one paired t interval.
    expected = stats.t.isf(0.025, 3) * own / 2
    assert found.alone_high - found.difference == pytest.approx(expected, rel=0.01)
    assert found.high > found.alone_high


def test_arms_without_any_variation_have_intervals_of_no_width() -> None:
    contrasts = analyse({arm: [2.0, 2.1, 2.3] for arm in ARMS}, BASELINE, KINDS)
    assert {(c.low, c.difference, c.high) for c in contrasts.values()} == {(0.0, 0.0, 0.0)}


# --- arms without an interval --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_diverged_arm_leaves_the_others_alone(bad: float) -> None:
    study = losses(np.random.default_rng(0).normal(size=(8, 3)))
    without = {arm: values for arm, values in study.items() if arm != GATED[1]}
    study[GATED[1]] = [0.0, bad, 0.0]
    assert analyse(study, BASELINE, KINDS) == analyse(without, BASELINE, KINDS)
    assert pairs(study, KINDS) == pairs(without, KINDS)
    assert analyse(study, GATED[1], KINDS) == {}


def test_one_seed_or_one_arm_has_no_interval() -> None:
    assert analyse({GATED[0]: [1.0], BASELINE: [2.0]}, BASELINE, KINDS) == {}
    assert pairs({GATED[0]: [1.0], BASELINE: [2.0]}, KINDS) == {}
    assert reach({("gated", "not gated"): 1.0}, 1, KINDS, BASELINE) == {}
    assert analyse({BASELINE: [2.0, 2.1]}, BASELINE, KINDS) == {}


# --- what a study will show ----------------------------------------------------------------------


def test_reach_is_what_intervals_of_that_spread_have() -> None:
    study = losses(np.random.default_rng(0).normal(size=(8, 4)))
    found = {arm: c.detectable for arm, c in analyse(study, BASELINE, KINDS).items()}
    assert reach(spreads(study, KINDS), 4, KINDS, BASELINE) == found


def test_seeds_for_a_reach_are_the_fewest() -> None:
    known = {
        ("gated", "gated"): 0.03,
        ("gated", "not gated"): 0.04,
        ("not gated", "not gated"): 0.05,
    }
    seeds = seeds_for(0.01, known, KINDS, BASELINE)
    assert max(reach(known, seeds, KINDS, BASELINE).values()) <= 0.01
    assert max(reach(known, seeds - 1, KINDS, BASELINE).values()) > 0.01
    with pytest.raises(SettingError, match="1e-05 to each side take more than 10,000 seeds"):
        seeds_for(1e-5, known, KINDS, BASELINE)


# --- whole studies, simulated --------------------------------------------------------------------

STUDIES = 300
LIMIT = stats.binom.isf(1e-3, STUDIES, 0.05)
"""How many of the studies may miss if 5% do; more are seen once in a thousand times."""


def missed(
    intervals: Callable[[Mapping[str, Sequence[float]]], Mapping[str, tuple[float, float]]],
    seeds: int,
    gated: float = 1.0,
    other: float = 1.0,
    moved: float = 0.0,
) -> int:
    """In how many studies some interval leaves out the truth.

    Args:
        intervals: of each arm's difference to the baseline, from the losses of a study.
        seeds: how many.
        gated: the standard deviation of gated arms.
        other: that of the others.
        moved: that of what a seed does to all gated arms and to no other.
    """
    random = np.random.default_rng(seeds)
    spread = np.array([gated] * 5 + [other] * 3)[:, None]
    truth = random.normal(size=8)
    differences = dict(zip(ARMS, truth - truth[ARMS.index(BASELINE)], strict=True))
    count = 0
    for _ in range(STUDIES):
        table = truth[:, None] + 5 * random.normal(size=seeds)
        table += spread * random.normal(size=(8, seeds))
        table[:5] += moved * random.normal(size=seeds)
        count += any(
            not low <= differences[arm] <= high
            for arm, (low, high) in intervals(losses(table)).items()
        )
    return count


def simultaneous(study: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {arm: (c.low, c.high) for arm, c in analyse(study, BASELINE, KINDS).items()}


def alone(study: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {arm: (c.alone_low, c.alone_high) for arm, c in analyse(study, BASELINE, KINDS).items()}


def pooled(study: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {arm: (c.low, c.high) for arm, c in analyse(study, BASELINE, ALIKE).items()}


@pytest.mark.parametrize(
    ("seeds", "gated", "other", "moved"),
    [(3, 1, 1, 0), (3, 3, 1, 0), (3, 1, 3, 0), (3, 1, 1, 1), (6, 1, 3, 0), (6, 1, 1, 1)],
)
def test_intervals_cover_all_differences_at_once(
    seeds: int, gated: float, other: float, moved: float
) -> None:
    assert missed(simultaneous, seeds, gated, other, moved) <= LIMIT


def test_single_intervals_are_caught() -> None:
    assert missed(alone, 3) > LIMIT


def test_a_pooled_variance_is_caught_where_spreads_differ() -> None:
    assert missed(pooled, 3, gated=1, other=3) > LIMIT


def test_a_variance_within_kinds_is_caught_where_seeds_move_a_kind() -> None:
    def within(study: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
        known = spreads(study, KINDS)
        mean = (known["gated", "gated"] ** 2 + known["not gated", "not gated"] ** 2) / 2
        known["gated", "not gated"] = math.sqrt(mean)
        means = {arm: sum(values) / len(values) for arm, values in study.items()}
        halves = reach(known, 3, KINDS, BASELINE)
        return {
            arm: (means[arm] - means[BASELINE] - h, means[arm] - means[BASELINE] + h)
            for arm, h in halves.items()
        }

    assert missed(within, 3, moved=2) > LIMIT


def test_intervals_of_all_pairs_cover_at_once() -> None:
    random = np.random.default_rng(0)
    studies = [losses(random.normal(size=(4, 3))) for _ in range(STUDIES)]
    shown = [any(c.low > 0 or c.high < 0 for c in pairs(y, ALIKE).values()) for y in studies]
    assert sum(shown) <= LIMIT
