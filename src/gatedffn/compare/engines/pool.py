"""What every pool of workers does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gatedffn.compare.settings import Run
from gatedffn.compare.store import Claim, Record

Watch = Callable[[Run, int, float | None], None]
"""Called with a run, the number of its steps done and, where there is one, its newest loss."""


@dataclass(frozen=True, slots=True)
class Done:
    """A run that is finished."""

    run: Run
    record: Record


@dataclass(frozen=True, slots=True)
class Died:
    """A run whose worker was lost."""

    run: Run
    how: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that raised an error."""

    run: Run
    error: Exception


class Pool(Protocol):
    """Workers that do runs; `gpu` says whether on GPUs, `processes` how many share one run."""

    gpu: bool
    processes: int

    @property
    def size(self) -> int:
        """How many runs it does at a time."""

    def begin(self, run: Run, claim: Claim) -> None:
        """Takes a run, when it has less than `size` of them."""

    def wait(self, seconds: float) -> list[Done | Died | Failed]:
        """What has ended; waits for the first at most so long, if it can."""

    def close(self) -> None:
        """Ends all workers at once, whatever they do."""
