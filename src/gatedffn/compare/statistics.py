"""What a comparison may conclude: its rows, their differences and verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gatedffn.compare.intervals import Contrast, Spreads, analyse, reach, seeds_for
from gatedffn.compare.settings import LSTM, PRESETS, SPREADS, Setting, of_a_run
from gatedffn.compare.store import Record
from gatedffn.variants import VARIANTS

Verdict = Literal["baseline", "better", "worse", "no difference shown", "no interval", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant's line in the table. Losses and differences are in nats a token.

    `spread` is the standard deviation over seeds. `low` and `high` bound the difference to the
    baseline with 95% confidence for all variants at once, `alone_low` and `alone_high` for this one
    alone. `detectable` is half of the former, the smallest difference that could have been shown.
    All are None with a single seed or a diverged run.
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
    alone_low: float | None
    alone_high: float | None
    detectable: float | None
    verdict: Verdict
    width: int
    parameters: int
    active: int
    mismatch: float
    flops: int
    step_time: float | None
    memory: int


def kind(arm: str) -> str:
    """Which arms an arm's losses are taken to vary like."""
    if arm == LSTM:
        return LSTM
    return "gated" if VARIANTS[arm].gated else "not gated"


def expected_reach(setting: Setting) -> dict[str, float]:
    """About the smallest difference to the baseline that a setting will show, for each arm, in
    nats a token; none where its spread was never measured.
    """
    spreads = _known_spreads(setting)
    if spreads is None:
        return {}
    return reach(spreads, setting.seeds, _kinds(setting), setting.baseline)


def expected_seeds(setting: Setting, wanted: float) -> int | None:
    """About how many seeds bring the widest interval to that much to each side; None where the
    spread was never measured.
    """
    spreads = _known_spreads(setting)
    if spreads is None:
        return None
    return seeds_for(wanted, spreads, _kinds(setting), setting.baseline)


def _kinds(setting: Setting) -> dict[str, str]:
    return {arm: kind(arm) for arm in setting.variants}


def _known_spreads(setting: Setting) -> Spreads | None:
    """The spreads of the preset that a setting is, but for its variants and seeds."""

    def facts(setting: Setting) -> tuple[object, ...]:
        return of_a_run(asdict(setting)), setting.learning_rates

    for name, spreads in SPREADS.items():
        if facts(PRESETS[name]) == facts(setting):
            return spreads
    return None


def rank(
    records: Mapping[str, Sequence[Record]], baseline: str, bytes_per_token: float | None
) -> list[Row]:
    """The rows of the table, best first; variants with diverged runs come last.

    Args:
        records: for each variant its runs at the chosen learning rate, in the order of the seeds.
        baseline: the variant that the others are compared with.
        bytes_per_token: of the held-out part; None where losses are not of its tokens.
    """
    blocks = [run["run"]["seed"] for run in records[baseline]]
    assert len(set(blocks)) == len(blocks), f"{baseline} has a seed twice: {blocks}"
    for arm, runs in records.items():
        seeds = [run["run"]["seed"] for run in runs]
        assert seeds == blocks, f"{arm} ran with the seeds {seeds}, {baseline} with {blocks}"
    losses = losses_of(records)
    contrasts = analyse(losses, baseline, {arm: kind(arm) for arm in records})
    rows = []
    for arm, runs in records.items():
        difference = float(np.mean(losses[arm])) - float(np.mean(losses[baseline]))
        shown = difference if arm != baseline and math.isfinite(difference) else None
        # Runs are kept whatever the baseline is, so this is not among what they cost.
        mismatch = _compared(runs) / _compared(records[baseline]) - 1
        contrast = contrasts.get(arm)
        rows.append(_row(arm, runs, arm == baseline, shown, contrast, bytes_per_token, mismatch))
    return sorted(rows, key=lambda row: (row.diverged > 0, row.loss))


def losses_of(records: Mapping[str, Sequence[Record]]) -> dict[str, list[float]]:
    """The held-out losses of each variant; infinite where a run diverged, which may end with a
    number, but with none to reckon with.
    """
    return {
        arm: [math.inf if run["result"]["diverged"] else _loss(run) for run in runs]
        for arm, runs in records.items()
    }


def _row(
    variant: str,
    runs: Sequence[Record],
    is_baseline: bool,
    difference: float | None,
    contrast: Contrast | None,
    bytes_per_token: float | None,
    mismatch: float,
) -> Row:
    losses = [_loss(run) for run in runs]
    diverged = sum(run["result"]["diverged"] for run in runs)
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
        difference=difference,
        low=contrast.low if contrast else None,
        high=contrast.high if contrast else None,
        alone_low=contrast.alone_low if contrast else None,
        alone_high=contrast.alone_high if contrast else None,
        detectable=contrast.detectable if contrast else None,
        verdict=_verdict(is_baseline, diverged, contrast),
        mismatch=mismatch,
        step_time=float(np.median(times)) if times else None,
        **_cost(first["cost"]),
    )


def _cost(cost: dict[str, Any]) -> dict[str, Any]:
    # Runs of versions that had no mixtures do not say it: all of their parameters were active.
    active = cost.get("active", cost["parameters"])
    return {k: cost[k] for k in ("width", "parameters", "flops", "memory")} | {"active": active}


def _compared(runs: Sequence[Record]) -> int:
    """The parameters that differ between arms."""
    return int(runs[0]["cost"]["compared"])


def _loss(run: Record) -> float:
    # JSON has no infinity; a loss that is no number is stored as null.
    value = run["result"]["held_out"]
    return math.inf if value is None else float(value)


def _verdict(is_baseline: bool, diverged: int, contrast: Contrast | None) -> Verdict:
    if diverged:
        return "diverged"
    if is_baseline:
        return "baseline"
    if contrast is None:
        return "no interval"
    if contrast.low <= 0 <= contrast.high:
        return "no difference shown"
    return "better" if contrast.high < 0 else "worse"


def selection_loss(record: Record) -> float:
    """The loss on the selection part; infinite where the run diverged."""
    value = record["result"]["selection"]
    return math.inf if value is None or record["result"]["diverged"] else float(value)


def best_rate(curve: Mapping[float, float]) -> float:
    """The learning rate with the lowest loss, of equal ones the lowest rate."""
    return min(curve, key=lambda rate: (curve[rate], rate))
