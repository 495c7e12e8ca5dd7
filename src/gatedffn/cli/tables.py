"""Tables on a terminal: whole at any width, 80 columns and less included."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(
    console: Console, head: Sequence[str], body: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """A table whose cells go on in the next line where they are too wide: nothing is cut."""
    table = Table(title=None if title is None else escape(title))
    for name in head:
        table.add_column(escape(name), overflow="fold")
    for line in body:
        table.add_row(*map(escape, line))
    console.print(table)


def print_facts(
    console: Console, facts: Sequence[tuple[str, str]], title: str | None = None
) -> None:
    """Names and what is said of each, without lines between them."""
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(escape(name), escape(value))
    console.print(table)
