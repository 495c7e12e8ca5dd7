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
from gatedffn.layouts import LAYOUTS, Layout

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
    listed: Annotated[
        bool,
        typer.Option("--list", help="List the layouts, those with the WORD behind it, and end."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, progress on stderr.")
    ] = False,
) -> None:
    """Feed-forward blocks from one layout to another; all else passes through byte for byte.

    SOURCE alone is looked at: its blocks, the layouts that they fit, whether the order is provable.
    The target appears when it is complete. Blocks stay in their modules; only the names of their
    tensors change.

    Example: `gatedffn convert model.safetensors packed.safetensors --from llama --to phi3 --verify`
    """
    if listed:
        _list("" if source is None else str(source), as_json)
        return
    if source is not None and target is None and to is None:
        _look(source, layout, at, as_json)
        return
    if source is None or target is None or to is None:
        raise SettingError(
            "convert takes SOURCE, TARGET and --to; SOURCE alone shows what it holds, and --list "
            "the layouts"
        )
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


def _look(source: Path, layout: str | None, at: str | None, as_json: bool) -> None:
    from gatedffn.interop.checkpoints.look import look

    found = look(source, layout, at=at)
    if as_json:
        typer.echo(found.to_json())
        return
    console = Console()
    body = [
        (
            fit.layout,
            f"{fit.blocks} of {fit.sizes}" + (f", {fit.variant}" if fit.variant else ""),
            "\n".join(fit.held),
        )
        for fit in found.fits
    ]
    title = f"{found.path}: {found.tensors} tensors"
    print_table(console, ("layout", "blocks", "tensors of one"), body, title)
    where = dict.fromkeys(
        fit.first if fit.blocks == 1 else f"{fit.first} to {fit.last}" for fit in found.fits
    )
    for line in (f"blocks: {'; '.join(where)}", *found.notes, f"{found.why}."):
        console.print(escape(line), soft_wrap=True)


def _has(row: Layout, word: str) -> bool:
    return any(word.casefold() in s.casefold() for s in (row.name, row.used_by, *row.architectures))


def _list(word: str, as_json: bool) -> None:
    rows = [row for row in LAYOUTS.values() if _has(row, word)]
    if not rows:
        raise SettingError(f"no layout has {word!r} in its name or among who stores so")
    if as_json:
        listed = [
            {
                "name": row.name,
                "used_by": row.used_by,
                "tensors": [[s.name, list(s.roles), s.axes, s.block] for s in row.stored],
                "places": list(row.places),
                "architectures": list(row.architectures),
            }
            for row in rows
        ]
        typer.echo(json.dumps(listed, indent=2))
        return
    body = [(row.name, row.used_by) for row in rows]
    print_table(Console(), ("layout", "stored by"), body)
