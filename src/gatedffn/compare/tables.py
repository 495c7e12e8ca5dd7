"""The tables of a comparison as text: for the terminal, `report.md` and the page."""

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from scipy import stats

from gatedffn.compare.intervals import pairs
from gatedffn.compare.look import NONE, interval, label, with_interval
from gatedffn.compare.published import PUBLISHED
from gatedffn.compare.settings import Setting
from gatedffn.compare.statistics import Row, kind, losses_of
from gatedffn.compare.study import Result
from gatedffn.compare.views import Place


def headers(setting: Setting) -> tuple[str, ...]:
    """The columns of the table."""
    return (
        "variant",
        *(["rate"] if setting.tuned else []),
        "log-perplexity",
        "bits per byte",
        f"difference to {label(setting.baseline)}",
        "shown at 95%",
        "smallest shown",
        "parameters",
        *(["active"] if setting.has_experts else []),
        "MFLOP/token",
        "ms/step",
        "tokens/s",
        "MB a step",
    )


def cells(row: Row, setting: Setting) -> tuple[str, ...]:
    """A row of the table as text."""
    speed = setting.tokens_per_step / row.step_time if row.step_time else None
    return (
        label(row.variant),
        *([f"{row.learning_rate:g}"] if setting.tuned else []),
        _with_spread(row),
        _number(row.bits_per_byte, ".3f"),
        with_interval(row.difference, row.low, row.high),
        f"diverged in {row.diverged} of {row.seeds}" if row.diverged else row.verdict,
        _number(row.detectable, ".3f"),
        f"{row.parameters:,} ({row.mismatch:+.2%})",
        *([f"{row.active:,}"] if setting.has_experts else []),
        f"{row.flops / 1e6:.2f}",
        _number(row.step_time, ".0f", 1e3),
        _number(speed, ",.0f"),
        f"{row.memory / 1e6:.3g}",
    )


def brief(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the rows of the table that a terminal shows: the losses and what they show.

    Sizes, costs and times are in the report.
    """
    setting = result.setting
    head = headers(setting)
    at = [head.index(n) for n in ("variant", "log-perplexity", "shown at 95%")]
    at.insert(2, at[-1] - 1)  # the difference, whose name has the baseline's
    lines = [cells(row, setting) for row in result.rows]
    return tuple(head[i] for i in at), [tuple(line[i] for i in at) for line in lines]


def _with_spread(row: Row) -> str:
    return f"{row.loss:.3f}" + ("" if row.spread is None else f" ± {row.spread:.3f}")


def view_headers(baseline: str) -> tuple[str, ...]:
    """The columns of a view at equal compute or time."""
    return (
        "variant",
        "read at step",
        "log-perplexity",
        f"difference to {label(baseline)}",
        "shown at 95%",
    )


def view_cells(place: Place) -> tuple[str, ...]:
    """A row of such a view as text."""
    differences = NONE
    if place.differences is not None:
        differences = _from_to(place.differences, "+.3f") + interval(place.low, place.high)
    return (
        label(place.variant),
        f"{place.step:.0f}",
        _from_to(place.losses, ".3f"),
        differences,
        place.verdict,
    )


def _from_to(ends: tuple[float, float], spec: str) -> str:
    return " to ".join(dict.fromkeys(f"{end:{spec}}" for end in ends))


FEWEST_RANKS = 4  # fewer variants have hardly an order
PUBLISHED_HEADERS = (
    "variant",
    "here",
    "Shazeer, 65,536 steps",
    "Shazeer, 524,288 steps",
    "Narang, 65,536 steps",
    "Narang, 524,288 steps",
)


def published_cells(result: Result) -> list[tuple[str, ...]]:
    """The published losses of the variants that have some, beside ours, and below them Spearman's
    rank correlation of each column with ours.
    """
    if result.setting.model == "gated-conv":
        return []
    found = [(row, PUBLISHED[row.variant]) for row in result.rows if row.variant in PUBLISHED]
    body = [
        (label(row.variant), f"{row.loss:.3f}", *(_number(loss, ".3f") for loss in astuple(paper)))
        for row, paper in found
    ]
    ours = [row.loss for row, _ in found]
    if len(found) >= FEWEST_RANKS and all(map(math.isfinite, ours)):
        columns = zip(*(astuple(paper) for _, paper in found), strict=True)
        body.append(("rank correlation", NONE, *(_rank_correlation(ours, c) for c in columns)))
    return body


def _rank_correlation(ours: Sequence[float], theirs: Sequence[float | None]) -> str:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    return f"{stats.spearmanr(pairs).statistic:.2f}" if len(pairs) >= FEWEST_RANKS else NONE


PAIRS = (
    "The 95% intervals hold for all pairs at once (Tukey's, with each pair's own spread, as Games "
    "and Howell's), so they are wider than those against the baseline alone."
)
PAIR_HEADERS = ("first", "second", "first less second", "shown at 95%")


def pair_cells(result: Result) -> list[tuple[str, ...]]:
    """Every two variants, best first, with intervals that hold for all of them at once."""
    order = [row.variant for row in result.rows]
    losses = losses_of({arm: result.runs[arm] for arm in order})
    cells: list[tuple[str, ...]] = []
    for (a, b), found in pairs(losses, {arm: kind(arm) for arm in order}).items():
        apart = "not told apart" if found.low <= 0 <= found.high else f"{label(a)} is better"
        words = apart if found.low <= 0 else f"{label(b)} is better"
        shown = with_interval(found.difference, found.low, found.high)
        cells.append((label(a), label(b), shown, words))
    return cells


RUN_HEADERS = (
    "variant",
    "seed",
    "learning rate",
    "held-out loss",
    "selection loss",
    "ms/step",
    "machine",
    "finished",
    "key",
)


def run_cells(result: Result) -> list[tuple[str, ...]]:
    """Every run: what it was and what it gave; machines by their number in `machines`."""
    known = machines(result)
    return [
        (
            label(row.variant),
            str(run["run"]["seed"]),
            f"{run['run']['learning_rate']:g}",
            "diverged" if run["result"]["diverged"] else f"{run['result']['held_out']:.4f}",
            _number(run["result"]["selection"], ".4f"),
            _number(run["result"]["step_time"], ".1f", 1e3),
            str(known.index(run["machine"]) + 1),
            run["finished"],
            run["key"],
        )
        for row in result.rows
        for run in result.runs[row.variant]
    ]


def _number(value: float | None, spec: str, scale: float = 1.0) -> str:
    return NONE if value is None else f"{scale * value:{spec}}"


def machines(result: Result) -> list[dict[str, Any]]:
    """The different machines, or versions, that the runs were made on."""
    found: list[dict[str, Any]] = []
    for run in (run for runs in result.runs.values() for run in runs):
        if run["machine"] not in found:
            found.append(run["machine"])
    return found


def warnings(result: Result) -> list[str]:
    """What the runs warned of, each with its run."""
    return [
        f"{label(arm)}, seed {run['run']['seed']}: {warning}"
        for arm, runs in result.runs.items()
        for run in runs
        for warning in run.get("warnings", [])
    ]
