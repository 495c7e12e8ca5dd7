"""The numbers that the figures draw: float64, from the library's own functions, never retyped."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gatedffn.activations import SCALARS
from gatedffn.functional import activation, gating
from gatedffn.variants import VARIANTS, Variant

Array = NDArray[np.float64]


class Curve(NamedTuple):
    """A function of one number and its first derivative, at the points of a grid."""

    value: Array
    derivative: Array


Function = Callable[[Array], Curve]

UNGATED = tuple(row for row in VARIANTS.values() if not row.gated)
GATED = tuple(row for row in VARIANTS.values() if row.gated)


def grid(low: float, high: float, count: int = 801) -> Array:
    """`count` points from `low` to `high`; an odd count puts 0 into a grid around it."""
    return np.linspace(low, high, count, dtype=np.float64)


def phi(row: Variant, x: Array, **parameters: float) -> Curve:
    """`phi(x)` and `phi'(x)` as `SCALARS` has them: of the gate, or of an activation's input."""
    points = torch.from_numpy(x)
    arguments = _arguments(row, row.phi, parameters)
    function = SCALARS[row.phi]
    return Curve(
        function.value(points, *arguments).numpy(), function.derivative(points, *arguments).numpy()
    )


def psi(row: Variant, x: Array, **parameters: float) -> Array:
    """`psi(x)` of a gated row, as `SCALARS` has it."""
    assert row.psi is not None
    value = SCALARS[row.psi].value(torch.from_numpy(x), *_arguments(row, row.psi, parameters))
    return np.asarray(value.numpy())


def _arguments(row: Variant, function: str, parameters: dict[str, float]) -> list[float]:
    values = {**row.defaults, **parameters}
    return [values[name] for name in SCALARS[function].parameters]


def along(row: Variant, x: Array, **parameters: float) -> Curve:
    """The hidden value and its derivative by x; a gated row has gate = up = x.

    >>> from gatedffn.variants import get_variant
    >>> along(get_variant("bilinear"), np.array([3.0])).derivative
    array([6.])
    """
    points = torch.from_numpy(x).requires_grad_()
    if row.gated:
        hidden = gating(points, points, row, **parameters)
    else:
        hidden = activation(points, row, **parameters)
    (derivative,) = torch.autograd.grad(hidden.sum(), points)
    return Curve(hidden.detach().numpy(), derivative.numpy())


def plane(row: Variant, gate: Array, up: Array, **parameters: float) -> Array:
    """The hidden values of a gated row at every (up, gate): one line for each up."""
    gates, ups = np.meshgrid(gate, up)
    return gating(torch.from_numpy(gates), torch.from_numpy(ups), row, **parameters).numpy()
