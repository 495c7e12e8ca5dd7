"""The figures of `gatedffn plot` and the theme that every figure of this library has."""

import importlib.util

from gatedffn.errors import MissingExtra

for _module in ("matplotlib", "numpy"):
    if importlib.util.find_spec(_module) is None:
        raise MissingExtra(
            f"figures need {_module}, which is not installed: pip install 'gatedffn[plots]'"
        )
