"""Where the first derivative of every row vanishes: a figure with its table."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gatedffn.plots import theme
from gatedffn.plots.vanishing import (
    QUESTIONS,
    Kind,
    Question,
    Stretch,
    Vanishing,
    rows_of,
    vanishing,
)

_LOW, _HIGH = -6.0, 16.0
_TITLES: dict[Question, tuple[str, str, str]] = {
    "activation": ("Activations: where df/dx = 0", "input x", "x"),
    "by gate": ("Gated, by the gate: where dh/dg = 0 for every up", "gate g", "g"),
    "gate = up": ("Gated, gate = up = x: where dh/dx = 0", "gate = up = x", "x"),
}
_MARKERS: dict[Kind, str] = {"minimum": "v", "maximum": "^", "inflection": "D"}


def zeros() -> Figure:
    """Where each derivative vanishes, for every row of the table, with default parameters.

    A triangle is a minimum or a maximum, a bar a stretch without slope, an open arrow at an edge a
    derivative that tends to 0 on that side. The text beside each line says it in numbers.
    """
    heights = [len(rows_of(question)) + 2.5 for question in QUESTIONS]
    with theme.figure(13.0, 0.27 * sum(heights)) as figure:
        axes = figure.subplots(len(QUESTIONS), 1, height_ratios=heights)
        for panel, question in zip(axes, QUESTIONS, strict=True):
            _panel(panel, question)
        figure.legend(
            handles=_key(),
            loc="outside lower center",
            ncols=6,
        )
        return figure


def sentence(found: Vanishing, variable: str = "x", letter: str = "f") -> str:
    """What was found, in one line.

    >>> from gatedffn.variants import get_variant
    >>> sentence(vanishing(get_variant("relu"), "activation"))
    'flat for x ≤ 0'
    """
    parts = [
        f"{point.kind} at {variable} = {theme.number(point.x)}, "
        f"{letter} = {theme.number(point.value)}"
        for point in found.points
    ]
    parts += ["flat for " + _inequality(stretch, variable) for stretch in found.stretches]
    sides = [
        sign for sign, far in ((f"{theme.MINUS}∞", found.far_left), ("∞", found.far_right)) if far
    ]
    if sides:
        parts.append(f"tends to 0 for {variable} → {', '.join(sides)}")
    return "; ".join(parts) or "nowhere"


def _inequality(stretch: Stretch, variable: str) -> str:
    if math.isinf(stretch.low):
        return f"{variable} ≤ {theme.number(stretch.high)}"
    if math.isinf(stretch.high):
        return f"{variable} > {theme.number(stretch.low)}"
    return f"{theme.number(stretch.low)} ≤ {variable} ≤ {theme.number(stretch.high)}"


def _panel(axes: Axes, question: Question) -> None:
    title, xlabel, variable = _TITLES[question]
    rows = rows_of(question)
    for line, row in enumerate(rows):
        found = vanishing(row, question)
        color = theme.style(row)["color"]
        for point in found.points:
            axes.plot(point.x, line, marker=_MARKERS[point.kind], color=color, markersize=7)
        for stretch in found.stretches:
            ends = [max(stretch.low, _LOW), min(stretch.high, _HIGH)]
            axes.plot(ends, [line, line], color=color, linewidth=6, solid_capstyle="butt")
        if found.far_left:
            axes.plot(_LOW + 0.2, line, marker="<", color=color, fillstyle="none", markersize=6)
        if found.far_right:
            axes.plot(_HIGH - 0.2, line, marker=">", color=color, fillstyle="none", markersize=6)
        # The by-gate panel gives phi's own value: what up multiplies.
        words = sentence(found, variable, {"activation": "f", "by gate": "phi"}.get(question, "h"))
        beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.01, line, words, **beside, fontsize=8.5, label=f"{row.label}: {words}")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(_LOW, _HIGH)
    axes.set_xticks(range(int(_LOW), int(_HIGH) + 1, 2))
    axes.axvline(0.0, color=theme.REFERENCE, linewidth=0.8, zorder=1)
    axes.set_title(title)
    axes.set_xlabel(xlabel)


def _key() -> list[Line2D]:
    black = {"color": "black", "linestyle": ""}
    entries: tuple[tuple[str, dict[str, Any]], ...] = (
        ("minimum", {**black, "marker": "v", "markersize": 7}),
        ("maximum", {**black, "marker": "^", "markersize": 7}),
        ("no slope on the whole stretch", {"color": "black", "linewidth": 6}),
        ("tends to 0 on this side", {**black, "marker": "<", "fillstyle": "none"}),
    )
    return [Line2D([], [], label=label, **look) for label, look in entries]
