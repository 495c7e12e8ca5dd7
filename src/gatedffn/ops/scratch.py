"""Memory that is used again: a fresh page costs more than the arithmetic that is done on it."""

import threading

import torch
from torch import Tensor

KEPT = 32 << 20  # bytes that a thread keeps of each for its next call

_held = threading.local()


def scratch(size: int, purpose: str = "layer") -> Tensor:
    """At least so many bytes, aligned; valid until this thread asks again for that purpose."""
    held: Tensor | None = getattr(_held, purpose, None)
    if held is None or held.numel() < size:
        with torch.inference_mode(mode=False):  # it outlives the mode that is on
            held = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT:
            setattr(_held, purpose, held)
    return held


def matrices(count: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """So many matrices in scratch memory, as one tensor (count, rows, columns)."""
    size = count * rows * columns * like.element_size()
    return scratch(size)[:size].view(like.dtype).view(count, rows, columns)
