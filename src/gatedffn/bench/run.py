"""Measuring a workload: everyone is built and checked, then they take turns, one at a time.

Every workload has new processes: what an allocator or a compiler keeps from another one would make
its figures depend on their order.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from gatedffn.bench.check import Judge, Verdict, make_judge, make_slices
from gatedffn.bench.contestants import kind_of
from gatedffn.bench.devices import place_of
from gatedffn.bench.inputs import inputs_of
from gatedffn.bench.limits import Limit
from gatedffn.bench.messages import Message
from gatedffn.bench.outcomes import Entry, Measured, Outcome, Timing
from gatedffn.bench.process import NoAnswer, Process
from gatedffn.bench.protocol import Protocol
from gatedffn.bench.workloads import Workload

WORKER = "gatedffn.bench.worker"
LIMITS = "gatedffn.bench.limits"

PAUSE = 0.05
"""Seconds between turns, for the threads of the one before still wait by spinning: OpenMP's for 3
milliseconds, ONNX Runtime's for 30, as their processor time showed. They are left to, since a pool
that sleeps at once would be slower than what users run."""


class Participant:
    """A contestant in a measurement: its process while it has one, and what came of it so far."""

    def __init__(self, name: str, place: str, workload: Workload) -> None:
        kind = kind_of(place)
        self.reason = kind.refusal(workload)
        self.entry = Entry(
            contestant=name,
            label=kind.label,
            version=kind.version(),
            tolerance=kind.tolerance(workload),
            yardstick=kind.yardstick,
            declined=self.reason is not None,
        )
        self.place = place
        self.alone = kind.alone(workload)
        self.process: Process | None = None
        self.verdict: Verdict | None = None
        self.ways: dict[str, str] = {}
        self.timings: list[Timing] = []

    def start(self, folder: Path, threads: int) -> None:
        """Starts its process, unless it has refused the workload."""
        if self.reason is None:
            errors = folder / f"{self.entry.contestant}.stderr"
            self.process = Process([WORKER, self.place], errors, threads)

    def build(self, message: Message) -> None:
        """Lets its process begin with building."""
        if self.process is not None:
            self.process.send(message)

    def check(self, judge: Judge, patience: float) -> None:
        """Waits until it is built; without right results it is out."""
        if self.process is None:
            return
        try:
            answer = self.process.receive(patience)
            self.ways = answer["ways"]
            if not self.entry.yardstick:
                self._hold_to(judge, answer)
        except (NoAnswer, ValueError) as error:
            self._leave(error)

    def _hold_to(self, judge: Judge, answer: Message) -> None:
        with np.load(answer["results"], allow_pickle=False) as arrays:
            results = {key: torch.from_numpy(arrays[key]) for key in arrays}
        self.verdict = judge.verdict(results)
        excess = self.verdict.ratio / self.entry.tolerance
        if not excess <= 1.0:
            raise ValueError(
                f"wrong: the error of its {self.verdict.name} is {excess:.3g} times what is allowed"
            )
        if not answer["finite"]:
            raise ValueError("wrong: its results hold infinities or NaNs")

    def take_turn(self, protocol: Protocol) -> None:
        """Times its steps; when it fails it is out."""
        if self.process is None:
            return
        time.sleep(PAUSE)
        message = {"seconds": protocol.turn, "fewest": protocol.fewest, "most": protocol.most}
        try:
            times = self.process.ask(message, protocol.patience)["times"]
        except NoAnswer as error:
            self._leave(error)
        else:
            self.timings.append(Timing(statistics.median(times), len(times)))

    def _leave(self, error: Exception) -> None:
        self.reason = str(error)
        self.close()

    def close(self) -> None:
        """Ends its process, if it has one."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def outcome(self) -> Outcome:
        """What came of it."""
        return Outcome(
            entry=self.entry,
            timings=tuple(self.timings),
            reason=self.reason,
            verdict=self.verdict,
            ways=self.ways,
        )


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
    message: Message = {"workload": asdict(workload), "threads": threads, "folder": str(folder)}
    participants = [Participant(name, place, workload) for name, place in contestants.items()]
    with ExitStack() as stack:
        for participant in participants:
            participant.start(folder, threads)
            stack.callback(participant.close)
        limits = Process([LIMITS], folder / "limits.stderr", threads)
        stack.callback(limits.close)
        limits.send(message)
        for participant in participants:
            if not participant.alone:
                participant.build(message)
        step("drawing the numbers")
        judge = make_judge(workload, inputs_of(workload), make_slices(workload))
        place_of(workload.device).release()
        limits.receive(protocol.patience)
        for participant in sorted(participants, key=lambda participant: participant.alone):
            step(f"building and checking {participant.entry.label}")
            if participant.alone:
                participant.build(message)
            participant.check(judge, protocol.patience)
        del judge
        found = _rounds(participants, limits, protocol, step)
    outcomes = tuple(participant.outcome() for participant in participants)
    return Measured(workload=workload, outcomes=outcomes, limits=found)


def steps(contestants: int, protocol: Protocol) -> int:
    """How often `measure` calls `step`."""
    return 1 + contestants + protocol.rounds * (contestants + 1)


def _rounds(
    participants: Sequence[Participant],
    limits: Process,
    protocol: Protocol,
    step: Callable[[str], None],
) -> tuple[Limit, ...]:
    by_name = {participant.entry.contestant: participant for participant in participants}
    found = []
    for number, order in enumerate(turns([*by_name, LIMITS], protocol.rounds), 1):
        for name in order:
            words = "limits" if name == LIMITS else by_name[name].entry.label
            step(f"round {number} of {protocol.rounds}: {words}")
            if name == LIMITS:
                time.sleep(PAUSE)
                found.append(Limit(**limits.ask({}, protocol.patience)))
            else:
                by_name[name].take_turn(protocol)
    return tuple(found)
