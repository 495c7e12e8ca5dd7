"""Figures of functions of one number: Swish by beta, the activations, the gated family."""

from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gatedffn.plots import theme
from gatedffn.plots.curves import GATED, Array, along, grid
from gatedffn.plots.vanishing import find
from gatedffn.variants import PAPER, Variant, get_variant

# 0 is x / 2 and 10 nearly ReLU; 0.1, 1 and 10 are those of Ramachandran et al. 2017, figure 4.
BETAS = (0.0, 0.1, 0.5, 1.0, 2.0, 10.0)
# The eight of Ramachandran et al. 2017, section 5.
BASELINES = ("relu", "leaky_relu", "prelu", "softplus", "elu", "selu", "gelu", "swish")
REACH = 5.0
INPUT = "x (dimensionless)"


def swish() -> Figure:
    """Swish for several beta, and its first derivative, over x in [-5, 5].

    `f(x) = x sigmoid(beta x)`; a dot is where the derivative is 0.
    """
    row = get_variant("swish")
    x = grid(-REACH, REACH)
    with theme.figure(10.5, 4.6) as figure:
        left, right = figure.subplots(1, 2)
        for beta, line in zip(BETAS, theme.sequence(len(BETAS)), strict=True):
            curve = along(row, x, beta=beta)
            left.plot(x, curve.value, label=_beta_label(beta), **line)
            right.plot(x, curve.derivative, label=_beta_label(beta), **line)
            for point in find(partial(along, row, beta=beta)).points:
                if abs(point.x) <= REACH:
                    left.plot(point.x, point.value, **theme.DOT, color=line["color"])
                    right.plot(point.x, 0.0, **theme.DOT, color=line["color"])
        _frame(left, "Swish: x sigmoid(beta x)", "f(x) (dimensionless)")
        _frame(right, "Its first derivative; a dot where it is 0", "df/dx (dimensionless)")
        left.set_ylim(-2.7, 5.2)
        left.set_xlim(-REACH, REACH)
        right.set_xlim(-REACH, REACH)
        left.legend(loc="upper left")
        right.legend(loc="upper left")
        return figure


def _beta_label(beta: float) -> str:
    words = {0.0: " (x / 2)", 1.0: " (SiLU)"}
    return f"beta = {beta:g}{words.get(beta, '')}"


def activations() -> Figure:
    """The eight activations that the Swish paper compares: functions and first derivatives.

    The upper pair shows x in [-5, 5]; the lower pair the part below 0, where they differ.
    """
    rows = [get_variant(name) for name in BASELINES]
    with theme.figure(11.0, 8.6) as figure:
        axes = figure.subplots(2, 2)
        for (left, right), low, high in zip(axes, (-REACH, -REACH), (REACH, 0.5), strict=True):
            x = grid(low, high, 1101)
            for row in rows:
                curve = along(row, x)
                left.plot(x, curve.value, label=_label(row), **theme.style(row))
                _plot_derivative(right, row, x, curve.derivative)
        (top, top_right), (bottom, bottom_right) = axes
        _frame(top, "The eight activations of the Swish paper", "f(x) (dimensionless)")
        _frame(top_right, "Their first derivatives", "df/dx (dimensionless)")
        _frame(bottom, "Below 0, enlarged", "f(x) (dimensionless)")
        _frame(bottom_right, "Their first derivatives below 0", "df/dx (dimensionless)")
        top.set_ylim(-2.0, 5.2)
        bottom.set_ylim(-1.85, 0.75)
        top.legend(loc="upper left")
        top_right.legend(loc="upper left", ncols=2)
        top_right.set_ylim(-0.15, 2.35)
        return figure


def family() -> Figure:
    """Every gated variant on one input, gate = up = x in [-3, 3]: hidden value and derivative.

    On the left the five of GLU Variants; in the middle other gates; on the right the rows that
    transform the up branch too. A grey band under the others is SwiGLU.
    """
    five = [row for row in GATED if row.name in PAPER]
    others = [row for row in GATED if row.name not in PAPER]
    columns = (
        ("The GLU variants", five),
        ("Other gates", [row for row in others if row.psi == "identity"]),
        ("Up branch transformed too", [row for row in others if row.psi != "identity"]),
    )
    x = grid(-3.0, 3.0, 601)
    reference = get_variant("swiglu")
    with theme.figure(13.0, 9.2) as figure:
        figure.suptitle("The gated family on one input: gate = up = x", weight="bold", size=13)
        # The last line of the grid holds the legends, which would hide curves anywhere else.
        axes = figure.subplots(3, len(columns), sharey="row", height_ratios=(4.0, 4.0, 1.1))
        for column, (title, rows) in enumerate(columns):
            value, slope, legend = axes[:, column]
            if column:
                _band(value, x, along(reference, x).value, "SwiGLU, to compare")
                _band(slope, x, along(reference, x).derivative, "SwiGLU, to compare")
            for row in rows:
                curve = along(row, x)
                label = _label(row) + _same_as(row, x)
                value.plot(x, curve.value, label=label, **theme.style(row))
                _plot_derivative(slope, row, x, curve.derivative)
            _frame(value, title, "hidden value h(x, x) (dimensionless)" if not column else "")
            _frame(slope, "Derivative", "dh/dx (dimensionless)" if not column else "")
            value.set_xlim(-3.0, 3.0)
            slope.set_xlim(-3.0, 3.0)
            legend.set_axis_off()
            legend.legend(*value.get_legend_handles_labels(), loc="upper left", borderaxespad=0.0)
        axes[0, 0].set_ylim(-0.7, 6.0)
        axes[1, 0].set_ylim(-2.0, 5.0)
        return figure


def _frame(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(INPUT)
    axes.set_ylabel(ylabel)
    for line in (axes.axhline, axes.axvline):
        line(0.0, color=theme.REFERENCE, linewidth=0.8, zorder=1, label="_zero")


def _band(axes: Axes, x: Array, y: Array, label: str) -> None:
    band: dict[str, Any] = {"color": theme.REFERENCE, "linewidth": 6.0, "alpha": 0.35}
    axes.plot(x, y, label=label, solid_capstyle="butt", **band)


def _plot_derivative(axes: Axes, row: Variant, x: Array, derivative: Array) -> None:
    """A derivative that jumps is drawn with a gap: the jump itself is not a value."""
    gaps = np.flatnonzero(np.abs(np.diff(derivative)) > _jump(derivative)) + 1
    shown = np.insert(derivative, gaps, np.nan)
    axes.plot(np.insert(x, gaps, np.nan), shown, label=_label(row), **theme.style(row))


def _jump(derivative: Array) -> float:
    """Ten times the largest step but the few largest: a smooth curve has no such step."""
    steps = np.sort(np.abs(np.diff(derivative)))
    return max(10.0 * float(steps[-4]), 0.05)


def _label(row: Variant) -> str:
    """The row's label, with the parameters that it was drawn with."""
    values = ", ".join(f"{name} = {value:g}" for name, value in row.defaults.items())
    return f"{row.label}, {values}" if values else row.label


def _same_as(row: Variant, x: Array) -> str:
    """Says which earlier row has the same curve here, or one that the eye cannot tell from it."""
    mine = along(row, x).value
    for other in GATED[: GATED.index(row)]:
        apart = float(np.abs(mine - along(other, x).value).max())
        if apart < 1e-12:
            return f" (= {other.label})"
        if apart < 0.005:
            return f" (≈ {other.label})"
    return ""
