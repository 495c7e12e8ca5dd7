"""The comparison at equal parameters, at equal compute and at equal time.

All runs have the same number of steps, so at equal compute or time a costlier arm is read earlier
on its learning curve, where its learning rate has not yet decayed. A run that is planned for fewer
steps ends below that point of the curve and above the end of the whole run. Between these two lies
what is sought, so a difference is known from one number to another, and its interval reaches from
the interval of one to that of the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gatedffn.compare.intervals import Contrast, analyse
from gatedffn.compare.statistics import Verdict, kind
from gatedffn.compare.store import Record
from gatedffn.compare.study import Result

ViewName = Literal["parameters", "compute", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An arm's line in a view. Losses and differences are in nats a token.

    `step` is where its curve is read. `losses` and `differences` are what is known: from, to.
    `low` and `high` bound the difference with 95% confidence, for all arms of the view together.
    """

    variant: str
    step: float
    losses: tuple[float, float]
    differences: tuple[float, float] | None
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The arms at one equal cost, lowest loss first, and why others are not among them."""

    name: ViewName
    places: list[Place]
    silent: dict[str, str]


def views(result: Result) -> list[View]:
    """The three views."""
    return [
        _at_equal_parameters(result),
        _at_equal("compute", result, {row.variant: float(row.flops) for row in result.rows}, ""),
        _at_equal("time", result, *_times(result)),
    ]


def _at_equal_parameters(result: Result) -> View:
    places = [
        Place(
            variant=row.variant,
            step=result.setting.steps,
            losses=(row.loss, row.loss),
            differences=None if row.difference is None else (row.difference, row.difference),
            low=row.low,
            high=row.high,
            verdict=row.verdict,
        )
        for row in result.rows
        if not row.diverged
    ]
    silent = {row.variant: "a run diverged" for row in result.rows if row.diverged}
    return View(name="parameters", places=places, silent=silent)


def _times(result: Result) -> tuple[dict[str, float], str]:
    """The step time of each arm that has one; or none, and why."""
    machines = [run["machine"] for runs in result.runs.values() for run in runs]
    if any(machine != machines[0] for machine in machines):
        return {}, "the runs are from different machines or versions, whose times do not compare"
    found = {row.variant: row.step_time for row in result.rows}
    return {arm: time for arm, time in found.items() if time}, "its steps were not timed"


def _at_equal(name: ViewName, result: Result, costs: Mapping[str, float], lacking: str) -> View:
    """The arms where each has cost as much as the whole run of the cheapest.

    Args:
        name: what is equal.
        result: the comparison.
        costs: of a step, for each arm that has one.
        lacking: why an arm has none.
    """
    steps, baseline = result.setting.steps, result.setting.baseline
    silent = {row.variant: lacking for row in result.rows if row.variant not in costs}
    silent |= {row.variant: "a run diverged" for row in result.rows if row.diverged}
    known = {arm: cost for arm, cost in costs.items() if arm not in silent}
    least = min(known.values(), default=0.0)
    at = {arm: steps * least / cost for arm, cost in known.items()}
    ends: dict[str, list[float]] = {}
    cuts: dict[str, list[float]] = {}
    for arm, step in at.items():
        rises = [_rise(run, step, steps) for run in result.runs[arm]]
        whole = [rise for rise in rises if rise is not None]
        if len(whole) < len(rises):
            silent[arm] = f"its learning curve begins after step {step:.0f}, where it would be read"
            continue
        ends[arm] = [run["result"]["held_out"] for run in result.runs[arm]]
        cuts[arm] = [end + rise for end, rise in zip(ends[arm], whole, strict=True)]
    contrasts = _between(ends, cuts, baseline) if baseline in ends else {}
    places = []
    for arm in ends:
        differences = None
        if arm != baseline and baseline in ends:
            differences = _from_to(
                np.mean(ends[arm]) - np.mean(cuts[baseline]),
                np.mean(cuts[arm]) - np.mean(ends[baseline]),
            )
        losses = _from_to(np.mean(ends[arm]), np.mean(cuts[arm]))
        bounds, verdict = _shown(contrasts.get(arm), arm == baseline)
        places.append(
            Place(
                variant=arm,
                step=at[arm],
                losses=losses,
                differences=differences,
                low=bounds[0],
                high=bounds[1],
                verdict=verdict,
            )
        )
    places.sort(key=lambda place: place.losses[1])
    order = [row.variant for row in result.rows]
    return View(
        name=name, places=places, silent={arm: silent[arm] for arm in order if arm in silent}
    )


def _rise(run: Record, step: float, steps: int) -> float | None:
    """By how much the curve is above its end at a step; None where it has not begun.

    Curves are of the selection part; the rise is added to the loss on the held-out part.
    """
    curve = {at: loss for at, loss in run["result"]["curve"] if loss is not None}
    curve.setdefault(steps, run["result"]["selection"])
    at = sorted(curve)
    if step < at[0]:
        return None
    return float(np.interp(step, at, [curve[i] for i in at])) - float(curve[steps])


def _between(
    ends: Mapping[str, list[float]], cuts: Mapping[str, list[float]], baseline: str
) -> dict[str, tuple[Contrast, Contrast]]:
    """The contrasts in favour of each arm, and those in favour of the baseline."""
    kinds = {arm: kind(arm) for arm in ends}
    in_favour = analyse({**ends, baseline: cuts[baseline]}, baseline, kinds)
    against = analyse({**cuts, baseline: ends[baseline]}, baseline, kinds)
    return {arm: (in_favour[arm], against[arm]) for arm in in_favour}


def _from_to(a: np.floating[Any], b: np.floating[Any]) -> tuple[float, float]:
    return float(min(a, b)), float(max(a, b))


def _shown(
    contrasts: tuple[Contrast, Contrast] | None, is_baseline: bool
) -> tuple[tuple[float, float] | tuple[None, None], Verdict]:
    """The interval that holds both, and what it shows."""
    if contrasts is None:
        return (None, None), "baseline" if is_baseline else "no interval"
    low, high = min(c.low for c in contrasts), max(c.high for c in contrasts)
    if low <= 0 <= high:
        return (low, high), "no difference shown"
    return (low, high), "better" if high < 0 else "worse"


def seed_differences(result: Result, arm: str) -> list[float]:
    """The paired differences of an arm to the baseline, one for each seed."""
    reference = result.runs[result.setting.baseline]
    return [
        a["result"]["held_out"] - b["result"]["held_out"]
        for a, b in zip(result.runs[arm], reference, strict=True)
    ]
