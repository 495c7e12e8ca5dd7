"""Differences between arms that ran with the same seeds, and their simultaneous intervals.

The losses are a randomised complete block design: every arm runs with every seed, the seeds are
the blocks. How much a difference between arms of two kinds (gated, not gated) varies is estimated
from all pairs of arms of these kinds. No two kinds are assumed to vary alike, nor to be moved
alike by a seed.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from scipy import optimize, special, stats

from gatedffn.errors import SettingError

CONFIDENCE = 0.95
MOST_SEEDS = 10_000

Losses = Mapping[str, Sequence[float]]
"""For each arm its losses in nats a token, in the same order of seeds."""
Kinds = Mapping[str, str]
"""For each arm which arms it is taken to vary like."""
Spreads = Mapping[tuple[str, str], float]
"""For each two kinds the standard deviation over seeds of a difference between arms of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """The mean difference of two arms with its simultaneous interval and its single one."""

    difference: float
    low: float
    high: float
    alone_low: float
    alone_high: float

    @property
    def detectable(self) -> float:
        """The smallest difference that the simultaneous interval could have shown."""
        return (self.high - self.low) / 2


def analyse(losses: Losses, baseline: str, kinds: Kinds) -> dict[str, Contrast]:
    """Every arm less the baseline, with Dunnett's simultaneous 95% intervals.

    An arm with a loss that is no number has none and leaves those of the others alone. There are
    none at all if the baseline is such an arm, or with a single seed.

    >>> losses = {"relu": [2.00, 2.02, 2.01], "glu": [1.98, 1.99, 1.97]}
    >>> contrast = analyse(losses, "relu", {"relu": "not gated", "glu": "gated"})["glu"]
    >>> round(contrast.difference, 4), round(contrast.low, 4), round(contrast.high, 4)
    (-0.03, -0.0548, -0.0052)
    """
    losses = _whole(losses)
    if baseline not in losses:
        return {}
    kinds = {arm: kinds[arm] for arm in losses}
    errors = _errors(spreads(losses, kinds), len(losses[baseline]), kinds)
    return {
        arm: _contrast(losses[arm], losses[baseline], half, errors[_two(kinds, arm, baseline)])
        for arm, half in _halves(errors, kinds, baseline).items()
    }


def pairs(losses: Losses, kinds: Kinds) -> dict[tuple[str, str], Contrast]:
    """The first less the second for all pairs of arms, with intervals simultaneous for them all.

    They are Tukey's, with each pair's own spread and degrees of freedom (Games and Howell's).
    """
    losses = _whole(losses)
    if not losses:
        return {}
    kinds = {arm: kinds[arm] for arm in losses}
    seeds = len(next(iter(losses.values())))
    errors = _errors(spreads(losses, kinds), seeds, kinds)
    found = {}
    for a, b in combinations(losses, 2):
        error = errors[_two(kinds, a, b)]
        half = _tukey(len(losses), error.degrees) * error.standard
        found[a, b] = _contrast(losses[a], losses[b], half, error)
    return found


def spreads(losses: Losses, kinds: Kinds) -> dict[tuple[str, str], float]:
    """How much differences vary over seeds: the root of the mean variance over pairs of arms.

    This holds what arms of either kind vary by, and what seeds move one kind against the other.
    """
    table = np.array(list(losses.values()))
    variances = (table[:, None] - table).var(axis=2, ddof=1)
    found: dict[tuple[str, str], list[float]] = {}
    for (i, a), (j, b) in combinations(enumerate(losses), 2):
        found.setdefault(_two(kinds, a, b), []).append(variances[i, j])
    return {two: math.sqrt(sum(values) / len(values)) for two, values in found.items()}


def reach(spreads: Spreads, seeds: int, kinds: Kinds, baseline: str) -> dict[str, float]:
    """About half the simultaneous interval that each arm will have; none with a single seed."""
    if seeds < 2:
        return {}
    return _halves(_errors(spreads, seeds, kinds), kinds, baseline)


def seeds_for(wanted: float, spreads: Spreads, kinds: Kinds, baseline: str) -> int:
    """How many seeds bring every `reach` to the wanted one.

    Raises:
        SettingError: more than 10,000 seeds.
    """

    def enough(seeds: int) -> bool:
        return all(half <= wanted for half in reach(spreads, seeds, kinds, baseline).values())

    seeds = bisect_left(range(MOST_SEEDS + 1), True, lo=2, key=enough)
    if seeds > MOST_SEEDS:
        raise SettingError(
            f"intervals of {wanted:g} to each side take more than {MOST_SEEDS:,} seeds: "
            "ask for wider ones"
        )
    return seeds


@dataclass(frozen=True, slots=True)
class _Error:
    """How well the mean difference of two arms is known: the degrees are those of freedom."""

    variance: float
    standard: float
    degrees: float


def _errors(spreads: Spreads, seeds: int, kinds: Kinds) -> dict[tuple[str, str], _Error]:
    """The error of a difference between arms of each two kinds."""
    arms = Counter(kinds.values())
    found = {}
    for two in {_two(kinds, a, b) for a, b in combinations(kinds, 2)}:
        variance = spreads[two] ** 2
        if two[0] == two[1]:
            degrees: float = (arms[two[0]] - 1) * (seeds - 1)
        else:
            # Independent parts, those within the kinds and that of the kinds' means: by
            # Satterthwaite their sum has these degrees. Alone two arms keep those of paired t.
            within = {k: (1 - 1 / arms[k]) * spreads[k, k] ** 2 / 2 for k in two if arms[k] > 1}
            means = variance - sum(within.values())
            rough = means**2 + sum(part**2 / (arms[k] - 1) for k, part in within.items())
            degrees = (seeds - 1) * (variance**2 / rough if rough else 1)
        found[two] = _Error(variance, math.sqrt(variance / seeds), degrees)
    return found


def _halves(
    errors: Mapping[tuple[str, str], _Error], kinds: Kinds, baseline: str
) -> dict[str, float]:
    """Half of each arm's simultaneous interval, with the degrees of its own difference."""
    twos = {arm: _two(kinds, arm, baseline) for arm in kinds if arm != baseline}
    shares = [_share(errors, two, kinds[baseline]) for two in twos.values()]
    half = {
        two: _dunnett(errors[two].degrees, shares) * errors[two].standard
        for two in set(twos.values())
    }
    return {arm: half[two] for arm, two in twos.items()}


def _share(errors: Mapping[tuple[str, str], _Error], two: tuple[str, str], base: str) -> float:
    """The baseline's part of the variance of a difference, by which all are correlated.

    What the baseline has, or what the other arm leaves: the lower one, which gives wider intervals.
    """
    variance = errors[two].variance
    own = {k: errors[k, k].variance / 2 for k in two if (k, k) in errors}
    parts = [part if k == base else variance - part for k, part in own.items()]
    return max(min(parts, default=0.0), 0.0) / variance if variance else 0.0


# Half of a normal variable, in steps that resolve shares of up to 98%.
_NORMAL = np.linspace(0.0, 5.0, 25)
_NORMAL_WEIGHTS = np.exp(-(_NORMAL**2) / 2) * np.where(_NORMAL > 0, 1.0, 0.5)
_NORMAL_WEIGHTS /= _NORMAL_WEIGHTS.sum()


def _dunnett(degrees: float, shares: Sequence[float]) -> float:
    """What the largest of some t values exceeds in size in 5% of studies.

    They have one estimated scale, and a normal variable in common that makes these shares of their
    variances; given both they are independent, and the trapezoidal rule runs over both. SciPy's
    `multivariate_t` has this distribution, but is noisy and far too slow to simulate studies with.
    """
    tail = (1 - CONFIDENCE) / 2
    one, all_apart = -special.stdtrit(degrees, [tail, tail / len(shares)])
    if len(shares) == 1:
        return float(one)
    half = degrees / 2
    ends = np.array([special.gammaincinv(half, 1e-5), special.gammainccinv(half, 1e-10)])
    first, last = np.log(ends / half) / 2
    log_scale = np.linspace(first, last, 21)
    scale = np.exp(log_scale)
    weights = np.exp(degrees * (log_scale - (scale**2 - 1) / 2))
    weights /= weights.sum()
    counts = Counter(min(share, 0.98) for share in shares)

    def excess(limit: float) -> float:
        inside = np.ones((scale.size, _NORMAL.size))
        bound = limit * scale[:, None]
        for share, times in counts.items():
            common, rest = math.sqrt(share) * _NORMAL, math.sqrt(1 - share)
            upper, lower = (bound - common) / rest, (-bound - common) / rest
            inside *= (special.ndtr(upper) - special.ndtr(lower)) ** times
        return math.log((1 - weights @ inside @ _NORMAL_WEIGHTS) / (1 - CONFIDENCE))

    return float(optimize.brentq(excess, one, all_apart, xtol=1e-4))


@cache
def _tukey(arms: int, degrees: float) -> float:
    return float(stats.studentized_range.ppf(CONFIDENCE, arms, degrees)) / math.sqrt(2)


def _two(kinds: Kinds, a: str, b: str) -> tuple[str, str]:
    first, second = sorted((kinds[a], kinds[b]))
    return first, second


def _whole(losses: Losses) -> Losses:
    """The arms of which no run diverged; none with a single seed."""
    return {
        arm: values
        for arm, values in losses.items()
        if len(values) > 1 and np.isfinite(values).all()
    }


def _contrast(a: Sequence[float], b: Sequence[float], half: float, error: _Error) -> Contrast:
    difference = float(np.mean(np.subtract(a, b)))
    alone = error.standard * float(special.stdtrit(error.degrees, (1 + CONFIDENCE) / 2))
    return Contrast(
        difference=difference,
        low=difference - half,
        high=difference + half,
        alone_low=difference - alone,
        alone_high=difference + alone,
    )
