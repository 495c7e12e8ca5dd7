"""A gated variant over the plane of gate and up: as a surface and as level lines."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from gatedffn.errors import SettingError
from gatedffn.plots import theme
from gatedffn.plots.curves import GATED, Array, grid, plane, psi
from gatedffn.plots.vanishing import vanishing
from gatedffn.variants import Variant, get_variant

# The parameters that bend a row at their own value, which its picture must therefore reach.
_BOUNDS = ("limit", "gate_cap")
_LINES = 201
_HATCHED: dict[str, Any] = {
    "facecolor": "none",
    "edgecolor": theme.MARKED,
    "hatch": "/",
    "linewidth": 0.8,
    "alpha": 0.55,
}


def surface(variant: str | Variant) -> Figure:
    """The hidden values of a gated variant over gate and up, with its default parameters.

    On the left a surface, on the right its level lines; where the derivative by the gate is 0 is
    marked on the level lines.

    Raises:
        UnknownVariant, SettingError: no such variant, or it has no gate.
    """
    row = gated_row(variant)
    reach = extent(row)
    points = grid(-reach, reach, _LINES)
    hidden = plane(row, points, points)
    # The same colour on both sides of 0 means the same distance from it.
    largest = float(np.abs(hidden).max())
    shades = {"cmap": theme.DIVERGING, "vmin": -largest, "vmax": largest}
    with theme.figure(11.5, 5.6) as figure:
        figure.suptitle(_title(row), weight="bold", size=12)
        # Wide panels would otherwise push their titles into the figure's own.
        figure.set_layout_engine("constrained", rect=(0.0, 0.0, 1.0, 0.96))
        left = figure.add_subplot(1, 2, 1, projection="3d", computed_zorder=False)
        right = figure.add_subplot(1, 2, 2)
        _surface(left, points, hidden, shades)
        filled = _levels(right, points, hidden, shades)
        _mark(right, row, points)
        bar = figure.colorbar(filled, ax=right, shrink=0.86, pad=0.03)
        bar.set_label("hidden value h")
        return figure


def gated_row(variant: str | Variant) -> Variant:
    """The row of a gated variant; only those have a plane of gate and up.

    Raises:
        UnknownVariant, SettingError: no such variant, or it has no gate.
    """
    row = get_variant(variant)
    if not row.gated:
        gated = ", ".join(other.name for other in GATED)
        raise SettingError(f"{row.name!r} has no gate, so no surface; those that have: {gated}")
    return row


def extent(row: Variant) -> float:
    """How far the plane of a row reaches: 4, or far enough to show its limit."""
    bounds = [row.defaults[name] for name in _BOUNDS if name in row.defaults]
    return max([4.0, *(math.ceil(1.4 * bound) for bound in bounds)])


def _title(row: Variant) -> str:
    values = ", ".join(f"{name} = {value:g}" for name, value in row.defaults.items())
    formula = row.formula if not values or "=" in row.formula else f"{row.formula}, {values}"
    return f"{row.label}: {formula}"


def _surface(axes: Any, points: Array, hidden: Array, shades: dict[str, Any]) -> None:
    up, gate = np.meshgrid(points, points, indexing="ij")
    # A picture inside the SVG: ten thousand little polygons would be megabytes.
    axes.plot_surface(
        gate, up, hidden, **shades, rcount=80, ccount=80, linewidth=0.0, rasterized=True
    )
    axes.plot_wireframe(
        gate, up, hidden, rcount=12, ccount=12, color="black", linewidth=0.35, alpha=0.6
    )
    axes.set_xlabel("gate g")
    axes.set_ylabel("up u")
    axes.set_zlabel("hidden value h")
    axes.view_init(elev=26.0, azim=-122.0)
    axes.set_box_aspect((1.0, 1.0, 0.75), zoom=1.06)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_title("Surface")


def _levels(axes: Axes, points: Array, hidden: Array, shades: dict[str, Any]) -> Any:
    filled = axes.pcolormesh(points, points, hidden, shading="gouraud", rasterized=True, **shades)
    lines = axes.contour(
        points, points, hidden, levels=_steps(hidden), colors="black", linewidths=0.8
    )
    axes.clabel(
        lines, [level for level in lines.levels if level], fontsize=8, fmt="%g", inline_spacing=3
    )
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.set_title("Level lines")
    axes.set_xlabel("gate g")
    axes.set_ylabel("up u")
    return filled


def _short(level: float) -> str:
    return f"{level:g}".replace("-", theme.MINUS)


def _steps(hidden: Array) -> list[float]:
    """Levels on both sides of 0, closer together near 0, where the variants differ."""
    largest = float(np.abs(hidden).max())
    unit = 10.0 ** math.floor(math.log10(largest))
    sizes = [unit * factor for factor in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)]
    chosen = [round(size, 12) for size in sizes if largest / 60.0 < size < largest]
    return sorted([-size for size in chosen] + [0.0, *chosen])


def _mark(axes: Axes, row: Variant, points: Array) -> None:
    """Lines and hatched bands where `dh/dg = phi'(g) psi(u)` is 0, but for a single u."""
    found = vanishing(row, "by gate")
    low, high = float(points[0]), float(points[-1])
    handles: list[Any] = []
    for point in found.points:
        if low < point.x < high:
            line = axes.axvline(point.x, color=theme.MARKED, linestyle=(0, (5, 2)), linewidth=2.0)
            line.set_label(f"dh/dg = 0 at g = {theme.number(point.x)}")
            handles.append(line)
    for stretch in found.stretches:
        first, last = max(stretch.low, low), min(stretch.high, high)
        if first < last:
            side = f"> {theme.number(first)}" if first > low else f"≤ {theme.number(last)}"
            handles.append(axes.axvspan(first, last, label=f"dh/dg = 0 for g {side}", **_HATCHED))
    silent = points[psi(row, points) == 0.0]
    if len(silent) > 1:
        label = f"dh/dg = 0 for u ≤ {theme.number(silent[-1])}"
        handles.append(axes.axhspan(silent[0], silent[-1], label=label, **_HATCHED))
    if not handles:
        handles.append(Line2D([], [], linestyle="", label="dh/dg = 0 at no g"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
