"""A comparison from its setting to its rows: the missing runs are handed out, each is kept once."""

import functools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from gatedffn.compare.checkpoints import drop_torn, newest
from gatedffn.compare.data import BYTES, Text, Tokens, check_enough, load_text, tokenize
from gatedffn.compare.engines.here import Here
from gatedffn.compare.engines.pool import Died, Done, Failed, Pool
from gatedffn.compare.engines.processes import Processes
from gatedffn.compare.engines.speed import (
    WORTH_IT,
    Workers,
    faster,
    seconds_of_a_run,
    sequences_per_second,
)
from gatedffn.compare.execute import Prepared as Prepared
from gatedffn.compare.execute import surroundings
from gatedffn.compare.look import label
from gatedffn.compare.machine import on_gpu
from gatedffn.compare.models import Cost, cost, mismatches
from gatedffn.compare.schedule import (
    Extent,
    another,
    blocks,
    grid,
    number_of_runs,
    possible,
    schedule,
)
from gatedffn.compare.settings import LSTM, Run, Setting, run_key
from gatedffn.compare.statistics import Row, rank
from gatedffn.compare.store import Claim, Record, Store
from gatedffn.compare.team import Team, processes
from gatedffn.errors import RunError, SettingError
from gatedffn.variants import VARIANTS

POLL = 1.0
"""Seconds after which the folder is looked at again for what others did."""
DEATHS = 3
"""Workers that one run may cost."""


class Display(Protocol):
    """What a comparison tells while it runs."""

    def plan(self, runs: int) -> None:
        """So many runs it takes in all; said again when there are more."""

    def begin(self, run: Run) -> None:
        """A run starts."""

    def step(self, run: Run, step: int, loss: float | None) -> None:
        """A step of it is done."""

    def finish(self, record: Record, *, reused: bool) -> None:
        """A run is done, by this command or by another."""

    def note(self, words: str) -> None:
        """Something happened that one wants to know."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished comparison: the table's rows, best first, and the runs at the chosen rates.

    `data` is what `Prepared.data` says of the data, which every record has. `grid` has the runs of
    the first seed at every learning rate.
    """

    setting: Setting
    data: dict[str, Any]
    rows: list[Row]
    runs: dict[str, list[Record]]
    grid: list[Record] = field(default_factory=list)


def prepare(
    setting: Setting,
    sources: Sequence[str],
    field: str | None = None,
    encoding: str | None = None,
) -> Prepared:
    """Reads the data and counts every arm, as `prepare_all` does for several settings."""
    return prepare_all([setting], sources, field, encoding)[0]


def prepare_all(
    settings: Sequence[Setting],
    sources: Sequence[str],
    field: str | None = None,
    encoding: str | None = None,
) -> list[Prepared]:
    """Reads the data once and counts every arm of each setting; nothing is trained.

    Raises:
        DataError: data that cannot be used.
        SettingError: arms whose parameters differ by more than 1%.
    """
    for setting in settings:
        if setting.tokenizer == "bytes":
            _counted(setting, BYTES)  # what is refused is refused before the data is read
    text = load_text(sources, field, encoding)
    tokens = {name: tokenize(text, name) for name in {s.tokenizer for s in settings}}
    return [_prepared(setting, text, tokens[setting.tokenizer]) for setting in settings]


def _prepared(setting: Setting, text: Text, tokens: Tokens) -> Prepared:
    check_enough(tokens, setting.context, setting.batch)
    costs, mismatch = _counted(setting, tokens.vocabulary)
    data = {
        "description": text.description,
        "fingerprint": text.fingerprint,
        "training_tokens": len(tokens.train),
        # A target of T5 is no text, so its loss has no bits per byte of text.
        "bytes_per_token": None if setting.model == "t5" else tokens.bytes_per_token,
    }
    rows = tuple(VARIANTS[arm] for arm in setting.variants if arm != LSTM)
    return Prepared(setting, data, tokens, costs, mismatch, rows)


@functools.cache
def _counted(setting: Setting, vocabulary: int) -> tuple[dict[str, Cost], dict[str, float]]:
    """What each arm costs, and by how much their sizes differ."""
    costs = {arm: cost(setting, arm, vocabulary) for arm in setting.variants}
    return costs, mismatches(setting, costs)


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long so many runs take with so many workers, from steps of the costliest arm."""

    runs: int
    workers: int
    seconds: float


def estimate(
    prepared: Prepared,
    folder: Path,
    *,
    workers: int | None = 1,
    on: str | None = None,
    extent: Extent | None = None,
) -> Estimate:
    """How long `study` takes here with the same arguments; on a cluster, as if in one process.

    Workers are started and measured side by side, but nothing is written.
    """
    setting = prepared.setting
    extent = extent or Extent(first_seed=setting.first_seed)
    check(setting, extent, workers, on)
    runs = number_of_runs(setting, extent.seeds(setting.seeds))
    alone = sequences_per_second(prepared, least=0)
    one = Estimate(runs, 1, runs * seconds_of_a_run(prepared, alone))
    if on is not None or processes() > 1:
        return one
    measured = Workers(prepared, folder, runs)
    told = _told(measured, workers)
    count = min(runs, told or (1 if one.seconds < WORTH_IT else measured.most()))
    if count == 1:
        return one
    several = Processes(prepared, count, lambda *_: None)
    try:
        together = several.measured()
    finally:
        several.close()
    if told is None and not faster(together, alone):
        return one
    each = seconds_of_a_run(prepared, together / count)
    return Estimate(runs, count, math.ceil(runs / count) * each)


def result_of(
    setting: Setting, data: dict[str, Any], records: Mapping[Run, Record], seeds: Sequence[int]
) -> Result:
    """The rows of finished runs, of the seeds that every arm has."""
    runs = blocks(setting, records, seeds)
    rows = rank(runs, setting.baseline, data["bytes_per_token"])
    count = len(next(iter(runs.values())))
    rates = [record for arm in setting.variants for record in grid(setting, records, arm)]
    return Result(replace(setting, seeds=count), data, rows, runs, rates)


def study(
    prepared: Prepared,
    folder: Path,
    display: Display,
    *,
    workers: int | None = 1,
    on: str | None = None,
    extent: Extent | None = None,
    began: float | None = None,
) -> Result | None:
    """Does every run that is not done yet, and ranks them all; None on all but the first process.

    Any number of these, on any machines, may work on one folder: each does what no other does, and
    all return the same.

    Args:
        prepared: the comparison.
        folder: where its runs are kept.
        display: what is told of it.
        workers: how many runs at a time; None measures how many are fastest.
        on: the address of a Ray cluster to do them, or `ray` for one on this machine.
        extent: which seeds, if not those of the setting.
        began: the reading of `time.monotonic` from which the minutes of `extent` count.

    Raises:
        StorageError: the folder cannot be used.
        RunError: a run that fails, or whose process ends again and again.
    """
    extent = extent or Extent(first_seed=prepared.setting.first_seed)
    began = time.monotonic() if began is None else began
    check(prepared.setting, extent, workers, on)
    here = Here(prepared, display.step, Team())
    if not here.team.first:
        here.follow()
        return None
    count = extent.least if extent.open else prepared.setting.seeds
    with here, Store(folder) as store:
        runs = number_of_runs(prepared.setting, extent.seeds(count))
        pool = _pool(prepared, folder, here, workers, on, runs)
        try:
            return _Work(prepared, store, pool, display, extent, count, began).all()
        finally:
            pool.close()


def check(setting: Setting, extent: Extent, workers: int | None, on: str | None) -> None:
    """Refuses what can be refused without data: ways to do the runs that cannot be.

    Raises:
        SettingError: there is no such way, or nothing to do.
        MissingExtra: there is no Ray here.
    """
    if on == "":
        raise SettingError("on is empty: give a cluster's address, or ray for one on this machine")
    if on is not None:
        from gatedffn.compare.engines.cluster import imported_ray

        imported_ray()
    if processes() > 1 and (on is not None or workers not in (None, 1)):
        raise SettingError(
            f"torchrun shares each run among its {processes()} processes: leave out --workers "
            "and --on, or start the command without torchrun"
        )
    if setting.batch % processes():
        raise SettingError(
            f"batch is {setting.batch} sequences, which {processes()} processes cannot share: "
            "choose a multiple with --batch"
        )
    if workers is not None and workers < 1:
        raise SettingError(f"workers is {workers}: it must be at least 1")
    if not extent.open and not extent.seeds(setting.seeds):
        raise SettingError(
            f"shard {extent.shard[0]}/{extent.shard[1]} has nothing to do: there are "
            f"{setting.seeds} seeds, and a shard is some of them"
        )


def _pool(
    prepared: Prepared, folder: Path, here: Here, workers: int | None, on: str | None, runs: int
) -> Pool:
    """Where the runs are done: as told, or where they are done fastest."""
    if on == "":
        raise SettingError("on is empty: give a cluster's address, or ray for one on this machine")
    if on is not None:
        from gatedffn.compare.engines.cluster import Cluster

        return Cluster(prepared, on, workers)
    if here.processes > 1:
        return here
    measured = Workers(prepared, folder, runs)
    told = _told(measured, workers)
    if told is not None:
        return Processes(prepared, told, here.watch) if told > 1 else here
    alone = sequences_per_second(prepared)
    if runs * seconds_of_a_run(prepared, alone) < WORTH_IT or (most := measured.most()) == 1:
        return here
    several = Processes(prepared, most, here.watch)
    if measured.choose(most, several.measured(), alone) > 1:
        return several
    several.close()
    return here


def _told(measured: Workers, workers: int | None) -> int | None:
    """How many runs at a time, if that needs no measurement."""
    if workers is not None:
        return workers
    return torch.cuda.device_count() if on_gpu() else measured.kept()


def _name(run: Run) -> str:
    return f"{label(run.variant)}, seed {run.seed}, learning rate {run.learning_rate:g}"


class _Work:
    """The runs of one comparison, done here or by others who share the folder."""

    def __init__(
        self,
        prepared: Prepared,
        store: Store,
        pool: Pool,
        display: Display,
        extent: Extent,
        blocks: int,
        began: float,
    ) -> None:
        self.prepared, self.store, self.pool = prepared, store, pool
        self.display, self.extent, self.blocks, self.began = display, extent, blocks, began
        self.surroundings = surroundings(prepared, pool.processes, pool.gpu)
        self.records: dict[Run, Record] = {}
        self.running: dict[Run, Claim] = {}
        self.deaths: Counter[Run] = Counter()
        self.seen: set[str] = set()
        self.told: set[Run] = set()
        self.mine: set[Run] = set()

    @property
    def seeds(self) -> list[int]:
        return self.extent.seeds(self.blocks)

    def all(self) -> Result:
        """Works until nothing is missing, and what others have begun is finished too."""
        self._plan()
        while True:
            self._fill()
            if self.running:
                for ended in self.pool.wait(POLL):
                    self._end(ended)
            elif self._missing():
                time.sleep(POLL)
            elif not self._more():
                break
        return self._result()

    def _result(self) -> Result:
        return result_of(self.prepared.setting, self.prepared.data, self.records, self.seeds)

    def _plan(self) -> None:
        self.display.plan(number_of_runs(self.prepared.setting, self.seeds))

    def _missing(self) -> list[Run]:
        """What nobody has finished; on the way it tells what others have."""
        setting = self.prepared.setting
        for key, record in self.store.runs().items():
            if key not in self.seen:
                self.seen.add(key)
                run = Run(**record["run"])
                if run_key(setting, run, self.surroundings) == key:
                    self.records[run] = record
        for run in possible(setting, self.records, self.seeds):
            if run in self.records and run not in self.told:
                self.told.add(run)
                self.display.finish(self.records[run], reused=run not in self.mine)
        return schedule(setting, self.records, self.seeds)

    def _fill(self) -> None:
        """Gives runs to all workers, as far as there are some that nobody does."""
        while len(self.running) < self.pool.size:
            for run in self._missing():
                if run not in self.running and (claim := self._claim(run)) is not None:
                    self.running[run] = claim
                    self.display.begin(run)
                    self._begin(run, claim)
                    break
            else:
                # Whoever has nothing to do begins a block; for a width all of them must be whole.
                if self.extent.until is not None or not self._more():
                    return

    def _claim(self, run: Run) -> Claim | None:
        return self.store.claim(run_key(self.prepared.setting, run, self.surroundings))

    def _begin(self, run: Run, claim: Claim) -> None:
        """Gives a run to a worker, without the checkpoints that a kill or a full disk left torn."""
        dropped = drop_torn(claim.place)
        if dropped:
            last = newest(claim.place)
            torn = f"{' and '.join(dropped)} cannot be read to the end"
            words = f"goes on from step {last}" if last else "begins again"
            self.display.note(f"{_name(run)}: {torn}, so the run {words}")
        self.pool.begin(run, claim)

    def _more(self) -> bool:
        """Adds a block if there is to be another."""
        if not self.extent.open:
            return False
        missing, width = self._missing(), None
        if not missing:
            widths = [row.detectable for row in self._result().rows]
            width = max((w for w in widths if w is not None), default=None)
        seeds = self.extent.seeds(self.blocks + 1)
        # What an earlier command did counts, whatever the time.
        stored = schedule(self.prepared.setting, self.records, seeds) == missing
        elapsed = time.monotonic() - self.began
        expected = self._expected(len(missing))
        stored = stored and self.blocks < self.extent.limit
        if not stored and not another(self.extent, self.blocks, elapsed, expected, width):
            return False
        self.blocks += 1
        self._plan()
        return True

    def _expected(self, missing: int) -> float:
        """The seconds that what is missing and one more block take."""
        taken = [record["seconds"] for record in self.records.values()]
        mean = sum(taken) / len(taken) if taken else 0.0
        count = missing + len(self.prepared.setting.variants)
        return mean * count / self.pool.size

    def _end(self, ended: Done | Died | Failed) -> None:
        run = ended.run
        name, claim = _name(run), self.running[run]
        match ended:
            case Done(record=record):
                self._check(record, name)
                del self.running[run]
                self.mine.add(run)
                if not self.store.put(claim, record):
                    self.mine.discard(run)
                    self.display.note(f"{name}: another was first, this one is dropped")
            case Died(how=how):
                self.deaths[run] += 1
                if self.deaths[run] == DEATHS:
                    raise RunError(
                        f"{name}: its process ended {DEATHS} times ({how}); where memory is short, "
                        "choose fewer --workers or a smaller --batch"
                    )
                self.display.note(f"{name}: its process ended ({how}), and it is begun again")
                self._begin(run, claim)
            case Failed(error=error):
                if claim.look():
                    raise error
                # Another took the run over while this machine slept, and its files with it.
                del self.running[run]
                self.store.release(claim)
                self.display.note(f"{name}: another has taken it over")

    def _check(self, record: Record, name: str) -> None:
        """A worker on another machine may have other versions."""
        for what, here in self.surroundings.items():
            there = record["surroundings"][what]
            if there != here:
                raise RunError(
                    f"{name}: {what} is {there!r} where it was done, and {here!r} here: install "
                    "the same on every machine"
                )
