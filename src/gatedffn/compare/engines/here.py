"""The pool that is this process, alone or with the other ranks of torchrun."""

import sys
from pathlib import Path
from types import TracebackType

import torch

from gatedffn.compare.engines.pool import Died, Done, Failed, Watch
from gatedffn.compare.execute import Prepared, execute
from gatedffn.compare.machine import on_gpu
from gatedffn.compare.settings import Run
from gatedffn.compare.store import Claim, Record
from gatedffn.compare.team import Team


class Here:
    """Does one run at a time; under torchrun all ranks do it, as the first one says."""

    size = 1

    def __init__(self, prepared: Prepared, watch: Watch, team: Team) -> None:
        self.prepared, self.watch, self.team = prepared, watch, team
        self.gpu, self.processes = on_gpu(), team.processes
        self.next: tuple[Run, Path] | None = None
        self.together = True

    def __enter__(self) -> "Here":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets the other ranks go, unless they are inside a run that failed here."""
        if self.together:
            self.team.share("done" if error is None else "failed")

    def begin(self, run: Run, claim: Claim) -> None:
        """Takes a run, which is done while it is waited for."""
        self.next = run, claim.place

    def wait(self, seconds: float) -> list[Done | Died | Failed]:  # noqa: ARG002
        """Does the run."""
        assert self.next is not None
        run, place = self.next
        self.team.share((run, place))
        self.together = False
        try:
            record = self._execute(run, place)
        except Exception as error:
            return [Failed(run, error)]
        self.together = True
        return [Done(run, record)]

    def follow(self) -> None:
        """Does what the first rank says, until it says that there is no more."""
        while isinstance(order := self.team.share(None), tuple):
            self._execute(*order)
        if order == "failed":
            # The first rank tells why, in one line, and waits for nobody.
            torch.distributed.destroy_process_group()
            sys.exit(2)

    def close(self) -> None:
        """Nothing is left to end: what it began is done."""

    def _execute(self, run: Run, place: Path) -> Record:
        def progress(step: int, loss: float | None) -> None:
            if self.team.first:
                self.watch(run, step, loss)

        return execute(run, self.prepared, place, progress, self.team)
