"""Single files of libraries whose package imports more than the tests have."""

import importlib
import sys
import types
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def alone(package: str, folder: str, name: str) -> Any:
    """A module of a folder of a package, without the `__init__` of either.

    >>> alone("timm", "layers", "mlp").Mlp.__name__
    'Mlp'
    """
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    made = types.ModuleType(f"{package}_{folder}_alone")
    made.__path__ = [str(Path(spec.submodule_search_locations[0]) / folder)]
    sys.modules.setdefault(made.__name__, made)
    return importlib.import_module(f"{made.__name__}.{name}")


@cache
def litgpt() -> Any:
    """`litgpt.model`, without `lightning`, which reading checkpoints needs."""
    spec = find_spec("litgpt")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = types.ModuleType("litgpt")
    package.__path__ = list(spec.submodule_search_locations)
    reading: Any = types.ModuleType("litgpt.scripts.convert_hf_checkpoint")
    reading.qkv_reassemble = None
    for module in (package, types.ModuleType("litgpt.scripts"), reading):
        sys.modules.setdefault(module.__name__, module)
    return importlib.import_module("litgpt.model")
