"""What this library raises when a call cannot be done as asked.

Every message says what came, what was wanted and what to do. Each class is also the built-in
error that fits it, so code that knows nothing of this library can catch it.
"""

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def plain(text: str) -> str:
    r"""A text in one line, without what colours a terminal.

    >>> plain("a \x1b[1mbold\x1b[0m\n word")
    'a bold word'
    """
    return " ".join(_COLOURS.sub("", text).split())


def first_line(error: BaseException) -> str:
    r"""What an error of another library says, in one line.

    >>> first_line(ValueError("no such thing\nTry another")), first_line(ValueError())
    ('no such thing', 'ValueError')
    """
    lines = str(error).strip().splitlines()
    return plain(lines[0]) if lines else type(error).__name__


class GatedFFNError(Exception):
    """Base of every error that this library raises on purpose."""


class UnknownVariant(GatedFFNError, ValueError):
    """A name that no row of the table has."""


class ParameterError(GatedFFNError, ValueError):
    """A parameter that the variant does not have, or a value that it cannot take."""


class ShapeError(GatedFFNError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class DataError(GatedFFNError, ValueError):
    """Data to compare on that cannot be used."""


class SettingError(GatedFFNError, ValueError):
    """Options of a command that cannot be carried out."""


class StorageError(GatedFFNError, OSError):
    """An output folder that cannot be used: no space, no permission, or it holds something else."""


class LayoutError(GatedFFNError, ValueError):
    """A layout that is not known, does not fit to the tensors, or cannot express them."""


class CheckpointError(GatedFFNError, ValueError):
    """A checkpoint that cannot be read: damaged, hostile, incomplete, or of a wrong kind."""


class MissingExtra(GatedFFNError, ImportError):
    """An optional dependency that is not installed."""


class BuildError(GatedFFNError, RuntimeError):
    """Compiled code that was asked for and cannot be had: no compiler, or it failed."""


class BackendError(GatedFFNError, RuntimeError):
    """A backend that was named and cannot compute the call."""


class RunError(GatedFFNError, RuntimeError):
    """A run of a comparison that cannot be done: its process ends again and again, or it fails."""
