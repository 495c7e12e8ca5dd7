"""`gatedffn variants`: the table."""

import json
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gatedffn.activations import variant_named
from gatedffn.variants import VARIANTS, Variant


def variants(
    name: Annotated[
        str | None, typer.Argument(help="A name, an alias or PATH.py:NAME: show that row in full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The table of variants: names, formulas, parameters, sources.

    Example: `gatedffn variants swiglu`
    """
    rows = [variant_named(name)] if name is not None else list(VARIANTS.values())
    if as_json:
        typer.echo(json.dumps([_record(row) for row in rows], indent=2, ensure_ascii=False))
    elif name is not None:
        _show(rows[0])
    else:
        _list(rows)


def _record(row: Variant) -> dict[str, Any]:
    facts = {field.name: getattr(row, field.name) for field in fields(Variant)}
    return {
        **facts,
        "parameters": [asdict(parameter) for parameter in row.parameters],
        "gated": row.gated,
    }


def _list(rows: list[Variant]) -> None:
    table = Table("name", "hidden values", "parameters", title="g is the gate, u the up branch")
    for row in rows:
        parameters = ", ".join(f"{name}={value:g}" for name, value in row.defaults.items())
        table.add_row(row.name, row.formula, parameters)
    Console().print(table)


def _show(row: Variant) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("name", row.name)
    table.add_row("label", row.label)
    table.add_row("gated", "yes" if row.gated else "no")
    table.add_row("hidden values", row.formula)
    for parameter in row.parameters:
        kind = "learnable" if parameter.learnable else "fixed"
        words = f"{parameter.default:g} by default, {kind}: {parameter.meaning}"
        table.add_row(parameter.name, words)
    table.add_row("also called", ", ".join(row.aliases))
    table.add_row("source", row.source)
    Console().print(table)
