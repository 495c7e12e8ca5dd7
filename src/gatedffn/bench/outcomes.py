"""What a measurement leaves: for each contestant its times, or the reason why it has none."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from gatedffn.bench.check import Verdict
from gatedffn.bench.limits import Limit
from gatedffn.bench.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who takes part in a workload, known before anything runs.

    `tolerance` is how far its errors may be above what this project allows itself. A `yardstick`
    computes no layer and is nobody's peer. Who `declined` was not asked to compute it.
    """

    contestant: str
    label: str
    version: str | None
    tolerance: float = 1.0
    yardstick: bool = False
    declined: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """What a turn gave: the median of its samples, in seconds a step, and how many they were."""

    seconds: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of an entry: a timing for each round, or a `reason` why it has no figure.

    `verdict` is None where nothing was checked. `ways` says by which way this library computed
    each stage, where that is known.
    """

    entry: Entry
    timings: tuple[Timing, ...] = ()
    reason: str | None = None
    verdict: Verdict | None = None
    ways: Mapping[str, str] = field(default_factory=dict)

    @property
    def rounds(self) -> list[float]:
        """The seconds of each round."""
        return [timing.seconds for timing in self.timings]

    @property
    def seconds(self) -> float | None:
        """The median over the rounds; None where there is no figure."""
        return None if self.reason is not None else statistics.median(self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A finished workload. The limits are those of the same rounds, in the same order."""

    workload: Workload
    outcomes: tuple[Outcome, ...]
    limits: tuple[Limit, ...]
