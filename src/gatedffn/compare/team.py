"""The processes of a data-parallel run, as torchrun starts them."""

import os
from typing import Any

import torch

from gatedffn.compare.machine import on_gpu


def processes() -> int:
    """How many processes torchrun started, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """The processes that share a run; the first one alone stores and shows."""

    def __init__(self) -> None:
        self.processes = processes()
        self.first = True
        if self.processes > 1:
            from accelerate import PartialState

            self.first = PartialState(cpu=not on_gpu()).is_main_process

    def share(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.processes == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]
