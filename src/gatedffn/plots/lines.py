"""Figures of functions of one number: variants by beta, the activations, the gated family."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gatedffn.errors import SettingError
from gatedffn.plots import knobs, theme
from gatedffn.plots.curves import GATED, Array, along, grid
from gatedffn.plots.vanishing import find
from gatedffn.variants import PAPER, Variant, get_variant

# The eight of Ramachandran et al. 2017, section 5.
BASELINES = ("relu", "leaky_relu", "prelu", "softplus", "elu", "selu", "gelu", "swish")
REACH, NEAR = 5.0, 3.0  # of x without a gate, and where gate and up multiply
INPUT, GATED_INPUT = "input x", "gate = up = x"


def fan(
    row: Variant, betas: Sequence[float] = (), reach: tuple[float, float] | None = None
) -> Figure:
    """A variant for several beta, and its first derivative; a gated one has gate = up = x.

    A dot is where the derivative is 0.

    Args:
        row: a row with a beta.
        betas: values of beta; those of `knobs.fan` unless given.
        reach: the lowest and the highest x; [-5, 5] unless given, [-3, 3] if the row is gated.

    Raises:
        SettingError: a beta that is no number, or a reach that is none.
    """
    (parameter,) = (p for p in row.parameters if p.name == "beta")
    betas = betas or knobs.fan(parameter)
    low, high = reach or ((-NEAR, NEAR) if row.gated else (-REACH, REACH))
    if not all(map(math.isfinite, betas)):
        raise SettingError(f"beta must be finite, not {', '.join(map(str, betas))}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SettingError(f"the range must go from a number to a larger one, not {low} to {high}")
    x = grid(low, high)
    symbol = "h" if row.gated else "f"
    with theme.figure(10.5, 4.6) as figure:
        left, right = figure.subplots(1, 2)
        for beta, line in zip(betas, theme.sequence(len(betas)), strict=True):
            curve = along(row, x, beta=beta)
            left.plot(x, curve.value, label=_beta_label(beta, row), **line)
            right.plot(x, curve.derivative, label=_beta_label(beta, row), **line)
            for point in find(partial(along, row, beta=beta)).points:
                if low <= point.x <= high:
                    left.plot(point.x, point.value, **theme.DOT, color=line["color"])
                    right.plot(point.x, 0.0, **theme.DOT, color=line["color"])
        inputs = GATED_INPUT if row.gated else INPUT
        _frame(left, f"{row.label}: {row.formula}", _value_name(symbol), inputs)
        _frame(right, "Its first derivative; a dot where it is 0", f"slope d{symbol}/dx", inputs)
        for axes in (left, right):
            axes.set_xlim(low, high)
            axes.legend(loc="best")
        return figure


def _beta_label(beta: float, row: Variant) -> str:
    words = {} if row.gated else {0.0: " (x / 2)", 1.0: " (SiLU)"}
    return f"beta = {beta:g}{words.get(beta, '')}"


def _value_name(symbol: str) -> str:
    return {"f": "output f(x)", "h": "hidden value h(x, x)"}[symbol]


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
        _frame(top, "The eight activations of the Swish paper", "output f(x)")
        _frame(top_right, "Their first derivatives", "slope df/dx")
        _frame(bottom, "Below 0, enlarged", "output f(x)")
        _frame(bottom_right, "Their first derivatives below 0", "slope df/dx")
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
    low, high = -NEAR, NEAR
    x = grid(low, high, 601)
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
            _frame(value, title, "hidden value h(x, x)" if not column else "", GATED_INPUT)
            _frame(slope, "Derivative", "slope dh/dx" if not column else "", GATED_INPUT)
            value.set_xlim(low, high)
            slope.set_xlim(low, high)
            legend.set_axis_off()
            legend.legend(*value.get_legend_handles_labels(), loc="upper left", borderaxespad=0.0)
        axes[0, 0].set_ylim(-0.7, 6.0)
        axes[1, 0].set_ylim(-2.0, 5.0)
        return figure


def _frame(axes: Axes, title: str, ylabel: str, xlabel: str = INPUT) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
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
