"""Layers of other libraries, built small."""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn


def hugging_face(folder: str, layer: str, config: str, **settings: Any) -> nn.Module:
    models = "transformers.models"
    configuration = getattr(importlib.import_module(f"{models}.{folder}"), config)(**settings)
    modeling = importlib.import_module(f"{models}.{folder}.modeling_{folder}")
    module: nn.Module = getattr(modeling, layer)(configuration)
    return module.eval()


def timm_mlp() -> Any:
    """timm's `layers/mlp.py` without its `__init__`, which would import torchvision."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = types.ModuleType("timm_layers_alone")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "layers")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module("timm_layers_alone.mlp")
