"""What `gatedffn compare` shows at its end: the answer, the table, and what was written."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from gatedffn.cli.tables import print_table
from gatedffn.compare import report, scales, tables
from gatedffn.compare.answer import answer, notes
from gatedffn.compare.study import Result


def show_results(
    console: Console, results: Sequence[Result], folder: Path, *, as_json: bool
) -> None:
    """Writes the reports and shows the answer, of one comparison or over several scales."""
    if len(results) == 1:
        _show_result(console, results[0], folder, as_json=as_json)
    else:
        _show_scales(console, results, folder, as_json=as_json)


def _show_result(console: Console, result: Result, folder: Path, *, as_json: bool) -> None:
    paths = report.write_report(result, folder)
    if as_json:
        typer.echo(json.dumps(report.summary_of(result), indent=2))
    else:
        console.print()
        for line in answer(result):
            console.print(f"[bold]{escape(line)}[/bold]")
        console.print()
        head, body = tables.brief(result)
        print_table(console, head, body, "held out, best first; losses in nats a token")
        published = tables.published_cells(result)
        if published:
            title = "published, in another setting (T5 on C4): for orientation only"
            print_table(console, tables.PUBLISHED_HEADERS, published, title)
        for note in notes(result):
            console.print(f"- {escape(note)}")
    _print_written(console, paths)


def _show_scales(
    console: Console, results: Sequence[Result], folder: Path, *, as_json: bool
) -> None:
    paths = scales.write_scales(results, folder)
    head, body = scales.scale_cells(results)
    if as_json:
        summaries = [report.summary_of(result) for result in results]
        table = {
            "scales": summaries,
            "differences": [dict(zip(head, b, strict=True)) for b in body],
        }
        typer.echo(json.dumps(table, indent=2))
    else:
        console.print()
        for line in scales.scale_answers(results):
            console.print(f"[bold]{escape(line)}[/bold]")
        console.print()
        print_table(console, head, body, "held-out differences in nats a token")
    _print_written(console, paths, ", and a report for each")


def _print_written(console: Console, paths: Sequence[Path], more: str = "") -> None:
    console.print(f"wrote {escape(', '.join(map(str, paths)))}{more}", soft_wrap=True)
