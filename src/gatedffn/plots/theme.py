"""The one theme: a colour and a line for every row of the table, the paper, and how to save.

The colours are those of Okabe and Ito, with orange and sky blue darkened for white paper and wine
in place of yellow; they stay apart for the common kinds of colour blindness, which a test
simulates. Colours and lines are told by a row's position: their numbers, 8 and 5, share no factor,
so 40 rows are distinct.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gatedffn.files import written_aside
from gatedffn.variants import VARIANTS, Variant

Format = Literal["png", "svg"]
FORMATS: tuple[Format, ...] = ("png", "svg")

COLORS = (
    "#000000",
    "#d08700",
    "#3fa3dc",
    "#008a63",
    "#00588f",
    "#c44e00",
    "#c0659a",
    "#661100",
)
# The same eight for a dark page, where black and wine cannot be seen.
DARK_COLORS = (
    "#f2f2f2",
    "#e69f00",
    "#8ccbf5",
    "#00a97b",
    "#4a90d9",
    "#e8702a",
    "#d58ab4",
    "#f0e442",
)
# On and off lengths in line widths; none is a solid line. Rows of one colour are 8, 16 or 24 apart,
# so neighbours in this order must look least alike.
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (1.2, 1.3),
    (9.0, 2.2),
    (5.0, 1.4, 1.2, 1.4, 1.2, 1.4),
    (3.6, 1.6),
)
MARKED = "#c44e00"  # what a figure points at: zeros of derivatives
REFERENCE = "#9a9a9a"  # what a figure compares with: axes through 0, curves of other panels
DOT: dict[str, Any] = {"marker": "o", "markersize": 5.0, "linestyle": "", "label": "_zero"}
SEQUENCE = "viridis"  # for one quantity that grows, such as beta
# White paper swallows the yellow at the end of the map, a dark page the violet at its beginning.
_ON_WHITE, _ON_BLACK = (0.0, 0.82), (0.3, 1.0)
DIVERGING = "PuOr_r"  # for values on both sides of 0

MINUS = "\N{MINUS SIGN}"

_RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are alike everywhere
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # long enough to tell one dash pattern from another
    "figure.constrained_layout.use": True,
    "figure.dpi": 100.0,
    "savefig.dpi": 160.0,
    "savefig.facecolor": "white",
    "svg.hashsalt": "gatedffn",
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
}


def style(row: Variant) -> dict[str, Any]:
    """Colour and line style of a row, as keyword arguments of `Axes.plot`.

    >>> from gatedffn.variants import get_variant
    >>> style(get_variant("relu"))
    {'color': '#000000', 'linestyle': '-'}
    """
    position = _position(row)
    dashes = DASHES[position % len(DASHES)]
    return {
        "color": COLORS[position % len(COLORS)],
        "linestyle": (0, dashes) if dashes else "-",
    }


def page_style(row: Variant) -> dict[str, str]:
    """The same as `style` for the page: two colours, and SVG's stroke-dasharray."""
    position = _position(row)
    dashes = DASHES[position % len(DASHES)]
    return {
        "light": COLORS[position % len(COLORS)],
        "dark": DARK_COLORS[position % len(DARK_COLORS)],
        "dashes": _dash_array(dashes),
    }


def _position(row: Variant) -> int:
    """The row's place in the table; those that users made come behind."""
    return [*VARIANTS, *VARIANTS.made()].index(row.name)


def sequence(count: int) -> list[dict[str, Any]]:
    """Styles for `count` lines of one growing quantity: dark to light, each with its own dashes."""
    return [
        {"color": color, "linestyle": (0, dashes) if dashes else "-"}
        for color, dashes in zip(_shades(count, *_ON_WHITE), _dashes(count), strict=True)
    ]


def page_sequence(count: int) -> list[dict[str, str]]:
    """The same as `sequence` for the page, as `page_style` has it."""
    looks = zip(_shades(count, *_ON_WHITE), _shades(count, *_ON_BLACK), _dashes(count), strict=True)
    return [
        {"light": light, "dark": dark, "dashes": _dash_array(dashes)}
        for light, dark, dashes in looks
    ]


def _shades(count: int, first: float, last: float) -> list[str]:
    shades = mpl.colormaps[SEQUENCE].resampled(256)
    return [
        mpl.colors.to_hex(shades(first + (last - first) * i / max(count - 1, 1)))
        for i in range(count)
    ]


def _dashes(count: int) -> list[tuple[float, ...]]:
    return [DASHES[i % len(DASHES)] for i in range(count)]


def _dash_array(dashes: tuple[float, ...]) -> str:
    return " ".join(f"{2 * length:g}" for length in dashes)


def number(value: float) -> str:
    """A number as text in figures: a whole one as it is, others with four digits, a true minus.

    >>> number(0.5), number(7.0)
    ('0.5000', '7')
    """
    text = f"{value:.0f}" if value == round(value) else f"{value:.4f}"
    return text.replace("-", MINUS)


def described(drawn: Figure) -> str:
    """What a figure shows, for those who do not see it: titles, axes, and the course of curves.

    >>> with figure() as drawn:
    ...     axes = drawn.subplots()
    ...     _ = axes.set(title="Square", xlabel="x", ylabel="y")
    ...     _ = axes.plot([-1.0, 0.0, 2.0], [1.0, 0.0, 4.0], label="x²")
    >>> described(drawn)
    'Square: y over x. x² goes from 1 at −1 to 4 at 2, lowest 0 at 0, highest 4 at 2.'
    """
    parts = [f"{drawn.get_suptitle()}."] if drawn.get_suptitle() else []
    for axes in drawn.axes:
        title, x, y = axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()
        over = f": {y} over {x}" if x and y else f": {x}" if x else ""
        if title:
            parts.append(f"{title}{over}.")
        named = [(str(a.get_label()), a) for a in (*axes.lines, *axes.patches, *axes.texts)]
        parts += [f"{label}{_course(a)}." for label, a in named if label and label[0] != "_"]
    return " ".join(parts)


def _course(artist: Artist) -> str:
    """Where a curve goes; nothing of what is no curve."""
    if not isinstance(artist, Line2D):
        return ""
    points = np.asarray(artist.get_data(), np.float64).T
    if len(points) < 3:
        return ""
    seen = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    low, high = (pick(seen, key=lambda point: point[1]) for pick in (min, max))
    places = [f"{_rounded(y)} at {_rounded(x)}" for x, y in (seen[0], seen[-1], low, high)]
    return " goes from {} to {}, lowest {}, highest {}".format(*places)


def _rounded(value: float) -> str:
    return f"{round(value, 3) + 0.0:g}".replace("-", MINUS)


@contextmanager
def figure(width: float = 10.0, height: float = 4.5) -> Iterator[Figure]:
    """An empty figure of that size in inches, in the theme; it touches no global state.

    Axes take the theme while they are made, so make them inside the `with` block.

    >>> with figure() as drawn:
    ...     axes = drawn.subplots()
    """
    with mpl.rc_context(_RC):
        drawn = Figure(figsize=(width, height))
        FigureCanvasAgg(drawn)
        yield drawn


def save(
    drawn: Figure, path_without_suffix: Path, formats: Sequence[Format] = FORMATS
) -> list[Path]:
    """Writes the figure in each format, aside and then renamed; returns the paths.

    The same figure gives the same bytes: no date, no version, fixed identifiers. Each has
    `described` as its description.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    words = described(drawn)
    title = words.partition(":")[0]
    metadata: dict[Format, dict[str, Any]] = {
        "png": {"Software": None, "Title": title, "Description": words},
        "svg": {"Date": None, "Creator": "gatedffn", "Title": title},
    }
    paths = []
    for kind in formats:
        path = path_without_suffix.with_name(f"{path_without_suffix.name}.{kind}")
        with mpl.rc_context(_RC), written_aside(path) as aside:
            drawn.savefig(aside, format=kind, metadata=metadata[kind])
            if kind == "svg":
                text = aside.read_text(encoding="utf-8")
                desc = f"</title>\n <desc>{escape(words)}</desc>"
                aside.write_text(text.replace("</title>", desc, 1), encoding="utf-8")
        paths.append(path)
    return paths
