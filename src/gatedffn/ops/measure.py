"""Choosing among equal ways by measuring them once, and keeping the choice.

A choice holds for the process. It is also written to the user's cache folder and taken from there
by the next process, so that equal seeds give equal numbers as long as that folder is kept. Where
rounds disagree the measurement is repeated, and what stays doubtful is measured again by the next
processes, a few times at most: then it stays, and numbers settle. With
`GATEDFFN_TUNE=off`, under `torch.use_deterministic_algorithms(True)` and in the runs of a
comparison nothing is measured: the first of the ways is taken.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.files import regular, storing, written_aside

log = logging.getLogger(__name__)

MARGIN = 0.95  # another way must take less than this share of the first one's time
ROUNDS = 5
AGREEING = 3  # rounds of a way, its shortest, whose spread says how far its time may be wrong
TIMES = 3  # measurements of what stays doubtful: in a process, and then by processes
ENOUGH = 0.001  # seconds: shorter runs are repeated until they have taken so long
FAR_BEHIND = 2.0  # times the best so far
PATIENCE = 2.0  # seconds, after which two rounds are enough
CROWDED = 1.5  # times the cores
WAIT = 60.0  # seconds for the choice of another process
LOCKED = 10.0  # seconds that others may take to write the file

Trials = Mapping[str, Callable[[], object]]
Rounds = Mapping[str, Sequence[float]]
"""The seconds of a run of each way, in each of its rounds."""
Race = Callable[[Trials], Rounds]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and the milliseconds of each.

    `doubts` counts the processes that measured it and whose rounds disagreed; 0 once one had no
    doubt.
    """

    chosen: str
    milliseconds: Mapping[str, float]
    by: str
    doubts: int = 0

    @property
    def reason(self) -> str:
        """How it came about, and whether it may be wrong."""
        if not self.doubts:
            return self.by
        then = "a later process measures again" if self.open else "it stays"
        times = f"{self.doubts} time{'s'[: self.doubts - 1]}"
        return f"{self.by}, doubtful: rounds disagreed {times}, {then}"

    @property
    def open(self) -> bool:
        """Whether the next process measures again."""
        return 0 < self.doubts < TIMES


_made: dict[str, Choice] = {}
_by_rule_alone: dict[str, str] = {}
_deciding = threading.RLock()
_by_rule = False


def _in_a_forked_process() -> None:
    """There nobody releases the lock that another thread held."""
    global _deciding
    _deciding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_forked_process)


@functools.cache
def _switched_off() -> bool:
    return os.environ.get("GATEDFFN_TUNE", "").lower() in ("0", "off", "no", "false")


def nothing() -> None:
    """There is nothing to wait for."""


def tuning() -> bool:
    """Whether choices are measured: not under deterministic algorithms, nor when switched off.

    The environment is read once a process.
    """
    return not (_switched_off() or _by_rule or torch.are_deterministic_algorithms_enabled())


@contextlib.contextmanager
def by_rule() -> Iterator[None]:
    """Until the end nothing is measured in this process, whatever was chosen before."""
    global _by_rule
    before, _by_rule = _by_rule, True
    try:
        yield
    finally:
        _by_rule = before


def known(key: str) -> Choice | None:
    """The choice that was made for a key, if it was."""
    return _made.get(key)


def choose(
    key: str,
    names: Sequence[str],
    trials: Callable[[], Trials],
    finish: Callable[[], None] = nothing,
    *,
    compiled: bool = False,
) -> Choice:
    """Which of several to take for a key: as chosen before, as stored, or as now measured.

    The first is the one that another has to beat. `trials` makes a run of each, and `finish` waits
    until a device has done what one began. Where the first run of each is `compiled`, these are
    begun at once.
    """
    found = _made.get(key)
    if found is None or found.chosen not in names:
        with _deciding:  # two that measure at once would disturb each other
            found = _made.get(key)
            if found is None or found.chosen not in names:
                race = partial(_race, finish=finish, compiled=compiled)
                found = _made[key] = _decide_together(key, names, trials, race)
    return found


def first(key: str, trials: Callable[[], Trials], finish: Callable[[], None] = nothing) -> str:
    """The first of several that runs, found once in a process: nothing is measured."""
    if key not in _by_rule_alone:
        with torch.no_grad():
            _by_rule_alone[key] = next(first_runs(trials(), finish))
    return _by_rule_alone[key]


class Store(Protocol):
    """Where processes leave words for each other, as PyTorch's stores do."""

    def set(self, key: str, value: str, /) -> None: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...


_store: Store | None = None
_leads = False


def choose_together(store: Store | None, leads: bool = False) -> None:
    """From now on the choices of this process are those of the one that leads; None is its own.

    What was chosen before is forgotten. Nobody waits forever: who has waited long chooses alone.
    """
    global _store, _leads
    forget()
    _store, _leads = store, leads


def _decide_together(
    key: str, names: Sequence[str], trials: Callable[[], Trials], race: Race
) -> Choice:
    if _store is None:
        return _decide(key, names, trials, race)
    if _leads:
        choice = _decide(key, names, trials, race)
        _store.set(key, json.dumps({"chosen": choice.chosen, "milliseconds": choice.milliseconds}))
        return choice
    try:
        _store.wait([key], timedelta(seconds=WAIT))
        said = _taken(json.loads(_store.get(key)), names)
        if said is not None:
            return replace(said, by="measured by the first of the processes that share it")
        reason = "it took a way that cannot be taken here"
    except (RuntimeError, ValueError) as error:  # PyTorch's own are RuntimeErrors
        reason = str(error).partition("\n")[0]
    log.warning("the choice of the first process is not known, this one chooses alone: %s", reason)
    return _decide(key, names, trials, race)


def stored() -> dict[str, dict[str, Any]]:
    """Every choice that this machine's file holds, by key."""
    path = _file()
    content = _read(path) if path else {}
    return {key: entry for key, entry in content.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    match entry:
        case {"chosen": str(), "milliseconds": dict(milliseconds), **rest}:
            doubts = rest.get("doubts", 0)  # older files have none
            return (
                isinstance(doubts, int)
                and doubts >= 0
                and all(
                    isinstance(value, (int, float)) and 0 <= value < math.inf
                    for value in milliseconds.values()
                )
            )
    return False


def forget() -> None:
    """Drops the choices of this process; those on disk stay."""
    _made.clear()
    _by_rule_alone.clear()


def discard() -> int:
    """Deletes the choices that this machine's file holds, and says how many these were."""
    count, path = len(stored()), _file()
    if path is not None:
        with storing(path):
            path.unlink(missing_ok=True)
    forget()
    return count


def _decide(key: str, names: Sequence[str], trials: Callable[[], Trials], race: Race) -> Choice:
    before = _stored(key, names)
    if before is not None and not before.open:
        return before
    with torch.no_grad():  # they write to memory of their own, which autograd does not follow
        rounds = race(trials())
    milliseconds = {name: 1e3 * min(taken) for name, taken in rounds.items()}
    doubts = 1 + (before.doubts if before else 0) if _doubtful(rounds) else 0
    return _keep(key, names, Choice(_best(rounds), milliseconds, "measured", doubts), before)


def side_by_side(
    ways: Trials, finish: Callable[[], None] = nothing
) -> tuple[dict[str, float], bool]:
    """The seconds of each way, and whether they tell which is the fastest: the rounds agree, and
    not so much else runs that threads wait for each other, as it adds to none alike.
    """
    rounds = _race(ways, finish)
    sure = not (_doubtful(rounds) or _crowded())
    return {name: min(taken) for name, taken in rounds.items()}, sure


def _crowded() -> bool:
    """Whether more wants to run than there are cores, by the mean of the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return load > CROWDED * (os.cpu_count() or 1)


def first_runs(
    ways: Trials, finish: Callable[[], None] = nothing, compiled: bool = False
) -> Iterator[str]:
    """Runs each and names those that do run, in their order; of the others there is a warning.

    Where a first run compiles, all of them begin at once.

    Raises:
        Exception: that of the first, where none runs.
    """
    failed: list[Exception] = []
    with ThreadPoolExecutor(len(ways) if compiled else 1) as pool:
        # What a thread runs, too, is not to be followed by autograd.
        begun = {n: pool.submit(torch.no_grad()(way)) for n, way in ways.items() if compiled}
        for name, way in ways.items():
            try:
                begun[name].result() if compiled else way()
                finish()
            except Exception as error:  # Triton's own are no RuntimeError
                failed.append(error)
                log.warning("%s is out, it failed with: %s", name, error)
            else:
                yield name
    if len(failed) == len(ways):
        raise failed[0]


def _race(ways: Trials, finish: Callable[[], None], compiled: bool = False) -> Rounds:
    """Several rounds in which the ways take turns, so that whatever else the machine does adds to
    all. Where they disagree there are more of them. Who is surely far behind takes no further part.
    """
    began = time.perf_counter()
    rounds: dict[str, list[float]] = {name: [] for name in first_runs(ways, finish, compiled)}
    for round_ in range(1, TIMES * ROUNDS + 1):
        for name, taken in rounds.items():
            # One round says nothing of how far it may be wrong.
            if round_ > 2 and _undisturbed(taken) > FAR_BEHIND * min(map(min, rounds.values())):
                continue
            runs, start = 0, time.perf_counter()
            while runs == 0 or time.perf_counter() - start < ENOUGH:
                ways[name]()
                runs += 1
            finish()
            taken.append((time.perf_counter() - start) / runs)
        if round_ % ROUNDS == 0 and not _doubtful(rounds):
            break
        if round_ > 1 and time.perf_counter() - began > PATIENCE:
            break
    return rounds


def _best(rounds: Rounds) -> str:
    """The way that took least in its shortest round, since what disturbs only adds."""
    least = {name: min(taken) for name, taken in rounds.items()}
    first = next(iter(least))
    best = min(least, key=lambda name: least[name])
    return best if least[best] <= MARGIN * least[first] else first


def _doubtful(rounds: Rounds) -> bool:
    """Whether undisturbed another way could clearly beat the one that is best."""
    best = _best(rounds)
    enough = MARGIN * min(rounds[best])
    return any(_undisturbed(taken) < enough for name, taken in rounds.items() if name != best)


def _undisturbed(taken: Sequence[float]) -> float:
    """What a way may take without what disturbed its rounds: as much below the shortest as the
    next ones are above it. Where disturbances come at random they are as far apart as that.
    """
    shortest = sorted(taken)[:AGREEING]
    return 2 * shortest[0] - shortest[-1]


@functools.cache
def _file() -> Path | None:
    """Where this machine's choices are kept; None without a cache folder of the user's own."""
    try:
        folder = native.cache_folder()
    except BuildError as error:
        not_kept(str(error))
        return None
    machine = "\n".join((native.processor(), torch.__version__, native.source_version()))
    return folder / f"choices-{hashlib.sha256(machine.encode()).hexdigest()[:20]}.json"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with open(path, encoding="utf-8", opener=regular) as file:
            content = json.load(file)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _taken(entry: object, names: Sequence[str]) -> Choice | None:
    """A stored choice, if it is one among these ways."""
    if not isinstance(entry, dict) or not _is_entry(entry) or entry["chosen"] not in names:
        return None
    by = "measured by an earlier process"
    return Choice(entry["chosen"], entry["milliseconds"], by, entry.get("doubts", 0))


def _stored(key: str, names: Sequence[str]) -> Choice | None:
    path = _file()
    return _taken(_read(path).get(key), names) if path else None


def _keep(key: str, names: Sequence[str], choice: Choice, before: Choice | None) -> Choice:
    """Stores a choice in the place of the one before, unless another process was first: then its
    choice holds here too.
    """
    path = _file()
    if path is None:
        return choice
    try:
        with native.alone(path.with_suffix(".lock"), LOCKED):
            content = _read(path)
            first = _taken(content.get(key), names)
            if first is not None and first != before:
                return first
            content[key] = {
                "chosen": choice.chosen,
                "milliseconds": dict(choice.milliseconds),
                "doubts": choice.doubts,
            }
            with written_aside(path) as aside:
                aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except (OSError, BuildError) as error:  # a full disk must not stop a layer
        not_kept(str(error))
    return choice


@functools.cache
def not_kept(reason: str) -> None:
    """Says once what follows."""
    log.warning(
        "choices are not kept, so another process may choose other ways, and equal seeds then "
        "differ by rounding (GATEDFFN_TUNE=off chooses by rule): %s",
        reason,
    )
