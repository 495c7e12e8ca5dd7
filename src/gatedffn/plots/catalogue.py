"""Every figure by the name that `gatedffn plot` takes."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from matplotlib.figure import Figure

from gatedffn.errors import SettingError
from gatedffn.plots.curves import GATED
from gatedffn.plots.lines import activations, family, fan
from gatedffn.plots.surface import gated_row, surface
from gatedffn.plots.zeros import zeros
from gatedffn.variants import VARIANTS

Draw = Callable[[], Figure]

SURFACE = "surface"
# The figures that are drawn over beta.
FANS: Mapping[str, Callable[..., Figure]] = MappingProxyType(
    {name: partial(fan, VARIANTS[name]) for name in ("swish", "swiglu")}
)
_SINGLE: Mapping[str, Draw] = MappingProxyType(
    {**FANS, "activations": activations, "family": family, "zeros": zeros}
)
FIGURES: Mapping[str, Draw] = MappingProxyType(
    {**_SINGLE, **{f"{SURFACE}:{row.name}": partial(surface, row) for row in GATED}}
)
"""Every figure, in the order in which they are drawn; a surface is `surface:` and its row."""


def choose(
    names: Sequence[str] = (),
    variants: Sequence[str] = (),
    betas: Sequence[float] = (),
    reach: tuple[float, float] | None = None,
) -> dict[str, Draw]:
    """The figures that were asked for, each once, in the order of asking.

    Args:
        names: names of `FIGURES`; `surface` alone stands for all surfaces; none is everything.
        variants: gated rows, names or aliases, to which `surface` alone is narrowed.
        betas: the values of beta in the figures of `FANS`, unless they are those of the figure.
        reach: the lowest and the highest x of those figures, likewise.

    Raises:
        SettingError: an unknown figure, a variant without a gate, or what no figure asked for
            takes: variants but no `surface`, betas or a reach but none of `FANS`.
        UnknownVariant: no row has that name.

    >>> list(choose(["family", "surface:SwiGLU"]))
    ['family', 'surface:swiglu']
    """
    asked = list(names) or [*_SINGLE, SURFACE]
    if variants and SURFACE not in asked:
        raise SettingError(
            f"variants were given ({', '.join(variants)}), but they only narrow the figure "
            f"'surface', which is not among {', '.join(asked)}: add it"
        )
    if (betas or reach) and not set(asked) & set(FANS):
        raise SettingError(
            f"beta and range are those of {' and '.join(FANS)}, which are not among "
            f"{', '.join(asked)}: add one"
        )
    chosen: list[str] = []
    for name in asked:
        kind, _, variant = name.partition(":")
        if name in _SINGLE:
            chosen.append(name)
        elif kind == SURFACE:
            of = [variant] if variant else list(variants) or [row.name for row in GATED]
            chosen += [f"{SURFACE}:{gated_row(each).name}" for each in of]
        else:
            raise SettingError(_unknown(name))
    drawn: dict[str, Draw] = {**FIGURES}
    drawn |= {name: partial(draw, betas=betas, reach=reach) for name, draw in FANS.items()}
    return {name: drawn.get(name) or _of_a_user(name) for name in chosen}


def _of_a_user(name: str) -> Draw:
    return partial(surface, name.partition(":")[2])


def _unknown(name: str) -> str:
    known = [*_SINGLE, SURFACE]
    near = difflib.get_close_matches(name.casefold(), [*FIGURES, SURFACE], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    figures = ", ".join(known)
    return f"no figure is called {name!r}; {hint}there are {figures} and surface:VARIANT"
