"""What a training step holds, counted from the allocations."""

import pytest
import torch

from gatedffn.bench.contestants import EAGER
from gatedffn.bench.memory import modes, saved_for_backward, step_memory
from gatedffn.bench.records import key, memory_record
from gatedffn.bench.workloads import Workload

WORKLOAD = Workload(tokens=256, d_model=32, d_hidden=64)


def test_eager_saves_four_hidden_tensors() -> None:
    """Gate and its activation, up, and their product."""
    memory = step_memory(EAGER, WORKLOAD)
    assert memory.saved_per_token == 4 * 4 * WORKLOAD.d_hidden
    assert memory.output == 4 * WORKLOAD.tokens * WORKLOAD.d_model
    assert memory.extra > memory.output
    assert memory.scratch == 0


def test_the_same_is_counted_twice() -> None:
    assert step_memory(EAGER, WORKLOAD) == step_memory(EAGER, WORKLOAD)


@pytest.mark.parametrize("mode", modes(WORKLOAD))
def test_our_modes_save_no_more_than_eager(mode: str) -> None:
    memory = step_memory(mode, WORKLOAD)
    assert memory.mode == mode
    assert memory.saved <= step_memory(EAGER, WORKLOAD).saved


def test_a_storage_counts_once_and_leaves_do_not() -> None:
    x = torch.ones(10, requires_grad=True)

    def forward() -> torch.Tensor:
        doubled = 2.0 * x
        return doubled * doubled * x

    assert saved_for_backward(forward, [x]) == 2 * 40


def test_a_mode_that_failed_is_recorded() -> None:
    record = memory_record(WORKLOAD, "gatedffn, save=input: CUDA out of memory", {"run": "now"})
    assert record["mode"] == "gatedffn, save=input"
    assert record["reason"] == "gatedffn, save=input: CUDA out of memory"
    assert key(record) == ("memory", WORKLOAD.name, "gatedffn, save=input")
