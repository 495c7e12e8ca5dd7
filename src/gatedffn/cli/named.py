"""Variants as they are named on a command line."""

from collections.abc import Sequence

from gatedffn.activations import variant_named

HELP = "a name, NAME:PARAMETER=NUMBER, or PATH.py:NAME for one's own"
"""How a variant is named, in the help of every command that takes one."""


def named(text: str) -> str:
    """The name under which a variant is known from now on: of `PATH.py:NAME` the row's own.

    >>> named("SwiGLU:beta=2"), named("lstm")
    ('SwiGLU:beta=2', 'lstm')
    """
    return variant_named(text).name if ".py:" in text else text


def all_named(texts: Sequence[str] | None) -> tuple[str, ...]:
    """The same of several."""
    return tuple(map(named, texts or ()))
