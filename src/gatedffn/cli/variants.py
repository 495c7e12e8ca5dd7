"""`gatedffn variants`: the table."""

import json
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer
from rich.console import Console

from gatedffn.activations import variant_named
from gatedffn.cli.named import complete_variant
from gatedffn.cli.tables import print_facts, print_table
from gatedffn.variants import VARIANTS, Variant


def variants(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A name, an alias or PATH.py:NAME: show that row in full.",
            autocompletion=complete_variant,
        ),
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
    body = [
        (row.name, row.formula, ", ".join(f"{n}={value:g}" for n, value in row.defaults.items()))
        for row in rows
    ]
    head = ("name", "hidden values", "parameters")
    print_table(Console(), head, body, "g is the gate, u the up branch")


def _show(row: Variant) -> None:
    facts = [
        ("name", row.name),
        ("label", row.label),
        ("gated", "yes" if row.gated else "no"),
        ("hidden values", row.formula),
    ]
    for parameter in row.parameters:
        kind = "learnable" if parameter.learnable else "fixed"
        words = f"{parameter.default:g} by default, {kind}: {parameter.meaning}"
        facts.append((parameter.name, words))
    facts += [("also called", ", ".join(row.aliases)), ("source", row.source)]
    print_facts(Console(), facts)
