"""A process that takes turns, seen from the outside: started, asked, and ended in every case."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gatedffn.bench.messages import Message
from gatedffn.errors import GatedFFNError


class NoAnswer(GatedFFNError):
    """A process that failed; the text is why."""


class Process:
    """A module of this package that answers messages, in a process of its own.

    Args:
        arguments: the module and what its command line gets.
        errors: the file that its stderr goes to.
        threads: how many threads it may use.
    """

    def __init__(self, arguments: Sequence[str], errors: Path, threads: int) -> None:
        self.errors = errors
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | _surroundings(threads),
                text=True,
                encoding="utf-8",
            )
        self.answers: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        self.listener = threading.Thread(
            target=self._listen, args=(self.process.stdout,), daemon=True
        )
        self.listener.start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.answers.put(line)
        self.answers.put("")

    def ask(self, message: Message, seconds: float) -> Message:
        """Its answer; raises as `receive`."""
        self.send(message)
        return self.receive(seconds)

    def send(self, message: Message) -> None:
        """Lets it begin with something; a process that has ended will say so in `receive`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> Message:
        """Its next answer.

        Raises:
            NoAnswer: it failed, ended, or took longer than `seconds`.
        """
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise NoAnswer(f"gave no answer in {seconds:.0f} seconds") from None
        if not line:
            raise NoAnswer(f"its process {ended(self.process.wait())}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise NoAnswer(" ".join(answer["error"].split())[:300])
        assert isinstance(answer, dict)
        return answer

    def _last_words(self) -> str:
        lines = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def close(self) -> None:
        """Ends it, and waits until its memory is free for the others."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.listener.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def ended(code: int) -> str:
    """A return code in words; a negative one is a signal, such as that of a bad address."""
    names = {-number: number.name for number in signal.Signals}
    return f"was ended by {names[code]}" if code in names else f"ended with {code}"


def _surroundings(threads: int) -> dict[str, str]:
    """What tells every framework how many threads to use; NPROC is what JAX reads.

    glibc is told to keep memory that was freed: whether a step finds fresh pages, which cost more
    than its arithmetic, would otherwise depend on where the process's heap happens to end.
    """
    count = str(threads)
    return {
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that it takes
        "OMP_NUM_THREADS": count,
        "NPROC": count,
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
