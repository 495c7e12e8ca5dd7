"""What a comparison may conclude: means, paired differences and their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from gatedffn.compare.store import Record

CONFIDENCE = 0.95

Verdict = Literal["baseline", "better", "worse", "no difference shown", "no interval", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant's line in the table. Losses and differences are in nats a token.

    `spread` is the standard deviation over seeds. `low` and `high` bound the paired difference to
    the baseline with 95% confidence, and `detectable` is the smallest difference that this spread
    and number of seeds could have shown; all None with a single seed or a diverged run.
    """

    variant: str
    learning_rate: float
    seeds: int
    diverged: int
    loss: float
    spread: float | None
    bits_per_byte: float | None
    difference: float | None
    low: float | None
    high: float | None
    detectable: float | None
    verdict: Verdict
    width: int
    parameters: int
    mismatch: float
    flops: int
    step_time: float | None
    memory: int


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean of paired differences, by Student's t; None for fewer than two.

    >>> low, high = interval([-0.02, -0.03, -0.04])
    >>> round(low, 4), round(high, 4)
    (-0.0548, -0.0052)
    """
    if len(differences) < 2:
        return None
    values = np.asarray(differences)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    mean = float(values.mean())
    return mean - reach, mean + reach


def rank(
    records: Mapping[str, Sequence[Record]], baseline: str, bytes_per_token: float | None
) -> list[Row]:
    """The rows of the table, best first; variants with diverged runs come last.

    Args:
        records: for each variant its runs at the chosen learning rate, in the order of the seeds.
        baseline: the variant that the others are compared with.
        bytes_per_token: of the held-out part; None where losses are not of its tokens.
    """
    reference = records[baseline]
    rows = [
        _row(variant, runs, reference, variant == baseline, bytes_per_token)
        for variant, runs in records.items()
    ]
    return sorted(rows, key=lambda row: (row.diverged > 0, row.loss))


def _row(
    variant: str,
    runs: Sequence[Record],
    reference: Sequence[Record],
    is_baseline: bool,
    bytes_per_token: float | None,
) -> Row:
    seeds = [run["run"]["seed"] for run in runs]
    assert len(set(seeds)) == len(seeds), f"{variant} has a seed twice: {seeds}"
    losses = [_loss(run) for run in runs]
    diverged = sum(run["result"]["diverged"] for run in runs)
    pairs = list(zip(runs, reference, strict=True))
    whole = not any(run["result"]["diverged"] for pair in pairs for run in pair)
    differences = [_loss(a) - _loss(b) for a, b in pairs] if whole and not is_baseline else []
    bounds = interval(differences)
    first = runs[0]
    times = [run["result"]["step_time"] for run in runs if run["result"]["step_time"] is not None]
    loss = float(np.mean(losses))
    finite = len(losses) > 1 and math.isfinite(loss)
    return Row(
        variant=variant,
        learning_rate=first["run"]["learning_rate"],
        seeds=len(runs),
        diverged=diverged,
        loss=loss,
        spread=float(np.std(losses, ddof=1)) if finite else None,
        bits_per_byte=bytes_per_token and loss / math.log(2) / bytes_per_token,
        difference=float(np.mean(differences)) if differences else None,
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        detectable=(bounds[1] - bounds[0]) / 2 if bounds else None,
        verdict=_verdict(is_baseline, diverged, bounds),
        step_time=float(np.median(times)) if times else None,
        **_cost(first["cost"]),
    )


def _cost(cost: dict[str, Any]) -> dict[str, Any]:
    return {k: cost[k] for k in ("width", "parameters", "mismatch", "flops", "memory")}


def _loss(run: Record) -> float:
    # JSON has no infinity; a loss that is no number is stored as null.
    value = run["result"]["held_out"]
    return math.inf if value is None else float(value)


def _verdict(is_baseline: bool, diverged: int, bounds: tuple[float, float] | None) -> Verdict:
    if diverged:
        return "diverged"
    if is_baseline:
        return "baseline"
    if bounds is None:
        return "no interval"
    if bounds[0] <= 0 <= bounds[1]:
        return "no difference shown"
    return "better" if bounds[1] < 0 else "worse"


def best(records: Sequence[Record]) -> Record:
    """The run with the lowest loss on the selection part."""

    def selection(record: Record) -> float:
        value = record["result"]["selection"]
        return math.inf if value is None or record["result"]["diverged"] else float(value)

    return min(records, key=selection)
