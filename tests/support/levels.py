"""The compiled kernels' instruction-set levels, and memory that shows what a kernel strays into."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gatedffn import native
from gatedffn.errors import BuildError

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

CPU = torch.device("cpu")
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
