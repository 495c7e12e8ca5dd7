"""Contestants that a measurement must survive; a worker imports this file by its own name."""

import os
import sys

import torch
from torch import Tensor, nn

from gatedffn.bench.check import make_slices
from gatedffn.bench.contestants import Eager, load_weights, plain_feed_forward
from gatedffn.bench.inputs import Inputs
from gatedffn.bench.workloads import Workload


class Swapped(Eager):
    label = "swapped"

    def make(self, workload: Workload, inputs: Inputs) -> nn.Module:
        assert inputs.gate is not None
        swapped = Inputs(inputs.x, inputs.up, inputs.gate, inputs.down, inputs.d_output)
        return load_weights(plain_feed_forward(workload), swapped)


class Unwritten(Eager):
    """Right where it is checked, but not a number elsewhere."""

    label = "unwritten"

    def results(self) -> dict[str, Tensor]:
        found = super().results()
        output = found["output"].clone()
        checked = set(make_slices(self.workload).tokens.tolist())
        output[next(token for token in range(self.workload.tokens) if token not in checked), 0] = (
            torch.nan
        )
        return {**found, "output": output}


class Crashing(Eager):
    label = "crashing"

    def step(self) -> None:
        os._exit(3)


class Failing(Eager):
    """Well built, but it fails in its first turn, and there is noise on the answers' channel."""

    label = "failing"
    steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > 3:
            raise RuntimeError("out of luck")
        sys.stdout.write("a framework says something\n")
        os.write(1, b"and its C++ too\n")
        super().step()


class Absent(Eager):
    label = "absent"
    needs = ("no_such_package",)
