"""Measuring a workload: everyone is built and checked, then they take turns, one at a time.

Every workload has new processes: what an allocator or a compiler keeps from another one would make
its figures depend on their order.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from gatedffn.bench.check import Judge, Verdict, make_judge, make_slices
from gatedffn.bench.contestants import Contestant
from gatedffn.bench.devices import place_of
from gatedffn.bench.inputs import inputs_of
from gatedffn.bench.limits import Limit
from gatedffn.bench.process import NoAnswer, Process
from gatedffn.bench.protocol import Message
from gatedffn.bench.workloads import Workload

WORKER = "gatedffn.bench.worker"
LIMITS = "gatedffn.bench.limits"

PAUSE = 0.05
"""Seconds between turns, for the threads of the one before still wait by spinning: OpenMP's for 3
milliseconds, ONNX Runtime's for 30, as their processor time showed. They are left to, since a pool
that sleeps at once would be slower than what users run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How a workload is measured: so many rounds, in each of which everyone has one turn.

    A turn has as many steps as fit into `turn` seconds, but at least `fewest` and at most `most`.
    Whoever gives no answer for `patience` seconds is out.
    """

    rounds: int = 7
    turn: float = 0.4
    fewest: int = 3
    most: int = 200
    patience: float = 600.0

    def of(self, workload: Workload) -> "Protocol":
        """For a workload: steps of the largest take so long that two rounds are enough."""
        return replace(self, rounds=min(self.rounds, 2), fewest=2) if workload.large else self


QUICK_PROTOCOL = Protocol(rounds=5, turn=0.2)
GPU_PROTOCOL = Protocol(rounds=5, turn=0.15, patience=180.0)
GPU_QUICK_PROTOCOL = Protocol(rounds=3, turn=0.1, patience=180.0)
"""A GPU's steps are short, and its clock is steadier."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one contestant; `reason` says why there are no times, where there are none."""

    contestant: str
    label: str
    version: str | None
    tolerance: float = 1.0
    reason: str | None = None
    refused: bool = False
    yardstick: bool = False
    ways: dict[str, str] = field(default_factory=dict)
    """By which way this library computed each stage, on a GPU."""
    verdict: Verdict | None = None
    rounds: list[float] = field(default_factory=list)
    """The median of each turn, in seconds."""
    repetitions: list[int] = field(default_factory=list)
    """How many steps that was the median of."""

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


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Who comes when: everyone once a round, and each round begins with the next one.

    >>> turns(["a", "b", "c"], 2)
    [['a', 'b', 'c'], ['b', 'c', 'a']]
    """
    shifts = [number % max(len(names), 1) for number in range(rounds)]
    return [[*names[shift:], *names[:shift]] for shift in shifts]


def measure(
    workload: Workload,
    contestants: Mapping[str, str],
    protocol: Protocol,
    folder: Path,
    step: Callable[[str], None],
) -> Measured:
    """Measures one workload.

    Args:
        workload: what is computed.
        contestants: names, each with a module and class.
        protocol: how often and how long.
        folder: for what the processes write; the caller removes it.
        step: called before each of `steps(...)` parts of the work with words for it.
    """
    threads = torch.get_num_threads()
    processes: dict[str, Process] = {}
    outcomes: dict[str, Outcome] = {}
    alone = set()
    try:
        for name, place in contestants.items():
            module, _, attribute = place.partition(":")
            kind = getattr(import_module(module), attribute)
            outcomes[name] = outcome = _outcome(name, kind, workload)
            if kind.alone(workload):
                alone.add(name)
            if outcome.reason is None:
                errors = folder / f"{name}.stderr"
                processes[name] = Process([WORKER, place], errors, threads)
        processes[LIMITS] = Process([LIMITS], folder / "limits.stderr", threads)
        start: Message = {"workload": asdict(workload), "threads": threads, "folder": str(folder)}
        for name in processes.keys() - alone:
            processes[name].send(start)
        step("drawing the numbers")
        judge = make_judge(workload, inputs_of(workload), make_slices(workload))
        place_of(workload.device).release()
        processes[LIMITS].receive(protocol.patience)
        for name in sorted(outcomes, key=lambda name: name in alone):
            step(f"building and checking {outcomes[name].label}")
            if name in processes:
                if name in alone:
                    processes[name].send(start)
                _check(processes, outcomes[name], judge, protocol)
        del judge
        limits = _rounds(processes, outcomes, protocol, step)
    finally:
        for process in processes.values():
            process.close()
    return Measured(workload=workload, outcomes=tuple(outcomes.values()), limits=limits)


def steps(contestants: int, protocol: Protocol) -> int:
    """How often `measure` calls `step`."""
    return 1 + contestants + protocol.rounds * (contestants + 1)


def _outcome(name: str, kind: type[Contestant], workload: Workload) -> Outcome:
    reason = kind.refusal(workload)
    return Outcome(
        contestant=name,
        label=kind.label,
        version=kind.version(),
        tolerance=kind.tolerance(workload),
        reason=reason,
        refused=reason is not None,
        yardstick=kind.yardstick,
    )


def _check(
    processes: dict[str, Process], outcome: Outcome, judge: Judge, protocol: Protocol
) -> None:
    name = outcome.contestant
    try:
        answer = processes[name].receive(protocol.patience)
        outcome.ways = answer["ways"]
        if outcome.yardstick:
            return
        with np.load(answer["results"], allow_pickle=False) as arrays:
            results = {key: torch.from_numpy(arrays[key]) for key in arrays}
        outcome.verdict = verdict = judge.verdict(results)
        excess = verdict.ratio / outcome.tolerance
        if not excess <= 1.0:
            raise NoAnswer(
                f"wrong: the error of its {verdict.name} is {excess:.3g} times what is allowed"
            )
        if not answer["finite"]:
            raise NoAnswer("wrong: its results hold infinities or NaNs")
    except (NoAnswer, ValueError) as error:
        outcome.reason = str(error)
        processes.pop(name).close()


def _rounds(
    processes: dict[str, Process],
    outcomes: Mapping[str, Outcome],
    protocol: Protocol,
    step: Callable[[str], None],
) -> tuple[Limit, ...]:
    limits = []
    for number, order in enumerate(turns([*outcomes, LIMITS], protocol.rounds)):
        for name in order:
            words = "limits" if name == LIMITS else outcomes[name].label
            step(f"round {number + 1} of {protocol.rounds}: {words}")
            if name not in processes:
                continue
            time.sleep(PAUSE)
            if name == LIMITS:
                limits.append(Limit(**processes[name].ask({}, protocol.patience)))
            else:
                _take_turn(processes, outcomes[name], protocol)
    return tuple(limits)


def _take_turn(processes: dict[str, Process], outcome: Outcome, protocol: Protocol) -> None:
    message = {"seconds": protocol.turn, "fewest": protocol.fewest, "most": protocol.most}
    try:
        times = processes[outcome.contestant].ask(message, protocol.patience)["times"]
    except NoAnswer as error:
        outcome.reason = str(error)
        processes.pop(outcome.contestant).close()
        return
    outcome.rounds.append(statistics.median(times))
    outcome.repetitions.append(len(times))
