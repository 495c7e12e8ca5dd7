"""What the times say: ratios to eager PyTorch, to the best peer, and to the machine's limit.

Every ratio is taken within a round and is then the median over the rounds: a machine's clock
drifts by tens of percent, and what is compared was measured within seconds.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gatedffn.bench.contestants import EAGER, OURS, OWN, PRODUCTS
from gatedffn.bench.limits import Bound
from gatedffn.bench.outcomes import Measured, Outcome
from gatedffn.gain import Gain, closing

MILLI = 1e3
SCATTERED = 1.5
"""Times the fastest round that the slowest may take."""
AGREEING = 0.1
"""What a ratio within rounds and that of the times may differ by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one contestant in a workload.

    `spread` is from the fastest round's median to the slowest one's. The ratios are speeds: 2 is
    twice as fast as the other. `best_peer` is the fastest contestant that is not gatedffn.
    `to_products` is to the matrix products alone, None where they were not measured. `scattered`
    says that the machine was disturbed: rounds lie far apart, or the median of the ratios within
    rounds is another one than that of the medians.
    """

    milliseconds: float
    spread: tuple[float, float]
    to_eager: float | None
    to_best_peer: float | None
    of_limit: float
    to_products: float | None = None
    scattered: bool = False


def best_peer(measured: Measured) -> Outcome | None:
    """The fastest contestant but this library; None when no other has a figure."""
    others = [o for o in measured.outcomes if o.reason is None and not _is_no_peer(o)]
    return min(others, key=lambda o: o.seconds or 0.0, default=None)


def _is_no_peer(outcome: Outcome) -> bool:
    return outcome.entry.contestant in OWN or outcome.entry.yardstick


def limit_milliseconds(measured: Measured) -> float:
    """The workload's limit: the median over the rounds."""
    return MILLI * statistics.median(limit.seconds(measured.workload) for limit in measured.limits)


def limit_bound(measured: Measured) -> Bound:
    """What it comes from, in most of the rounds."""
    return statistics.mode(limit.bound(measured.workload) for limit in measured.limits)


def figures(measured: Measured, outcome: Outcome) -> Figures | None:
    """None for a contestant that has no times: it was not installed, failed, or was wrong."""
    if outcome.seconds is None:
        return None
    by_name = {o.entry.contestant: o for o in measured.outcomes}
    limits = [limit.seconds(measured.workload) for limit in measured.limits]
    eager = by_name.get(EAGER)
    to_eager = _speed(outcome, eager)
    scattered = max(outcome.rounds) > SCATTERED * min(outcome.rounds)
    if to_eager is not None and eager is not None and eager.seconds is not None:
        scattered |= abs(to_eager * outcome.seconds / eager.seconds - 1.0) > AGREEING
    return Figures(
        milliseconds=MILLI * outcome.seconds,
        spread=(MILLI * min(outcome.rounds), MILLI * max(outcome.rounds)),
        to_eager=to_eager,
        to_best_peer=_speed(outcome, best_peer(measured)),
        of_limit=_ratio(limits, outcome.rounds),
        to_products=_speed(outcome, by_name.get(PRODUCTS)),
        scattered=scattered,
    )


def _speed(outcome: Outcome, other: Outcome | None) -> float | None:
    if other is None or other.seconds is None:
        return None
    return _ratio(other.rounds, outcome.rounds)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The speed of this library relative to another contestant, over all that both were timed in.

    `contestant` is this library's, and `worst_workload` the name of the one with the least speed.
    """

    contestant: str
    against: str
    workloads: int
    geometric_mean: float
    worst: float
    worst_workload: str


def summaries(done: Sequence[Measured]) -> list[Summary]:
    """One for each pair of a contestant of this library and one that is not."""
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    for measured in done:
        own = [o for o in measured.outcomes if o.entry.contestant in OWN and o.reason is None]
        for ours, other in itertools.product(own, measured.outcomes):
            speed = None if _is_no_peer(other) else _speed(ours, other)
            if speed is not None:
                pair = ours.entry.contestant, other.entry.contestant
                pairs.setdefault(pair, {})[measured.workload.name] = speed
    found = []
    for (contestant, against), speeds in pairs.items():
        worst = min(speeds, key=speeds.__getitem__)
        found.append(
            Summary(
                contestant=contestant,
                against=against,
                workloads=len(speeds),
                geometric_mean=statistics.geometric_mean(speeds.values()),
                worst=speeds[worst],
                worst_workload=worst,
            )
        )
    return found


def conclusions(done: Sequence[Measured]) -> list[str]:
    """What is gained beside eager PyTorch, in a sentence for each kind of workload and dtype."""
    found: dict[tuple[str, str], list[Gain]] = {}
    for measured in done:
        workload = measured.workload
        by_name = {o.entry.contestant: o for o in measured.outcomes}
        if OURS not in by_name or EAGER not in by_name:
            continue
        ours = figures(measured, by_name[OURS])
        if ours is None or ours.to_eager is None:
            continue
        stage = "backward" if workload.backward else "training" if workload.training else "forward"
        part = {"layer": "", "packed": "packed gating, "}.get(workload.part, f"{workload.part}, ")
        kind = f"{part}{stage} in {workload.dtype}", by_name[EAGER].entry.label
        other = ours.to_eager * ours.milliseconds
        gain = Gain(workload.tokens, other, ours.milliseconds, not ours.scattered)
        found.setdefault(kind, []).append(gain)
    return [closing(gains, f"{eager}, {kind}") for (kind, eager), gains in found.items()]


def limit_record(measured: Measured) -> dict[str, Any]:
    """The limits of a workload for programs, and the rates that they are the best of."""
    return {
        "milliseconds": limit_milliseconds(measured),
        "bound": limit_bound(measured),
        "flops_per_second": statistics.median(limit.flops for limit in measured.limits),
        "bytes_per_second": statistics.median(limit.bytes for limit in measured.limits),
        "sources": {
            source: statistics.median(limit.sources[source] for limit in measured.limits)
            for source in measured.limits[0].sources
        },
        "rounds": [MILLI * limit.seconds(measured.workload) for limit in measured.limits],
    }
