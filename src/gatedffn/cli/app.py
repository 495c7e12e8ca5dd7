"""The command's frame: its sub-commands, and how it ends on a user's mistake."""

import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.main import get_command

from gatedffn import __version__
from gatedffn.cli.bench import bench
from gatedffn.cli.compare import compare
from gatedffn.cli.convert import convert
from gatedffn.cli.doctor import doctor
from gatedffn.cli.explain import explain
from gatedffn.cli.plot import plot
from gatedffn.cli.variants import variants
from gatedffn.errors import GatedFFNError, plain

app = typer.Typer(
    name="gatedffn",
    help="The Transformer's feed-forward layer: what it computes, looks like, and which to use.",
    no_args_is_help=True,
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

_WRONG_USE: Any = typer.BadParameter.__base__  # of every mistake in how a command is typed


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gatedffn {__version__}")
        raise typer.Exit


@app.callback()
def _frame(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it and end.", callback=_tell_version, is_eager=True),
    ] = False,
) -> None:
    del version


def main() -> None:
    """Runs the command; a mistake of the user's ends it with one line and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except _WRONG_USE as error:
        words = error.format_message().replace("Value error, ", "").rstrip(".")
        _end(f"{words}; see gatedffn {_command()} --help")
    except typer.Abort:
        sys.exit(1)
    except GatedFFNError as error:
        _end(as_typed(str(error), _options()))
    sys.exit(code if isinstance(code, int) else 0)


def _end(words: str) -> None:
    """Ends with a line in which nothing of a terminal's colours is left."""
    sys.stderr.write(f"gatedffn: {plain(words)}\n")
    sys.exit(2)


def _command() -> str:
    known = {command.__name__ for command in COMMANDS}
    return next((word for word in sys.argv[1:] if word in known), "")


def _options() -> dict[str, str]:
    """The command's options by the names that the library has for them."""
    commands: Any = get_command(app)
    found = commands.commands.get(_command())
    named = {} if found is None else {p.name: p.opts for p in found.params}
    return {
        name: next(option for option in options if option.startswith("--"))
        for name, options in named.items()
        if any(option.startswith("--") for option in options)
    }


def as_typed(words: str, options: dict[str, str]) -> str:
    """A message that begins with what is wrong, with options as a user types them.

    >>> as_typed("at is 'x': it must hold {layer}", {"at": "--at"})
    "--at is 'x': it must hold {layer}"
    """
    begun = re.match(r"(\w+)((?: and \w+)*)(?= is |: )", words)
    if begun is None:
        return words
    named = [options.get(name, name) for name in begun[0].split(" and ")]
    return " and ".join(named) + words[begun.end() :]
