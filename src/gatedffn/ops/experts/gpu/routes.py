"""Which expert takes which slots, made on the device: nothing waits for a number of it."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gatedffn.ops import gpu
from gatedffn.ops.experts.gpu.kernels import blocks_kernel


class Blocks(NamedTuple):
    """The expert and the first row of each block, in two rows, and how many there may be at most:
    one that is not full for each expert that has any row, and the others full.
    """

    table: Tensor
    most: int


class Routes:
    """The slots of a call, sorted by expert and then by place; those without one here are not
    between `starts`, which are where the rows of each expert begin, and of the last end.

    A number below 0 ends the work of the device with an error, as PyTorch's own indices do.
    """

    def __init__(self, index: Tensor, experts: int) -> None:
        self.index = index.reshape(-1).contiguous()
        self.slots, self.experts = index.shape[-1], experts
        self.rows = self.index.numel()
        keys, self.order = self.index.sort(stable=True)
        torch._assert_async(
            keys[0] >= 0,
            "index holds a number below 0: experts count from 0",
        )
        numbers = torch.arange(experts + 1, dtype=index.dtype, device=index.device)
        self.starts = torch.searchsorted(keys, numbers, out_int32=True)
        self._blocks: dict[int, Blocks] = {}

    @property
    def filled(self) -> int:
        """The experts that have any row, at most."""
        return min(self.rows, self.experts)

    def blocks(self, rows: int) -> Blocks:
        """The blocks of so many rows."""
        if rows not in self._blocks:
            most = self.filled + (self.rows - self.filled) // rows
            table = self.index.new_empty(2, most, dtype=torch.int32)
            with gpu.on_device_of(table):
                blocks_kernel[(1,)](
                    *(self.starts, table, self.experts, most),
                    ROWS=rows,
                    EXPERTS=triton.next_power_of_2(self.experts),
                )
            self._blocks[rows] = Blocks(table, most)
        return self._blocks[rows]
