"""A comparison from its setting to its rows: which runs there are, and which are still to do."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

import gatedffn
from gatedffn.compare.data import Text, Tokens, check_enough, load_text, tokenize
from gatedffn.compare.machine import card, on_gpu, step_memory
from gatedffn.compare.models import Cost, blank, build, cost, initialise, mismatches
from gatedffn.compare.settings import Run, Setting, run_key
from gatedffn.compare.statistics import Row, best, rank
from gatedffn.compare.store import Record, Store, checkpoints_of
from gatedffn.errors import SettingError
from gatedffn.files import json_ready

if TYPE_CHECKING:
    from gatedffn.compare.training import Outcome


class Display(Protocol):
    """What a comparison tells while it runs."""

    def begin(self, run: Run) -> None:
        """A run starts."""

    def step(self, step: int, loss: float | None) -> None:
        """A step of it is done."""

    def finish(self, record: Record, *, reused: bool) -> None:
        """A run is done, now or by an earlier command."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A setting with its data, and what each arm of it costs."""

    setting: Setting
    text: Text
    tokens: Tokens
    costs: dict[str, Cost]
    mismatch: dict[str, float]

    @property
    def data(self) -> dict[str, Any]:
        """What is said of the data; every record has it, so that a report needs records alone."""
        return {
            "description": self.text.description,
            "fingerprint": self.text.fingerprint,
            "training_tokens": len(self.tokens.train),
            "bytes_per_token": self.tokens.bytes_per_token,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """A finished comparison: the table's rows, best first, and the runs at the chosen rates.

    `grid` has the runs of the first seed at every learning rate.

    `data` is what `Prepared.data` says of the data, which every record has.
    """

    setting: Setting
    data: dict[str, Any]
    rows: list[Row]
    runs: dict[str, list[Record]]
    grid: list[Record] = field(default_factory=list)


def prepare(setting: Setting, sources: Sequence[str], field: str) -> Prepared:
    """Reads the data and counts every arm; nothing is trained.

    Raises:
        DataError: data that cannot be used.
        SettingError: arms whose parameters differ by more than 1%.
    """
    text = load_text(sources, field)
    tokens = tokenize(text, setting.tokenizer)
    check_enough(tokens, setting.context, setting.batch)
    costs = {arm: cost(setting, arm, tokens.vocabulary) for arm in setting.variants}
    return Prepared(setting, text, tokens, costs, mismatches(setting, costs))


def estimated_seconds(prepared: Prepared) -> float:
    """How long the comparison takes here, from steps of a few sequences of the costliest arm."""
    setting, costs = prepared.setting, prepared.costs
    arm = max(costs, key=lambda name: costs[name].flops)
    device = torch.device("cuda" if on_gpu() else "cpu")
    model = build(setting, arm, prepared.tokens.vocabulary)
    initialise(model, setting.init, 0)
    model.to(device)
    # A small batch stands for a large one; below four sequences the overhead would count.
    batch = min(setting.batch, 4)
    inputs = blank(setting, batch, device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        model(**inputs)["loss"].backward()
        if on_gpu():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    per_sequence = min(times[1:]) / batch
    measured = setting.evaluations * setting.selection_tokens + setting.held_out_tokens
    # Measuring a loss is the forward pass alone, a third of the arithmetic.
    sequences = setting.steps * setting.batch + measured / setting.context / 3
    return per_sequence * sequences * setting.runs


def study(prepared: Prepared, folder: Path, display: Display) -> Result | None:
    """Does every run that is not done yet, and ranks them all; None on all but the first process.

    Raises:
        StorageError: the folder cannot be used.
    """
    setting = prepared.setting
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if setting.batch % processes:
        raise SettingError(
            f"batch is {setting.batch} sequences, which {processes} processes cannot share: "
            "choose a multiple with --batch"
        )
    team = _Team(processes)
    store = Store(folder) if team.first else None
    try:
        work = _Work(prepared, folder, store, display, team)
        runs = work.all()
    finally:
        if store is not None:
            store.close()
    if not team.first:
        return None
    # A target of T5 is no text, so its loss has no bits per byte of text.
    bytes_per_token = None if setting.model == "t5" else prepared.tokens.bytes_per_token
    rows = rank(runs, setting.baseline, bytes_per_token)
    return Result(setting, prepared.data, rows, runs, work.grid)


class _Team:
    """The processes of a data-parallel run; the first one alone stores and shows."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.first = True
        if processes > 1:
            from accelerate import PartialState

            self.first = PartialState(cpu=not on_gpu()).is_main_process

    def share(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.processes == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


class _Work:
    """The runs of one comparison, done or taken from the store."""

    def __init__(
        self,
        prepared: Prepared,
        folder: Path,
        store: Store | None,
        display: Display,
        team: _Team,
    ) -> None:
        self.prepared, self.folder, self.store = prepared, folder, store
        self.display, self.team = display, team
        self.memory: dict[str, int] = {}
        self.grid: list[Record] = []
        self.surroundings = {
            "data": prepared.text.fingerprint,
            "version": gatedffn.__version__,
            "processes": team.processes,
            "gpu": on_gpu(),
            "torch": torch.__version__,
            "transformers": package_version("transformers"),
        }

    def all(self) -> dict[str, list[Record]]:
        """The grid of learning rates on the first seed, then the other seeds at the best of it."""
        setting = self.prepared.setting
        chosen: dict[str, list[Record]] = {}
        for arm in setting.variants:
            grid = [
                self._finished(Run(variant=arm, seed=0, learning_rate=rate))
                for rate in setting.learning_rates
            ]
            self.grid += grid
            chosen[arm] = [best(grid)]
        for seed in range(1, setting.seeds):
            for arm, records in chosen.items():
                rate = records[0]["run"]["learning_rate"]
                run = Run(variant=arm, seed=seed, learning_rate=rate)
                records.append(self._finished(run))
        return chosen

    def _finished(self, run: Run) -> Record:
        """A run's record: an earlier command's, or that of training it now."""
        key = run_key(self.prepared.setting, run, self.surroundings)
        stored: Record | None = self.team.share(self.store.get(key) if self.store else None)
        record = self._train(run, key) if stored is None else stored
        self.display.finish(record, reused=stored is not None)
        return record

    def _train(self, run: Run, key: str) -> Record:
        self.display.begin(run)
        cost = self._cost(run.variant)
        record = self._record(run, key, cost, self._outcome(run, key))
        record = cast(Record, self.team.share(record))
        if self.store is not None:
            self.store.add(record)
        return record

    def _outcome(self, run: Run, key: str) -> "Outcome":
        from gatedffn.compare.training import finished_checkpoint, train

        checkpoints = checkpoints_of(self.folder, key)
        return train(
            self.prepared.setting,
            run,
            self.prepared.tokens,
            checkpoints,
            self.team.share(finished_checkpoint(checkpoints) if self.store else None),
            self.display.step,
            self.team.processes,
        )

    def _record(self, run: Run, key: str, cost: dict[str, Any], outcome: "Outcome") -> Record:
        return {
            "key": key,
            "run": asdict(run),
            "result": json_ready(asdict(outcome)),
            "cost": cost,
            "setting": asdict(self.prepared.setting),
            "data": self.prepared.data,
            "processes": self.team.processes,
            "machine": card(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _cost(self, arm: str) -> dict[str, Any]:
        if arm not in self.memory:
            vocabulary = self.prepared.tokens.vocabulary
            self.memory[arm] = step_memory(self.prepared.setting, arm, vocabulary)
        mismatch = self.prepared.mismatch[arm]
        return asdict(self.prepared.costs[arm]) | {"mismatch": mismatch, "memory": self.memory[arm]}
