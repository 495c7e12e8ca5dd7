"""The machine a run ran on, and the memory of a training step."""

from importlib.metadata import version
from typing import Any

import torch

from gatedffn import machine
from gatedffn.compare.models import blank, build
from gatedffn.compare.settings import Setting


def on_gpu() -> bool:
    """Whether runs train on a GPU, with bfloat16 autocast; otherwise on the CPU in float32."""
    return torch.cuda.is_available()


def card() -> dict[str, Any]:
    """What a timing depends on: the machine, its accelerator, and the versions."""
    gpu = torch.cuda.get_device_name() if on_gpu() else None
    return {**machine.card(), "gpu": gpu, "transformers": version("transformers")}


def step_memory(setting: Setting, arm: str, vocabulary: int) -> int:
    """The bytes that a training step holds where its backward pass begins: weights, gradients,
    AdamW's two moments (Adafactor's are sums of rows and columns, and left out), and what forward
    keeps. Counted, so it is the same on each call; nothing
    is trained for it.
    """
    device = "cuda" if on_gpu() else "cpu"
    model = build(setting, arm, vocabulary).to(device)
    inputs = blank(setting, setting.batch, device)
    # Held, so that no other storage gets its address while this counts.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast(device, torch.bfloat16, enabled=on_gpu()):
        loss = model(**inputs)["loss"]
    assert loss.requires_grad
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    saved = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
    copies = 4 if setting.optimizer == "adamw" else 2
    return copies * sum(weights.values()) + saved
