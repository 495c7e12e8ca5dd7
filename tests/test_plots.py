"""The figures, by their contents: every curve is the library's own function."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import NDArray
from support.compare import assert_matches

from gatedffn.activations import SCALARS
from gatedffn.errors import SettingError
from gatedffn.plots import curves, knobs, lines, surface, theme, vanishing, zeros
from gatedffn.plots.catalogue import FANS, FIGURES, choose
from gatedffn.variants import VARIANTS, Parameter, Variant

Array = NDArray[np.float64]

GATED = [row for row in VARIANTS.values() if row.gated]
gated_rows = pytest.mark.parametrize("row", GATED, ids=lambda row: row.name)


def scalar(name: str, x: Array, values: Mapping[str, float], what: str = "value") -> Array:
    function = SCALARS[name]
    arguments = [values[parameter] for parameter in function.parameters]
    result = getattr(function, what)(torch.from_numpy(x), *arguments)
    return np.asarray(result.numpy())


def value_along(row: Variant, x: Array, values: Mapping[str, float]) -> Array:
    phi = scalar(row.phi, x, values)
    return phi if row.psi is None else phi * scalar(row.psi, x, values)


def slope_along(row: Variant, x: Array, values: Mapping[str, float]) -> Array:
    phi, d_phi = (scalar(row.phi, x, values, what) for what in ("value", "derivative"))
    if row.psi is None:
        return d_phi
    psi, d_psi = (scalar(row.psi, x, values, what) for what in ("value", "derivative"))
    return d_phi * psi + phi * d_psi


def drawn(axes: Axes) -> dict[str, Line2D]:
    """The curves of a panel by label; what is not a curve has a label that starts with _."""
    found = {str(line.get_label()): line for line in axes.get_lines()}
    return {label: line for label, line in found.items() if not label.startswith("_")}


def assert_draws(line: Line2D, expected: Any) -> None:
    x, y = (np.asarray(data, dtype=np.float64) for data in line.get_data())
    shown = ~np.isnan(y)
    assert shown.sum() > 100
    assert np.isnan(x[~shown]).all()
    assert_equal_but_rounding(y[shown], expected(x[shown]))


def assert_equal_but_rounding(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """The same formula: the vector length of a loop may round its last digit differently."""
    truth = torch.from_numpy(np.array(expected))
    last_digit = 1.0 + torch.finfo(torch.float64).eps
    assert_matches(torch.from_numpy(np.array(actual)), truth, truth * last_digit)


def places(panel: list[Line2D]) -> list[tuple[float, float]]:
    """The first point of each line."""
    return [(float(x[0]), float(y[0])) for x, y in (np.asarray(line.get_data()) for line in panel)]


def legend_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


# curves


@pytest.mark.parametrize("name", FANS)
def test_a_variant_by_beta(name: str) -> None:
    row = VARIANTS[name]
    left, right = FANS[name]().axes
    betas = (0.0, 0.1, 0.5, 1.0, 2.0, 10.0)
    assert len(drawn(left)) == len(drawn(right)) == len(betas)
    assert legend_of(left) == legend_of(right) == list(drawn(left))
    looks = {(line.get_color(), str(line.get_linestyle())) for line in drawn(left).values()}
    assert len({color for color, _ in looks}) == len(betas)
    for beta, label in zip(betas, drawn(left), strict=True):
        assert label.startswith(f"beta = {beta:g}")
        values = {"beta": beta}
        assert_draws(drawn(left)[label], lambda x, v=values: value_along(row, x, v))
        assert_draws(drawn(right)[label], lambda x, v=values: slope_along(row, x, v))


def test_the_minima_of_swish_have_dots() -> None:
    left, _ = FANS["swish"]().axes
    lowest = places([line for line in left.get_lines() if line.get_marker() == "o"])
    assert any(
        x == pytest.approx(-1.278464543) and y == pytest.approx(-0.278464543) for x, y in lowest
    )
    assert len(lowest) == 4  # beta = 0 has no minimum, and that of 0.1 is at -12.8


def test_a_fan_of_betas_and_a_range_of_ones_own() -> None:
    draw = choose(["swiglu", "zeros"], betas=[0.5, -1.0], reach=(-6.0, 2.0))["swiglu"]
    for axes in draw().axes:
        assert axes.get_xlim() == (-6.0, 2.0)
        assert list(drawn(axes)) == ["beta = 0.5", "beta = -1"]


@pytest.mark.parametrize(
    ("betas", "reach", "message"),
    [
        ([math.nan], None, "beta must be finite, not nan"),
        ([1.0], (2.0, 2.0), "to a larger one, not 2.0 to 2.0"),
        ([1.0], (-math.inf, 2.0), "to a larger one, not -inf to 2.0"),
    ],
)
def test_a_fan_that_cannot_be(
    betas: list[float], reach: tuple[float, float] | None, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        FANS["swish"](betas=betas, reach=reach)


@pytest.mark.parametrize("row", VARIANTS.values(), ids=list(VARIANTS))
def test_a_parameter_moves_within_its_bounds_and_through_its_default(row: Variant) -> None:
    for parameter in row.parameters:
        low, high = knobs.limits(parameter)
        assert low < high
        assert parameter.above is None or parameter.above < low
        assert parameter.below is None or high < parameter.below
        assert parameter.default in knobs.fan(parameter)
        assert all(low <= value <= high for value in knobs.fan(parameter))
        (knob,) = (k for k in knobs.knobs() if row.name in k.rows and k.name == parameter.name)
        assert knob.meaning == parameter.meaning
        assert knob.low <= parameter.default <= knob.high


@pytest.mark.parametrize(
    ("parameter", "ends"),
    [
        (Parameter(name="new", meaning="", default=-0.5), (-5.0, 5.0)),
        (Parameter(name="new", meaning="", default=0.0), (-2.0, 2.0)),
        (Parameter(name="new", meaning="", default=3.0, above=2.0), (2.09, 20.0)),
        (Parameter(name="new", meaning="", default=3.0, below=4.0), (0.0, 3.98)),
    ],
)
def test_the_ends_of_a_parameter(parameter: Parameter, ends: tuple[float, float]) -> None:
    assert knobs.limits(parameter) == pytest.approx(ends)
    assert parameter.default in knobs.fan(parameter)


def test_the_eight_activations_of_the_swish_paper() -> None:
    figure = lines.activations()
    rows = [VARIANTS[name] for name in lines.BASELINES]
    for axes, expected in zip(figure.axes, [value_along, slope_along] * 2, strict=True):
        panel = drawn(axes)
        assert len(panel) == 8
        for row, (label, line) in zip(rows, panel.items(), strict=True):
            assert label.startswith(row.label)
            assert_draws(line, lambda x, r=row, e=expected: e(r, x, r.defaults))
            assert line.get_color() == theme.style(row)["color"]
    assert legend_of(figure.axes[0]) == list(drawn(figure.axes[0]))


def test_the_family_shows_every_gated_row_once() -> None:
    figure = lines.family()
    values, slopes, legends = figure.axes[:3], figure.axes[3:6], figure.axes[6:]
    seen = []
    for axes, slope, legend in zip(values, slopes, legends, strict=True):
        assert axes.get_xlim() == slope.get_xlim() == (-3.0, 3.0)
        panel = {k: line for k, line in drawn(axes).items() if not k.endswith("to compare")}
        below = {k: line for k, line in drawn(slope).items() if not k.endswith("to compare")}
        assert legend_of(legend) == list(drawn(axes))
        for (label, line), (_, derivative) in zip(panel.items(), below.items(), strict=True):
            name = label.partition(" (=")[0].partition(" (≈")[0].partition(", ")[0]
            (row,) = (row for row in GATED if row.label == name)
            seen.append(row.name)
            assert_draws(line, lambda x, r=row: value_along(r, x, r.defaults))
            assert_draws(derivative, lambda x, r=row: slope_along(r, x, r.defaults))
    assert sorted(seen) == sorted(row.name for row in GATED)


def test_curves_that_coincide_are_said_to() -> None:
    _, middle, right, *_ = lines.family().axes
    labels = " | ".join([*drawn(middle), *drawn(right)])
    assert "xSwiGLU, alpha = 0 (= SwiGLU)" in labels
    assert "dReLU (= ReGLU)" in labels
    assert "GEGLU (tanh) (≈ GEGLU)" in labels
    assert "quick GEGLU, beta = 1.702 (" not in labels


def test_a_derivative_that_jumps_has_a_gap() -> None:
    figure = lines.activations()
    relu, swish = (drawn(figure.axes[1])[label] for label in ("ReLU", "Swish, beta = 1"))
    assert np.isnan(np.asarray(relu.get_ydata(), dtype=float)).sum() == 1
    assert not np.isnan(np.asarray(swish.get_ydata(), dtype=float)).any()


# surfaces


@gated_rows
def test_surface_and_level_lines(row: Variant) -> None:
    figure = surface.surface(row)
    solid, levels, bar = figure.axes
    reach = surface.extent(row)
    assert solid.get_zlabel().startswith("hidden value h")  # type: ignore[attr-defined]
    assert row.label in figure.get_suptitle()
    mesh = levels.collections[0]
    hidden = np.asarray(mesh.get_array())
    x = np.linspace(-reach, reach, hidden.shape[0])
    values = row.defaults
    assert row.psi is not None
    expected = np.outer(scalar(row.psi, x, values), scalar(row.phi, x, values))
    assert_equal_but_rounding(hidden, expected)
    wires = np.concatenate(solid.collections[1]._segments3d)  # type: ignore[attr-defined]
    gate, up, height = (np.ascontiguousarray(column) for column in wires.T)
    product = scalar(row.phi, gate, values) * scalar(row.psi, up, values)
    assert_equal_but_rounding(height, product)
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(hidden).max()
    assert bar.get_ylabel() == "hidden value h"
    for name in ("limit", "gate_cap"):
        assert values.get(name, 0.0) < reach
    lines_of_zero = [
        line for line in levels.get_lines() if str(line.get_label()).startswith("dh/dg = 0")
    ]
    marked = [x for x, _ in places(lines_of_zero)]
    slopes = scalar(row.phi, np.array([*marked, 0.5]), values, "derivative")
    assert np.abs(slopes[:-1]).max(initial=0.0) < 1e-9
    assert abs(slopes[-1]) > 1e-3


def test_the_flat_parts_of_a_surface_are_hatched() -> None:
    words = legend_of(surface.surface("drelu").axes[1])
    assert words == ["dh/dg = 0 for g ≤ 0", "dh/dg = 0 for u ≤ 0"]
    words = legend_of(surface.surface("gpt_oss").axes[1])
    assert words == ["dh/dg = 0 at g = −0.7512", "dh/dg = 0 for g > 7"]


# zeros


# Shared minima: reference values of the papers' functions, to the digits that are known.
@pytest.mark.parametrize(
    ("name", "question", "kind", "x", "value"),
    [
        ("swish", "activation", "minimum", -1.2784645, -0.2784645),
        ("gelu", "activation", "minimum", -0.7517915, -0.1699712),
        ("quick_gelu", "activation", "minimum", -0.7511543, -0.1636102),
        ("swiglu", "by gate", "minimum", -1.2784645, -0.2784645),
        ("swiglu", "gate = up", "maximum", -2.2177151, 0.4828301),
        ("swiglu", "gate = up", "minimum", 0.0, 0.0),
        ("glu", "gate = up", "minimum", -1.2784645, -0.2784645),
        ("powglu", "by gate", "maximum", 12.8974286, 5.3163382),
    ],
)
def test_known_zeros(
    name: str, question: vanishing.Question, kind: str, x: float, value: float
) -> None:
    points = vanishing.vanishing(VARIANTS[name], question).points
    assert any(
        point.kind == kind
        and point.x == pytest.approx(x, abs=1e-6)
        and point.value == pytest.approx(value, abs=1e-6)
        for point in points
    )


def test_stretches_and_far_ends() -> None:
    relu = vanishing.vanishing(VARIANTS["relu"], "activation")
    assert relu.stretches == (vanishing.Stretch(-np.inf, 0.0),)
    assert not relu.points
    capped = vanishing.vanishing(VARIANTS["swiglu_oai"], "by gate")
    assert capped.stretches == (vanishing.Stretch(7.0, np.inf),)
    assert capped.far_left
    tanh = vanishing.vanishing(VARIANTS["tanh"], "activation")
    assert tanh == vanishing.Vanishing(far_left=True, far_right=True)


def slope(row: Variant, question: vanishing.Question, x: Array) -> Array:
    if question == "by gate":
        return scalar(row.phi, x, row.defaults, "derivative")
    return slope_along(row, x, row.defaults)


@pytest.mark.parametrize("question", vanishing.QUESTIONS)
def test_every_zero_is_one(question: vanishing.Question) -> None:
    for row in vanishing.rows_of(question):
        for point in vanishing.vanishing(row, question).points:
            before, at, after = slope(row, question, point.x + np.array([-1e-6, 0.0, 1e-6]))
            assert abs(at) < 1e-9, row.name
            signs = {"minimum": (-1.0, 1.0), "maximum": (1.0, -1.0)}[point.kind]
            assert (np.sign(before), np.sign(after)) == signs, row.name


@pytest.mark.parametrize("question", vanishing.QUESTIONS)
def test_no_zero_is_missed(question: vanishing.Question) -> None:
    generator = np.random.default_rng(0)
    x = np.sort(generator.uniform(-vanishing.REACH, vanishing.REACH, 4001))
    for row in vanishing.rows_of(question):
        found = vanishing.vanishing(row, question)
        flat = np.zeros(x.shape, dtype=bool)
        for stretch in found.stretches:
            flat |= (x > stretch.low + 1e-9) & (x < stretch.high)
        slopes = slope(row, question, x)
        assert (slopes[flat] == 0.0).all(), row.name
        assert (slopes[~flat] != 0.0).all(), row.name
        changes = np.flatnonzero(slopes[:-1] * slopes[1:] < 0.0)
        assert len(changes) == len(found.points), row.name


def test_a_jump_over_zero_is_not_a_zero() -> None:
    def corner(x: Array) -> curves.Curve:
        slope = scalar("leaky_relu", x, {"slope": -0.1}, "derivative")
        return curves.Curve(scalar("leaky_relu", x, {"slope": -0.1}), slope)

    assert vanishing.find(corner) == vanishing.Vanishing()


def test_the_figure_of_zeros_is_also_a_table() -> None:
    figure = zeros.zeros()
    for axes, question in zip(figure.axes, vanishing.QUESTIONS, strict=True):
        rows = vanishing.rows_of(question)
        assert [text.get_text() for text in axes.get_yticklabels()] == [r.label for r in rows]
        words = [text.get_text() for text in axes.texts]
        assert len(words) == len(rows)
    words = [text.get_text() for text in figure.axes[0].texts]
    labels = [row.label for row in vanishing.rows_of("activation")]
    at = dict(zip(labels, words, strict=True))
    assert at["Swish"] == "minimum at x = −1.2785, f = −0.2785; tends to 0 for x → −∞"
    assert at["ReLU"] == "flat for x ≤ 0"
    assert at["LeakyReLU"] == "nowhere"


# every figure


def words_of(figure: Figure) -> Iterator[Text]:
    """Every text but the numbers at ticks, of which an axis keeps some out of sight."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    for legend in legends:
        yield from legend.get_texts() if legend else ()
    for axes in figure.axes:
        yield from (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
    yield from figure.texts


@pytest.mark.parametrize(
    "name", ["swish", "swiglu", "activations", "family", "zeros", "surface:swiglu_oai"]
)
def test_nothing_is_cut_off_and_every_axis_is_labelled(name: str) -> None:
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    edge = figure.bbox.padded(1.0)
    for text in filter(Text.get_text, words_of(figure)):
        box = text.get_window_extent()
        assert edge.x0 <= box.x0 < box.x1 <= edge.x1, text
        assert edge.y0 <= box.y0 < box.y1 <= edge.y1, text
    for axes in figure.axes:
        if drawn(axes) and axes.axison:
            assert axes.get_xlabel() in ("input x", "gate = up = x", "gate g")
    assert any(axes.get_legend() for axes in figure.axes) or figure.legends


def test_a_figure_says_what_it_shows() -> None:
    words = theme.described(FANS["swiglu"](betas=[1.0]))
    assert words.startswith(
        "SwiGLU: g sigmoid(beta g) * u: hidden value h(x, x) over gate = up = x. "
        "beta = 1 goes from 0.427 at −3 to 8.573 at 3, lowest 0 at 0, highest 8.573 at 3. "
    )
    assert "ReLU: flat for x ≤ 0. " in theme.described(zeros.zeros())
    assert "dh/dg = 0 at g = −1.2785." in theme.described(surface.surface("swiglu"))
