"""The machine a run ran on, and the memory of a training step."""

import os
from importlib.metadata import version
from typing import Any

import torch

from gatedffn import machine
from gatedffn.compare.models import build
from gatedffn.compare.settings import Setting


def on_gpu() -> bool:
    """Whether runs train on a GPU, with bfloat16 autocast; otherwise on the CPU in float32."""
    return torch.cuda.is_available()


def card() -> dict[str, Any]:
    """What a timing depends on: the machine, its accelerator, and the versions."""
    gpu = torch.cuda.get_device_name() if on_gpu() else None
    return {**machine.card(), "gpu": gpu, "transformers": version("transformers")}


def step_memory(setting: Setting, arm: str, vocabulary: int) -> int:
    """The most bytes that tensors hold at once in a training step: weights, gradients, AdamW's two
    moments, and what the step makes. Counted from the allocations, so it is the same on each call.
    """
    # The profiler's library reports its start and stop on the terminal unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(setting, arm, vocabulary, "cuda", 2)
        return torch.cuda.max_memory_allocated() - before
    # At first use the ways to compute a layer are measured, each with memory of its own.
    _steps(setting, arm, vocabulary, "cpu", 1)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        _steps(setting, arm, vocabulary, "cpu", 2)
    assert profile.profiler is not None
    in_use = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            most = max(most, in_use)
    return most


def _steps(setting: Setting, arm: str, vocabulary: int, device: str, count: int) -> None:
    """Training steps: the first makes the optimizer's moments, the second has all there is."""
    ids = torch.zeros(setting.batch, setting.context, dtype=torch.long, device=device)
    model = build(setting, arm, vocabulary).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for _ in range(count):
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu()):
            loss = model(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
