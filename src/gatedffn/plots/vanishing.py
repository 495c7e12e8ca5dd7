"""Where a first derivative vanishes: single points, whole stretches, and far out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gatedffn.plots.curves import GATED, UNGATED, Array, Function, along, grid, phi
from gatedffn.variants import Variant

Kind = Literal["minimum", "maximum", "inflection"]
Question = Literal["activation", "by gate", "gate = up"]
QUESTIONS: tuple[Question, ...] = ("activation", "by gate", "gate = up")

# Holds every bend of the rows: the cap at 10, the maximum of PowGLU at 12.9.
REACH = 16.0
STEPS = 4096  # a power of two, so that whole numbers are points of the grid
_FAR = 1e12
_SMALL = 1e-9


@dataclass(frozen=True, slots=True)
class Point:
    """The derivative is 0 at `x` alone; the function is `value` there."""

    x: float
    value: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Stretch:
    """The derivative is 0 from `low` to `high`; infinite where it never ends."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Vanishing:
    """Where a derivative is 0, and whether it tends to 0 far to the left and to the right."""

    points: tuple[Point, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    far_left: bool = False
    far_right: bool = False


def vanishing(row: Variant, question: Question) -> Vanishing:
    """Where the derivative of a row's hidden value is 0, with its default parameters.

    Args:
        row: a row without a gate for "activation", a gated one for the other two.
        question: "activation" is d phi(x) / dx; "by gate" is d phi(gate) / d gate, which is 0
            where the hidden value does not depend on the gate, whatever up is; "gate = up" is
            d phi(x) psi(x) / dx.

    >>> from gatedffn.variants import get_variant
    >>> [round(point.x, 4) for point in vanishing(get_variant("swish"), "activation").points]
    [-1.2785]
    """
    function = phi if question == "by gate" else along
    return find(lambda x: function(row, x))


def rows_of(question: Question) -> tuple[Variant, ...]:
    """The rows that a question is asked of."""
    return UNGATED if question == "activation" else GATED


def find(function: Function) -> Vanishing:
    """Where the derivative is 0 between -16 and 16, to the last digits of float64.

    A point is where it changes sign by way of 0, or is 0 at a point of the grid; a stretch is
    where it is exactly 0 at neighbouring points. A jump over 0 is neither.
    """
    x = grid(-REACH, REACH, STEPS + 1)
    derivative = function(x).derivative
    zero = derivative == 0.0
    stretches, points = [], []
    for first, last in _runs(zero):
        if first == last:
            before, after = derivative[max(first - 1, 0)], derivative[min(last + 1, STEPS)]
            points.append(_point(function, float(x[first]), before, after))
        else:
            stretches.append(_stretch(function, x, first, last))
    changes = np.flatnonzero(derivative[:-1] * derivative[1:] < 0.0)
    for i in changes:
        root = _crossing(function, x[i], x[i + 1], rising=bool(derivative[i] < 0.0))
        if abs(_slope(function, root)) < _SMALL:
            points.append(_point(function, root, derivative[i], derivative[i + 1]))
    left, right = function(np.array([-_FAR, _FAR])).derivative
    flat_left = any(stretch.low == -np.inf for stretch in stretches)
    flat_right = any(stretch.high == np.inf for stretch in stretches)
    return Vanishing(
        tuple(sorted(points, key=lambda point: point.x)),
        tuple(stretches),
        far_left=bool(abs(left) < _SMALL) and not flat_left,
        far_right=bool(abs(right) < _SMALL) and not flat_right,
    )


def _runs(zero: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], zero, [False]]).astype(np.int8)))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _slope(function: Function, at: float) -> float:
    return float(function(np.array([at])).derivative[0])


def _bisect(inside: Callable[[float], bool], low: float, high: float) -> float:
    """The last point where `inside` still holds, on the way from `low`, where it does."""
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return float(low)
        if inside(middle):
            low = middle
        else:
            high = middle


def _crossing(function: Function, low: float, high: float, rising: bool) -> float:
    def before(at: float) -> bool:
        return (_slope(function, at) < 0.0) is rising

    return _bisect(before, low, high)


def _stretch(function: Function, x: Array, first: int, last: int) -> Stretch:
    def flat(at: float) -> bool:
        return _slope(function, at) == 0.0

    low = -np.inf if first == 0 else _bisect(flat, x[first], x[first - 1])
    high = np.inf if last == len(x) - 1 else _bisect(flat, x[last], x[last + 1])
    # A power of x is 0 in float64 a little beyond the point where it is 0 on paper.
    return Stretch(round(low, 12), round(high, 12))


def _point(function: Function, x: float, before: float, after: float) -> Point:
    kind: Kind = "inflection"
    if before < 0.0 < after:
        kind = "minimum"
    elif after < 0.0 < before:
        kind = "maximum"
    return Point(x, float(function(np.array([x])).value[0]), kind)
