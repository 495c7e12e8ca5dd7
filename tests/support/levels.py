"""The compiled kernels' instruction-set levels, and memory that shows what a kernel strays into."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.ops import kernels
from gatedffn.ops.operator import forget_plans

LEVELS = native.levels()


def _why_none() -> str | None:
    if not native.enabled():
        return "compiled code is switched off"
    try:
        native.find_compiler()
    except BuildError as error:
        return str(error)
    return None


WHY_NO_KERNELS = _why_none()

# A compiler that is there and fails is a failure, not a reason to skip.
needs_kernels = pytest.mark.skipif(WHY_NO_KERNELS is not None, reason=str(WHY_NO_KERNELS))
every_level = pytest.mark.parametrize("level", LEVELS)


@contextmanager
def at(level: str) -> Iterator[None]:
    """All kernels are those of a level."""
    library = kernels.library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda asked=None: library(asked or level))
        forget_plans()  # which hold kernels
        yield
    forget_plans()


CPU = torch.device("cpu")
SLACK = 4096  # bytes before and behind scratch memory; keeps the alignment
MARGIN = 67  # elements before and behind; odd, so that nothing in between is aligned


@dataclass(frozen=True, slots=True)
class Guarded:
    """A matrix amid NaNs: what is read there spoils a result, what is written there shows."""

    view: Tensor
    memory: Tensor

    def assert_intact(self, name: str) -> None:
        around = torch.ones_like(self.memory, dtype=torch.bool)
        around.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(
            False
        )
        assert self.memory[around].isnan().all(), f"{name} was written beyond its ends"


def guarded(
    rows: int, columns: int, dtype: torch.dtype, gap: int = 0, device: torch.device = CPU
) -> Guarded:
    """A matrix of NaNs whose rows are `gap` elements further apart than they are long."""
    stride = columns + gap
    memory = torch.full((2 * MARGIN + rows * stride,), torch.nan, dtype=dtype, device=device)
    return Guarded(memory.as_strided((rows, columns), (stride, 1), MARGIN), memory)


def amid_nans(x: Tensor, gap: int = 5) -> Tensor:
    """The same matrix (or vector), with NaNs before, between and behind its rows."""
    rows, columns = (1, x.numel()) if x.dim() == 1 else x.shape
    view = guarded(rows, columns, x.dtype, gap, x.device).view
    view.copy_(x.detach())
    return view[0] if x.dim() == 1 else view


@contextmanager
def guarded_outputs(module: ModuleType) -> Iterator[list[Guarded]]:
    """The matrices that a module makes memory for lie amid NaNs."""
    places: list[Guarded] = []

    def guarding(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def guarded_empty(*args: Any, **kwargs: Any) -> Tensor:
            made = function(*args, **kwargs)
            caller = sys._getframe(1).f_code.co_filename
            if caller != module.__file__ or made.dim() < 2 or not made.is_contiguous():
                return made
            columns = made.shape[-1]
            places.append(guarded(made.numel() // max(columns, 1), columns, made.dtype))
            return places[-1].view.view(made.shape)

        return guarded_empty

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", guarding(torch.empty_like))
        patch.setattr(Tensor, "new_empty", guarding(Tensor.new_empty))
        yield places
    for place in places:
        place.assert_intact("an output")


def replace_scratch(patch: pytest.MonkeyPatch, scratch: Callable[..., Tensor]) -> None:
    """Another source of scratch memory, in every module of the library that has it by name."""
    real = kernels.scratch
    for name, module in list(sys.modules.items()):
        if name.startswith("gatedffn.") and vars(module).get("scratch") is real:
            patch.setattr(module, "scratch", scratch)


@contextmanager
def guarded_scratch() -> Iterator[list[tuple[Tensor, int]]]:
    """Scratch memory of just the size that is asked for, between canaries, of the bits of NaNs."""
    places: list[tuple[Tensor, int]] = []

    def scratch(size: int, _: str = "") -> Tensor:
        memory = torch.full((size + 2 * SLACK,), 0xFF, dtype=torch.uint8)
        places.append((memory, size))
        return memory[SLACK : SLACK + size]

    with pytest.MonkeyPatch.context() as patch:
        replace_scratch(patch, scratch)
        yield places
    for memory, size in places:
        assert (memory[:SLACK] == 0xFF).all()
        assert (memory[SLACK + size :] == 0xFF).all(), f"scratch of {size} bytes is too small"
