"""The pool of processes on this machine."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gatedffn.compare.engines.pool import Died, Done, Failed, Watch
from gatedffn.compare.engines.speed import sequences_per_second
from gatedffn.compare.execute import Prepared, execute
from gatedffn.compare.machine import on_gpu
from gatedffn.compare.settings import Run
from gatedffn.compare.store import Claim
from gatedffn.compare.team import Team
from gatedffn.errors import GatedFFNError, RunError

# glibc gives freed memory back to the system, so that every step of training waits for pages to be
# cleared: 3 to 9% of a step with one thread. Read when a process starts.
FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "33554432"}
PARTS = ("train", "selection", "held_out")


class Processes:
    """Some processes that do one run each, with their share of the threads, or a GPU of their own.

    They are started when there is something to do, and a killed one is followed by another.
    """

    processes = 1

    def __init__(self, prepared: Prepared, size: int, watch: Watch) -> None:
        self.size, self.watch, self.gpu = size, watch, on_gpu()
        self.threads = max(1, torch.get_num_threads() // size)
        self.folder = tempfile.TemporaryDirectory(prefix="gatedffn-")
        # Every worker maps these files: one copy in memory for all.
        for name in PARTS:
            np.save(Path(self.folder.name) / f"{name}.npy", getattr(prepared.tokens, name))
        none = np.empty(0, np.int32)
        tokens = replace(prepared.tokens, train=none, selection=none, held_out=none)
        self.light = replace(prepared, tokens=tokens)
        self.devices = _devices()
        self.workers: list[_Worker] = []

    def begin(self, run: Run, claim: Claim) -> None:
        """Gives a run to a worker that has none."""
        worker = next((w for w in self.workers if w.run is None), None) or self._start()
        worker.run = run
        worker.tell(("do", run, claim.place))

    def measured(self) -> float:
        """How many sequences a second all of them train together, side by side."""
        while len(self.workers) < self.size:
            self._start()
        for worker in self.workers:
            worker.ask("are you there")
        for worker in self.workers:
            worker.tell(("measure",))
        return sum(float(worker.answer()) for worker in self.workers)

    def wait(self, seconds: float) -> list[Done | Died | Failed]:
        """What the workers tell, steps apart, which go to whom it was said."""
        ended: list[Done | Died | Failed] = []
        busy = [(worker, run) for worker in self.workers if (run := worker.run) is not None]
        told = wait([worker.connection for worker, _ in busy], seconds)
        for worker, run in busy:
            if worker.connection not in told:
                continue
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self.workers.remove(worker)
                ended.append(Died(run, worker.end()))
                continue
            match message:
                case ("step", step, loss):
                    self.watch(run, step, loss)
                case ("done", record):
                    worker.run = None
                    ended.append(Done(run, record))
                case ("failed", error):
                    worker.run = None
                    ended.append(Failed(run, error))
        return ended

    def close(self) -> None:
        """Kills all of them."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.end()
        self.workers.clear()
        self.folder.cleanup()

    def _start(self) -> "_Worker":
        taken = {worker.number for worker in self.workers}
        number = next(i for i in range(self.size) if i not in taken)
        device = self.devices[number % len(self.devices)] if self.devices else None
        worker = _Worker(number, self.light, self.folder.name, self.threads, device)
        self.workers.append(worker)
        return worker


class _Worker:
    """A process and the line to it."""

    def __init__(
        self, number: int, light: Prepared, folder: str, threads: int, device: str | None
    ) -> None:
        self.number = number
        self.run: Run | None = None
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(other, light, folder, threads, device), daemon=True
        )
        for name, value in FREED_MEMORY.items():
            os.environ.setdefault(name, value)
        # Ctrl-C on a terminal goes to all: it is for the parent, which then ends its children.
        with _without_interrupts():
            self.process.start()
        other.close()

    def tell(self, message: tuple[Any, ...]) -> None:
        """Sends an order; a process that has ended will show when it is waited for."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def ask(self, what: str) -> Any:
        """Sends an order and waits for its answer."""
        self.tell((what,))
        return self.answer()

    def answer(self) -> Any:
        """The answer to an order.

        Raises:
            RunError: the process ended.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise RunError(f"a worker ended before it began: {self.end()}") from None
        if isinstance(message, tuple) and message[0] == "failed":
            raise message[1]
        return message

    def end(self) -> str:
        """Waits for its end, and says how it was."""
        self.connection.close()
        self.process.join()
        code = self.process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _devices() -> list[str]:
    """The names of this process's GPUs, as the environment gives them to another."""
    if not on_gpu():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started by the first child otherwise, and its start lets interrupts through again.
    resource_tracker.ensure_running()
    # What a process blocks its children block too, from their first instruction.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    connection: Connection, light: Prepared, folder: str, threads: int, device: str | None
) -> None:
    """What a worker does until its parent closes the line or ends."""
    if device is not None:  # before the first look at the GPUs, which would find them all
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)
    parts = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in PARTS}
    prepared = replace(light, tokens=replace(light.tokens, **parts))
    # A line that is closed means that nobody waits for the answer.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            order = connection.recv()
            try:
                answer = _obey(order, prepared, connection)
            except ConnectionError:
                raise
            except Exception as error:
                answer = ("failed", _portable(error))
            connection.send(answer)
    # A parent that was killed could not do it.
    shutil.rmtree(folder, ignore_errors=True)


def _obey(order: tuple[Any, ...], prepared: Prepared, connection: Connection) -> Any:
    match order:
        case ("do", run, place):

            def progress(step: int, loss: float | None) -> None:
                connection.send(("step", step, loss))

            return "done", execute(run, prepared, place, progress, Team())
        case ("measure",):
            return sequences_per_second(prepared)
        case _:
            return None


def _portable(error: Exception) -> Exception:
    """What can be sent to the parent: our own errors as they are, others as their traceback."""
    if isinstance(error, GatedFFNError):
        return error
    return RunError("".join(traceback.format_exception(error)))
