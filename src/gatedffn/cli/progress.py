"""The table that a comparison shows while it runs."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from gatedffn.compare.settings import Run, Setting


class LiveTable:
    """A live table on a terminal, one line a finished run elsewhere."""

    def __init__(self, console: Console, setting: "Setting") -> None:
        self.console, self.setting = console, setting
        self.losses: dict[str, list[float | None]] = {arm: [] for arm in setting.variants}
        self.current: Run | None = None
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        total = setting.runs * setting.steps
        self.all_bar = self.bars.add_task("all runs", total=total, unit="steps")
        self.run_bar = self.bars.add_task("this run", total=setting.steps, unit="steps")
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

    def begin(self, run: "Run") -> None:
        """A run starts."""
        self.current = run
        self.bars.reset(self.run_bar, total=self.setting.steps)

    def step(self, step: int, loss: float | None) -> None:
        """A step of it is done."""
        words = "this run" if loss is None else f"this run, loss {loss:.3f}"
        self.bars.update(self.run_bar, completed=step, description=words)
        self.bars.advance(self.all_bar)

    def finish(self, record: dict[str, Any], *, reused: bool) -> None:
        """A run is done, now or by an earlier command."""
        run, loss = record["run"], record["result"]["held_out"]
        self.current = None
        self.losses[run["variant"]].append(None if record["result"]["diverged"] else loss)
        if reused:
            done = self.bars.tasks[self.all_bar].total
            self.bars.update(self.all_bar, total=(done or 0) - self.setting.steps)
        if not self.console.is_interactive:
            count = sum(map(len, self.losses.values()))
            words = "diverged" if record["result"]["diverged"] else f"held-out loss {loss:.4f}"
            kept = ", kept from before" if reused else ""
            self.console.print(
                f"run {count} of {self.setting.runs}: {run['variant']}, seed {run['seed']}, "
                f"learning rate {run['learning_rate']:g}: {words}{kept}",
                soft_wrap=True,
            )

    def _render(self) -> Group:
        table = Table("variant", "runs done", "held-out loss of each", "now")
        for arm, losses in self.losses.items():
            shown = ", ".join("diverged" if loss is None else f"{loss:.3f}" for loss in losses)
            now = ""
            if self.current is not None and self.current.variant == arm:
                now = f"seed {self.current.seed}, rate {self.current.learning_rate:g}"
            table.add_row(arm, str(len(losses)), shown, now)
        return Group(table, self.bars)
