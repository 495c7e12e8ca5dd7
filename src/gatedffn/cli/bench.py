"""`gatedffn bench`: how fast the layer is here, against whom, and how near to the limit."""

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gatedffn.errors import MissingExtra, SettingError

if TYPE_CHECKING:
    from gatedffn.bench.memory import Memory
    from gatedffn.bench.outcomes import Measured
    from gatedffn.bench.protocol import Protocol
    from gatedffn.bench.workloads import Workload

NEEDED = ("numpy", "matplotlib", "psutil")
BUSY = 0.1
"""From that part of the processor on, others disturb the measurement."""


def bench(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            "--workloads",
            help="Only the workloads with this in their names, such as training, bfloat16 or "
            "512x768x2048; repeat for more. Default: all of the device's.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="Which workloads there are: main, or experts (mixtures of experts); on the "
            "processor also small (64 small layers) and gating (gating alone), on a GPU decoder "
            "(a language model of 1.1 billion parameters)."
        ),
    ] = "main",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Fewer rounds, of main and experts some workloads; of main two minutes.",
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, or cuda: the current GPU, with workloads and peers of its own. "
            "CUDA_VISIBLE_DEVICES says which it is where there are several."
        ),
    ] = "cpu",
    contestants: Annotated[
        str | None,
        typer.Option(
            help="Who is measured, as in gatedffn,eager,jax. Default: gatedffn, eager, compile, "
            "onnxruntime, openvino and jax, as far as they are installed; on a GPU gatedffn, "
            "eager, compile, liger, quack and products, the matrix products alone. On request "
            "gatedffn-compile too: this library under torch.compile. Of experts gatedffn, and "
            "transformers' eager, grouped_mm, batched_mm and compile."
        ),
    ] = None,
    variant: Annotated[str, typer.Option(help="The feed-forward that is measured.")] = "swiglu",
    tokens: Annotated[
        int | None, typer.Option(help="A workload of your own: this many tokens.")
    ] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of your own workload.")] = None,
    d_hidden: Annotated[
        int | None,
        typer.Option(help="Its hidden width. Default: the one at equal parameters."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Its dtype: float32 (default), bfloat16 or float16."),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="It is a training step: forward and backward.")
    ] = False,
    patience: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Seconds after which who gives no answer is out. Default: 600, on a GPU 180.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write into; made if it is missing.")
    ] = Path("gatedffn-bench"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the records as JSON, progress on stderr.")
    ] = False,
) -> None:
    """How fast is it here? Side by side with PyTorch, torch.compile and the peers you have.

    Everyone runs in a process of its own and takes turns with the others; the machine's limits are
    measured in the same rounds. Whoever computes something else gets no figure.

    Example: `gatedffn bench --quick`, or `gatedffn bench --tokens 8 --d-model 4096 --training`
    """
    _need_extra("bench-gpu" if device == "cuda" else "bench")
    from gatedffn.bench.contestants import OWN, find
    from gatedffn.bench.devices import check_device
    from gatedffn.bench.figures import summaries
    from gatedffn.bench.protocol import get_protocol
    from gatedffn.bench.workloads import choose, get_device, own_workload

    where = get_device(device)
    check_device(where)
    if tokens is None and d_model is None:
        if d_hidden is not None or dtype is not None or training:
            raise SettingError(
                "--d-hidden, --dtype and --training describe a workload of your own: give --tokens "
                "and --d-model too, or choose workloads of the table with --workload"
            )
        workloads = choose(workload or (), variant, quick=quick, device=where, suite=suite)
    elif tokens is None or d_model is None or workload or suite != "main":
        raise SettingError(
            "a workload of your own takes --tokens and --d-model, and no --workload or --suite"
        )
    else:
        workloads = (
            own_workload(
                tokens=tokens,
                d_model=d_model,
                d_hidden=d_hidden,
                dtype=dtype or "float32",
                training=training,
                variant=variant,
                device=where,
            ),
        )
    names = tuple(name.strip() for name in (contestants or "").split(",") if name.strip())
    chosen = find(names, where)
    console = Console(stderr=as_json)
    if where == "cpu" and torch.cuda.is_available():
        console.print("this is the processor's; --device cuda measures the GPU of this machine")
    protocol = get_protocol(where, quick=quick)
    if patience is not None:
        protocol = replace(protocol, patience=patience)
    run = _Run(console, workloads, chosen, protocol, out, memory=suite == "main")
    try:
        run.measure()
    except KeyboardInterrupt:
        console.print(f"stopped; finished workloads are in {escape(str(out))}", soft_wrap=True)
        raise typer.Exit(130) from None
    files = run.finish()
    if as_json:
        summary = [asdict(summary) for summary in summaries(run.done)]
        found = {"records": run.records, "summary": summary, "files": files}
        typer.echo(json.dumps(found, indent=2))
    else:
        console.print("wrote " + escape(", ".join(files)), soft_wrap=True)
    wrong = [o for m in run.done for o in m.outcomes if o.entry.contestant in OWN and o.reason]
    if wrong:
        console.print(f"[bold]gatedffn has no figure in {len(wrong)} workloads[/bold]")
    if wrong or run.failed:
        raise typer.Exit(1)


def _need_extra(extra: str) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"bench needs {', '.join(missing)}; this installs it: pip install 'gatedffn[{extra}]'"
        )


def _gpu(workloads: "Iterable[Workload]") -> dict[str, Any]:
    """The card of the GPU where one is measured."""
    from gatedffn.bench.devices import cuda

    return (
        {"gpu": cuda().card()} if any(workload.device == "cuda" for workload in workloads) else {}
    )


class _Run:
    """One call of the command: measures each workload, then shows and keeps it."""

    def __init__(
        self,
        console: Console,
        workloads: "Sequence[Workload]",
        contestants: dict[str, str],
        protocol: "Protocol",
        folder: Path,
        *,
        memory: bool,
    ) -> None:
        from gatedffn.bench.contestants import for_workload

        self.console, self.folder, self.memory = console, folder, memory
        self.protocol = protocol
        self.workloads = {
            workload: taking_part
            for workload in workloads
            if (taking_part := for_workload(contestants, workload))
        }
        if not self.workloads:
            raise SettingError(f"no workload measures {', '.join(contestants)}")
        self.done: list[Measured] = []
        self.failed = 0
        self.records: list[dict[str, Any]] = []

    def measure(self) -> None:
        from gatedffn.bench.memory import modes
        from gatedffn.bench.process import NoAnswer
        from gatedffn.bench.records import add, fault_record, memory_record, time_records
        from gatedffn.bench.report import title
        from gatedffn.bench.run import measure, steps
        from gatedffn.machine import busy, card

        others = busy()
        if others > BUSY:
            self.console.print(
                f"others use {others:.0%} of this machine: figures will be off", style="bold"
            )
        surroundings = {
            "run": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": card() | _gpu(self.workloads),
            "busy": others,
        }
        add(self.folder, [])  # a folder that cannot be written is told before the work
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        total = sum(
            steps(len(taking_part), self.protocol.of(workload))
            for workload, taking_part in self.workloads.items()
        )
        total += sum(len(modes(w)) for w in self.workloads if self._has_memory(w))
        with bars, tempfile.TemporaryDirectory() as temporary:
            bar = bars.add_task("starting", total=total)
            for number, (workload, taking_part) in enumerate(self.workloads.items(), 1):
                where = f"workload {number} of {len(self.workloads)}"

                def step(words: str, where: str = where) -> None:
                    bars.update(bar, advance=1, description=f"{where}, {words}")

                protocol = self.protocol.of(workload)
                try:
                    done = measure(workload, taking_part, protocol, Path(temporary), step)
                except (NoAnswer, RuntimeError) as error:  # the limits failed, or memory is short
                    self.failed += 1
                    words = f"{title(workload)} could not be measured: {error}"
                    self.console.print(escape(words), style="bold", soft_wrap=True)
                    self._keep([fault_record(workload, error, surroundings)])
                    continue
                self.done.append(done)
                self._keep(time_records(done, protocol, surroundings))
                self._show(done)
                if self._has_memory(workload):
                    found = self._memory(workload, Path(temporary), step)
                    self._keep([memory_record(workload, each, surroundings) for each in found])

    def _keep(self, records: list[dict[str, Any]]) -> None:
        from gatedffn.bench.records import add

        add(self.folder, records)
        self.records += records

    def _has_memory(self, workload: "Workload") -> bool:
        return self.memory and workload.training and workload.part == "layer"

    def _memory(self, workload: "Workload", temporary: Path, step: Any) -> "list[Memory | str]":
        from gatedffn.bench.memory import measure_memory
        from gatedffn.bench.report import MEMORY_HEADERS, memory_cells

        found = []
        for memory in measure_memory(workload, temporary, self.protocol.patience):
            step("memory of a training step")
            found.append(memory)
        self._print(
            "memory beyond weights, inputs and gradients", MEMORY_HEADERS, memory_cells(found)
        )
        return found

    def finish(self) -> list[str]:
        """Shows the summary and draws the picture; returns the paths of all files."""
        from gatedffn.bench.figures import summaries
        from gatedffn.bench.records import FILE
        from gatedffn.bench.report import SUMMARY_HEADERS, draw, summary_cells

        if len(self.done) > 1 and (found := summaries(self.done)):
            self._print("speed over all workloads", SUMMARY_HEADERS, summary_cells(found))
        drawn = draw(self.done, self.folder / "bench") if self.done else []
        return [str(self.folder / FILE), *map(str, drawn)]

    def _show(self, measured: "Measured") -> None:
        from gatedffn.bench.report import cells, headers, limit_words, title, ways_words

        name = f"{title(measured.workload)}\n{limit_words(measured)}"
        self._print(name, headers(measured), cells(measured))
        if words := ways_words(measured):
            self.console.print(escape(f"gatedffn computed it so: {words}"), soft_wrap=True)

    def _print(self, name: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        table = Table(*head, title=name)
        for line in body:
            table.add_row(*map(escape, line))
        # A pipe or a narrow log has no width of its own; a table cut at 80 columns is no table.
        console = self.console
        wide = console if console.is_terminal else Console(file=console.file, width=160)
        wide.print(table)
