"""The types of what users give by name, checked before anything is read."""

import os
from collections.abc import Callable, Mapping

from torch import Tensor

from gatedffn.errors import LayoutError

Kind = tuple[str, Callable[[object], bool]]


def _is_path(value: object) -> bool:
    try:
        return isinstance(value, (str, os.PathLike)) and b"\0" not in os.fsencode(value)
    except ValueError:  # half a character, which no file system has
        return False


PATH: Kind = ("a path", _is_path)
COUNT: Kind = ("a positive whole number", lambda value: type(value) is int and value > 0)
NUMBER: Kind = ("a whole number", lambda value: type(value) is int)
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
SWITCH: Kind = ("True or False", lambda value: type(value) is bool)

REQUIRED: Mapping[str, Kind] = {
    **dict.fromkeys(("source", "target", "path"), PATH),
    **dict.fromkeys(("verify", "any_width"), SWITCH),
    "tp": COUNT,
}
OPTIONAL: Mapping[str, Kind] = {
    **dict.fromkeys(("from_tp", "experts", "d_hidden"), COUNT),
    "expert": NUMBER,
    "layer": ("a whole number or a text", lambda value: NUMBER[1](value) or TEXT[1](value)),
    "at": TEXT,
    "progress": ("something to call", callable),
}
"""Of these None is the default."""


def check_arguments(**given: object) -> None:
    """Raises unless each argument is what one of its name is everywhere.

    Raises:
        LayoutError: with its name, what came, and what it must be.

    >>> check_arguments(tp=2, at=None)
    >>> check_arguments(tp=True)
    Traceback (most recent call last):
    gatedffn.errors.LayoutError: tp is True: it must be a positive whole number
    """
    for name, value in given.items():
        if value is None and name in OPTIONAL:
            continue
        words, fits = REQUIRED.get(name) or OPTIONAL[name]
        if not fits(value):
            raise LayoutError(f"{name} is {repr(value)[:200]}: it must be {words}")


def check_tensors(tensors: object) -> None:
    """Raises unless these are tensors by their names.

    Raises:
        LayoutError: with what came.
    """
    if not isinstance(tensors, Mapping):
        raise LayoutError(f"tensors by their names were wanted, not a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = type(tensor).__name__
            raise LayoutError(f"{repr(name)[:200]} is a {what}: a tensor by its name was wanted")
