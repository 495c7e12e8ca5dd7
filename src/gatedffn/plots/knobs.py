"""How far a parameter of a variant moves, and at which values it is drawn side by side."""

import math
from dataclasses import dataclass

from gatedffn.variants import VARIANTS, Parameter, Variant

# 0 and 0.1 of Swish's beta are x / 2 and nearly so, 10 is nearly ReLU: 0.1, 1 and 10 are those of
# Ramachandran et al. 2017, figure 4.
FACTORS = (0.0, 0.1, 0.5, 1.0, 2.0, 10.0)
_STEPS = 200


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter that some rows share: the same name with the same meaning moves together."""

    key: str
    name: str
    meaning: str
    rows: tuple[str, ...]
    low: float
    high: float


def limits(parameter: Parameter) -> tuple[float, float]:
    """The ends between which a parameter is shown: inside its bounds, and wide of its default.

    >>> from gatedffn.variants import get_variant
    >>> limits(get_variant("swiglu").parameters[0])
    (0.0, 10.0)
    """
    high = _round_up(6.0 * abs(parameter.default) or 2.0)
    low = 0.0 if parameter.default > 0.0 else -high
    above, below = parameter.above, parameter.below
    low, high = low if above is None else above, high if below is None else below
    step = (high - low) / _STEPS  # the bounds themselves are outside
    return low + step * (above is not None), high - step * (below is not None)


def fan(parameter: Parameter) -> tuple[float, ...]:
    """The values at which a parameter is drawn side by side, growing; its default is among them.

    >>> from gatedffn.variants import get_variant
    >>> fan(get_variant("swiglu").parameters[0])
    (0.0, 0.1, 0.5, 1.0, 2.0, 10.0)
    """
    low, high = limits(parameter)
    if parameter.default:
        values = [parameter.default * factor for factor in FACTORS]
    else:
        values = [high * share for share in (-1.0, -0.5, -0.25, 0.0, 0.5, 1.0)]
    return tuple(sorted({round(min(max(value, low), high), 6) for value in values}))


def knobs() -> list[Knob]:
    """Every parameter of the table once, in the order in which rows have them."""
    shared: dict[tuple[str, str], tuple[Parameter, list[Variant]]] = {}
    for row in VARIANTS.values():
        for parameter in row.parameters:
            kind = (parameter.name, parameter.meaning)
            shared.setdefault(kind, (parameter, []))[1].append(row)
    names = [name for name, _ in shared]
    return [
        Knob(
            name if names.count(name) == 1 else f"{name}:{rows[0].name}",
            name,
            meaning,
            tuple(row.name for row in rows),
            *limits(parameter),
        )
        for (name, meaning), (parameter, rows) in shared.items()
    ]


def _round_up(value: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * factor for factor in (1.0, 2.0, 5.0, 10.0) if unit * factor >= value)
