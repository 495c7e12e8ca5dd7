"""How arms are named and drawn, and how tables are written, in everything that a report has."""

from collections.abc import Sequence
from typing import Any

from gatedffn.compare.settings import LSTM
from gatedffn.plots.theme import style
from gatedffn.variants import VARIANTS

NONE = "-"


def label(arm: str) -> str:
    """An arm's name in tables and figures."""
    return "LSTM" if arm == LSTM else VARIANTS[arm].label


def line_style(arm: str) -> dict[str, Any]:
    """An arm's colour and dashes in figures."""
    if arm == LSTM:
        return {"color": "#777777", "linestyle": (0, (1, 1))}
    return style(VARIANTS[arm])


def counted(count: int, name: str) -> str:
    """A number of things: `1 layer`, `1,200 steps`."""
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    """A difference with its interval."""
    if mean is None:
        return NONE
    return f"{signed(mean)}{interval(low, high)}"


def interval(low: float | None, high: float | None) -> str:
    """What stands behind a difference: its interval, if it has one."""
    return "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"


def signed(value: float, sign: str = "+") -> str:
    """Three digits behind the point, or the first that is not 0: which side of 0 it is on shows.

    >>> signed(-0.0123), signed(-0.0004), signed(0.0)
    ('-0.012', '-0.0004', '0.000')
    """
    text = f"{value:{sign}.3f}"
    if float(text) == 0.0:
        return f"{value:{sign}.1g}" if value else "0.000"
    return text
