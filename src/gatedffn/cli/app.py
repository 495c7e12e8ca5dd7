"""The command's frame: its sub-commands, and how it ends on a user's mistake."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from gatedffn.cli.bench import bench
from gatedffn.cli.compare import compare
from gatedffn.cli.convert import convert
from gatedffn.cli.doctor import doctor
from gatedffn.cli.explain import explain
from gatedffn.cli.plot import plot
from gatedffn.cli.variants import variants
from gatedffn.errors import GatedFFNError

app = typer.Typer(
    name="gatedffn",
    help="The Transformer's feed-forward layer: what it computes, looks like, and which to use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

COMMANDS: tuple[Callable[..., Any], ...] = (
    variants,
    plot,
    compare,
    bench,
    convert,
    doctor,
    explain,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Runs the command; a mistake of the user's ends it with one line and exit code 2."""
    try:
        app()
    except GatedFFNError as error:
        sys.stderr.write(f"gatedffn: {error}\n")
        sys.exit(2)
