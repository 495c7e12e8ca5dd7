"""`gatedffn convert`: checkpoints from one layout to another."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gatedffn.cli.named import complete, complete_variant, named
from gatedffn.cli.tables import print_table
from gatedffn.errors import SettingError
from gatedffn.layouts import LAYOUTS

if TYPE_CHECKING:
    from gatedffn.interop.checkpoints.convert import Conversion


def convert(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A safetensors or PyTorch file, an index, or a folder, read as transformers would."
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Argument(
            help="A safetensors file for a file, else a folder; neither may be there before."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="The layout that is there. Default: what the header or config.json says.",
            autocompletion=complete(*LAYOUTS),
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="The layout to write.", autocompletion=complete(*LAYOUTS)),
    ] = None,
    tp: Annotated[
        int, typer.Option("--tp", help="Ranks whose parts a packed matrix holds in turn.")
    ] = 1,
    from_tp: Annotated[
        int | None, typer.Option("--from-tp", help="The same of the source, if not 1.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Where the blocks are, if elsewhere: as in 'blocks.{layer}.ffn'."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Their number, where it is in no shape and no config.json.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="What the blocks compute, where config.json says another or nothing.",
            autocompletion=complete_variant,
        ),
    ] = None,
    any_width: Annotated[
        bool,
        typer.Option(
            "--any-width",
            help="Take blocks of other widths than config.json says, as in a pruned model.",
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run every block of both; write only if they agree."),
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the layouts and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, progress on stderr.")
    ] = False,
) -> None:
    """Feed-forward blocks from one layout to another; all else passes through byte for byte.

    The target appears when it is complete. Blocks stay in their modules; only the names of their
    tensors change.

    Example: `gatedffn convert model.safetensors packed.safetensors --from llama --to phi3 --verify`
    """
    if listed:
        _list(as_json)
        return
    if source is None or target is None or to is None:
        raise SettingError("convert takes SOURCE, TARGET and --to; --list shows the layouts")
    from gatedffn.interop.checkpoints.convert import convert as run

    console = Console(stderr=as_json)
    bars = Progress(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        bar = bars.add_task("", total=None)
        done = run(
            source,
            target,
            to=to,
            layout=layout,
            tp=tp,
            from_tp=from_tp,
            at=at,
            experts=experts,
            variant=None if variant is None else named(variant),
            any_width=any_width,
            verify=verify,
            progress=lambda now, total: bars.update(bar, completed=now, total=total),
        )
    if as_json:
        typer.echo(done.to_json())
    else:
        _show(console, done)


def _show(console: Console, done: "Conversion") -> None:
    ranks = f", for {done.tp} ranks" if done.tp > 1 else ""
    blocks = "1 block" if len(done.blocks) == 1 else f"{len(done.blocks)} blocks"
    lines = [
        f"{blocks} from {done.layout_from} to {done.layout_to}{ranks}; "
        f"{done.passed} other tensors as they were",
        *done.notes,
        f"wrote {done.target}",
    ]
    if done.errors is not None:
        body = [(error.path, f"{error.largest:.2g}") for error in done.errors]
        title = "source and result on the same input"
        print_table(console, ("block", "largest error"), body, title)
        said = f"as {done.variant}" if done.variant else "nothing says which variant: as any one"
        lines.insert(1, f"verified, {said}")
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _list(as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "name": row.name,
                "used_by": row.used_by,
                "tensors": [[s.name, list(s.roles), s.axes, s.block] for s in row.stored],
                "places": list(row.places),
                "architectures": list(row.architectures),
            }
            for row in LAYOUTS.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    body = [(row.name, row.used_by) for row in LAYOUTS.values()]
    print_table(Console(), ("layout", "stored by"), body)
