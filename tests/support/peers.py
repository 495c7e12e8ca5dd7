"""Layers of other libraries, built small."""

import importlib
from typing import Any

from torch import nn

from support.libraries import alone


def hugging_face(folder: str, layer: str, config: str, **settings: Any) -> nn.Module:
    models = "transformers.models"
    configuration = getattr(importlib.import_module(f"{models}.{folder}"), config)(**settings)
    modeling = importlib.import_module(f"{models}.{folder}.modeling_{folder}")
    module: nn.Module = getattr(modeling, layer)(configuration)
    return module.eval()


def timm_mlp() -> Any:
    """timm's `layers/mlp.py` without its `__init__`, which would import torchvision."""
    return alone("timm", "layers", "mlp")
