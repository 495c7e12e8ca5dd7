"""The table that a comparison shows while it runs."""

from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from gatedffn.compare.look import label

if TYPE_CHECKING:
    from gatedffn.compare.settings import Run, Setting


BARS = 8
"""The most bars of single runs; the table names all of them."""


class LiveTable:
    """A live table on a terminal, one line a finished run elsewhere."""

    def __init__(self, console: Console, setting: "Setting") -> None:
        self.console, self.setting = console, setting
        self.losses: dict[str, list[float | None]] = {arm: [] for arm in setting.variants}
        self.runs = 0
        self.running: dict[Run, TaskID] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self.all_bar = self.bars.add_task("all runs", total=0, unit="steps")
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "LiveTable":
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_interactive:
            self.live.stop()

    def plan(self, runs: int) -> None:
        """So many runs it takes in all; said again when there are more."""
        self._add((runs - self.runs) * self.setting.steps)
        self.runs = runs

    def begin(self, run: "Run") -> None:
        """A run starts."""
        self.running[run] = self.bars.add_task(
            label(run.variant),
            total=self.setting.steps,
            unit="steps",
            visible=len(self.running) < BARS,
        )

    def step(self, run: "Run", step: int, loss: float | None) -> None:
        """A step of it is done."""
        words = f"{label(run.variant)}, seed {run.seed}" + (
            "" if loss is None else f", loss {loss:.3f}"
        )
        self._reach(self.running[run], step)
        self.bars.update(self.running[run], description=words)

    def finish(self, record: dict[str, Any], *, reused: bool) -> None:
        """A run is done, by this command or by another."""
        facts, loss = record["run"], record["result"]["held_out"]
        self.losses[facts["variant"]].append(None if record["result"]["diverged"] else loss)
        for run, bar in list(self.running.items()):
            if asdict(run) == facts:
                self._reach(bar, self.setting.steps)
                self.bars.remove_task(bar)
                del self.running[run]
        if reused:
            self._add(-self.setting.steps)
        if not self.console.is_interactive:
            count = sum(map(len, self.losses.values()))
            words = "diverged" if record["result"]["diverged"] else f"held-out loss {loss:.4f}"
            kept = ", found in the folder" if reused else ""
            self.console.print(
                f"run {count} of {self.runs}: {label(facts['variant'])}, seed {facts['seed']}, "
                f"learning rate {facts['learning_rate']:g}: {words}{kept}",
                soft_wrap=True,
            )

    def note(self, words: str) -> None:
        """Something happened that one wants to know."""
        self.console.print(escape(words), soft_wrap=True)

    def _reach(self, bar: TaskID, step: int) -> None:
        """Moves a run's bar, which may go back to a checkpoint, and with it the one of all."""
        self.bars.advance(self.all_bar, step - self._task(bar).completed)
        self.bars.update(bar, completed=step)

    def _add(self, steps: int) -> None:
        self.bars.update(self.all_bar, total=(self._task(self.all_bar).total or 0) + steps)

    def _task(self, bar: TaskID) -> Task:
        return self.bars.tasks[self.bars.task_ids.index(bar)]

    def _render(self) -> Group:
        table = Table("variant", "runs done", "held-out loss of each", "now")
        for arm, losses in self.losses.items():
            shown = ", ".join("diverged" if loss is None else f"{loss:.3f}" for loss in losses)
            now = "; ".join(
                f"seed {run.seed}, rate {run.learning_rate:g}"
                for run in self.running
                if run.variant == arm
            )
            table.add_row(label(arm), str(len(losses)), shown, now)
        return Group(table, self.bars)
