"""Which runs a comparison is made of, which of them can be done now, and when it is enough.

Everything here is decided from the setting and the finished runs alone; nothing is computed.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gatedffn.compare.settings import Run, Setting
from gatedffn.compare.statistics import best_rate, selection_loss
from gatedffn.compare.store import Record
from gatedffn.errors import SettingError

MOST_UNTIL = 50
"""Seeds after which `--until` gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of a comparison is done: which seeds, and until when.

    With `minutes` or `until` the number of seeds is open: a block, one seed of every variant, is
    added as long as the time lasts, or until the widest interval reaches less than `until` to each
    side. `most` is the largest number of blocks then; None is `MOST_UNTIL` with `until`, and any
    number with `minutes` alone. `shard` is which part of how many, and
    `first_seed` the setting's.
    """

    shard: tuple[int, int] = (1, 1)
    minutes: float | None = None
    until: float | None = None
    most: int | None = None
    first_seed: int = 0

    def __post_init__(self) -> None:
        part, parts = self.shard
        if not 1 <= part <= parts:
            raise SettingError(f"shard {part}/{parts}: it must be 1/N to N/N, with N parts in all")
        for name, value in (("minutes", self.minutes), ("until", self.until)):
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{name} is {value}: it must be above 0")
        if self.open and self.limit < self.least:
            raise SettingError(
                f"seeds is {self.most}: with --minutes or --until it is the most there may be, and "
                f"at least {self.least}"
            )

    @property
    def open(self) -> bool:
        """Whether the number of seeds is decided on the way."""
        return self.minutes is not None or self.until is not None

    @property
    def least(self) -> int:
        """The blocks that are done in any case, if the number is open."""
        return 2 if self.until is None else 3

    @property
    def limit(self) -> float:
        """The largest number of blocks, if the number is open."""
        if self.most is not None:
            return self.most
        return math.inf if self.until is None else MOST_UNTIL

    def of_several(self, number: int, count: int) -> "Extent":
        """For one of several studies, one after the other: by when it ends, in equal shares."""
        if self.minutes is None:
            return self
        return replace(self, minutes=self.minutes * number / count)

    def seeds(self, blocks: int) -> list[int]:
        """The seeds of this part: of so many blocks, or so many of its own if that is open."""
        part, parts = self.shard
        own = itertools.count(self.first_seed + part - 1, parts)
        if self.open:
            return list(itertools.islice(own, blocks))
        return list(itertools.takewhile(lambda seed: seed < self.first_seed + blocks, own))


def read_shard(text: str) -> tuple[int, int]:
    """The part and the number of parts in `2/8`."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise SettingError(f"shard is {text!r}: it must be PART/PARTS, such as 2/8")
    return int(match[1]), int(match[2])


def schedule(setting: Setting, records: Mapping[Run, Record], seeds: Sequence[int]) -> list[Run]:
    """The runs that are missing and can be done now, in the order in which to do them.

    The grid of learning rates on the first seed comes first, then seed by seed every variant at
    the best of its rates. Neighbours are of different variants, so that several workers complete
    one block after the other.
    """
    return [run for run in possible(setting, records, seeds) if run not in records]


def number_of_runs(setting: Setting, seeds: Sequence[int]) -> int:
    """How many runs these seeds take."""
    grid = len(setting.learning_rates) if setting.tuned or setting.first_seed in seeds else 0
    return len(setting.variants) * (grid + len(set(seeds) - {setting.first_seed}))


def possible(setting: Setting, records: Mapping[Run, Record], seeds: Sequence[int]) -> list[Run]:
    """The runs of these seeds, finished or not, whose learning rate is known."""
    # Every shard needs the choice of rates, so every shard makes it, by the same runs.
    runs: list[Run] = []
    if setting.tuned or setting.first_seed in seeds:
        runs = [
            Run(variant=arm, seed=setting.first_seed, learning_rate=rate)
            for rate in setting.learning_rates
            for arm in setting.variants
        ]
    rates = {arm: _rate(setting, records, arm) for arm in setting.variants}
    return runs + [
        Run(variant=arm, seed=seed, learning_rate=rate)
        for seed in seeds
        for arm, rate in rates.items()
        if seed != setting.first_seed and rate is not None
    ]


def grid(setting: Setting, records: Mapping[Run, Record], arm: str) -> list[Record]:
    """The finished runs of an arm's first seed at each learning rate."""
    runs = (
        Run(variant=arm, seed=setting.first_seed, learning_rate=r) for r in setting.learning_rates
    )
    return [records[run] for run in runs if run in records]


def _rate(setting: Setting, records: Mapping[Run, Record], arm: str) -> float | None:
    """The learning rate of an arm; None while its grid has a gap."""
    if not setting.tuned:
        return setting.learning_rates[0]
    found = grid(setting, records, arm)
    if len(found) < len(setting.learning_rates):
        return None
    return best_rate({record["run"]["learning_rate"]: selection_loss(record) for record in found})


def blocks(
    setting: Setting, records: Mapping[Run, Record], seeds: Sequence[int]
) -> dict[str, list[Record]]:
    """For each arm its runs at its learning rate, of the seeds that all arms have."""
    rates = {arm: _rate(setting, records, arm) for arm in setting.variants}
    table = {
        arm: {
            seed: records[run]
            for seed in seeds
            if rate is not None
            and (run := Run(variant=arm, seed=seed, learning_rate=rate)) in records
        }
        for arm, rate in rates.items()
    }
    whole = [seed for seed in seeds if all(seed in runs for runs in table.values())]
    return {arm: [runs[seed] for seed in whole] for arm, runs in table.items()}


def another(
    extent: Extent, begun: int, elapsed: float, expected: float, half_width: float | None
) -> bool:
    """Whether one more block is begun after `begun` of them.

    It is decided by the clock and by the width of the intervals, which depends on the spread of
    the runs and not on the differences: never by which variant is ahead.

    Args:
        extent: what was asked for.
        begun: the blocks so far.
        elapsed: the seconds since the start.
        expected: the seconds that what is unfinished and one more block take.
        half_width: of the widest interval; None where some block is unfinished, or no interval is.
    """
    if begun < extent.least:
        return True
    if begun >= extent.limit:
        return False
    if extent.minutes is not None and elapsed + expected > 60 * extent.minutes:
        return False
    return extent.until is None or half_width is None or half_width > extent.until
