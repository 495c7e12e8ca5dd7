"""Variants as they are named on a command line."""

from collections.abc import Callable, Sequence

from gatedffn.activations import variant_named
from gatedffn.variants import VARIANTS

HELP = "a name, NAME:PARAMETER=NUMBER, or PATH.py:NAME for one's own"
"""How a variant is named, in the help of every command that takes one."""


def named(text: str) -> str:
    """The name under which a variant is known from now on: of `PATH.py:NAME` the row's own.

    >>> named("SwiGLU:beta=2"), named("lstm")
    ('SwiGLU:beta=2', 'lstm')
    """
    return variant_named(text).name if ".py:" in text else text


def complete(*words: str) -> Callable[[str], list[str]]:
    """What a shell offers for the beginning of one of some words.

    >>> complete("relu", "reglu", "glu")("re")
    ['relu', 'reglu']
    """
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


complete_variant = complete(*VARIANTS)


def all_named(texts: Sequence[str] | None) -> tuple[str, ...]:
    """The same of several."""
    return tuple(map(named, texts or ()))
