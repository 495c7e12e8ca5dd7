"""What a training step takes in memory, counted from the allocations: the same on each call.

Run as `python -m gatedffn.bench.memory MODE` it is a process that measures one mode, so that no
mode finds scratch that another one has left.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.bench.contestants import EAGER, PlainFeedForward, load_weights
from gatedffn.bench.inputs import make_inputs
from gatedffn.bench.process import NoAnswer, Process
from gatedffn.bench.protocol import Message, Turn, serve
from gatedffn.bench.rows import Row
from gatedffn.layers import FeedForward

SECOND_STEP = "gatedffn: second step"
PATIENCE = 300.0

_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gatedffn": {},
        "gatedffn, save=gate_up": {"save": "gate_up"},
        "gatedffn, save=input": {"save": "input"},
        "gatedffn, save=input, tile=1024": {"save": "input", "tile": 1024},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a training step in one mode.

    `extra` is the most that tensors hold at once beyond weights, inputs and gradients; the output
    is part of it, and so is `scratch`, which stays from one step to the next, once for all layers.
    `saved` is what forward keeps for backward beyond weights and input.
    """

    mode: str
    extra: int
    scratch: int
    output: int
    saved: int
    tokens: int

    @property
    def saved_per_token(self) -> float:
        return self.saved / self.tokens


def modes() -> list[str]:
    """Eager PyTorch, and the ways in which this library trains."""
    known = inspect.signature(FeedForward.__init__).parameters
    return [EAGER, *(mode for mode, options in _OPTIONS.items() if options.keys() <= known.keys())]


def make_module(mode: str, row: Row) -> nn.Module:
    """The layer of a mode, still without weights."""
    if mode == EAGER:
        return PlainFeedForward(row)
    return FeedForward(
        row.d_model,
        row.d_hidden,
        variant=row.variant,
        device="meta",
        learnable=False,
        **_OPTIONS[mode],
    )


def step_memory(mode: str, row: Row) -> Memory:
    """The memory of a mode in this process.

    Scratch that is kept from one step to the next counts; what is used only once, to build or to
    choose a path, does not.
    """
    row = replace(row, training=True)
    inputs = make_inputs(row)
    module = load_weights(make_module(mode, row), inputs)
    x = inputs.x.requires_grad_()
    leaves = [x, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(module(x), inputs.d_output)

    most, left = in_use(step)
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return Memory(
        mode=mode,
        extra=most - gradients,
        scratch=left - gradients,
        output=inputs.d_output.nbytes,
        saved=saved_for_backward(lambda: module(x), leaves),
        tokens=row.tokens,
    )


def in_use(step: Callable[[], None]) -> tuple[int, int]:
    """Bytes of CPU tensors in the second of two steps, of all made since before the first.

    Returns: the most at once, and those that are left at the end.
    """
    # The profiler's library reports its start and stop on the terminal unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
        with torch.profiler.record_function(SECOND_STEP):
            step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    start = min(event.start_ns() for event in events if event.name() == SECOND_STEP)
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() >= start:
                most = max(most, held)
    return most, held


def saved_for_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Bytes of the storages that `forward` saves for backward, beyond those of `leaves`."""
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad  # and it still holds what was saved: no address came twice
    return sum(found.values())


def measure_memory(row: Row, folder: Path) -> Iterator[Memory | str]:
    """Each mode's memory, or why it has none, each measured in a process of its own."""
    threads = torch.get_num_threads()
    processes = {}
    try:
        for number, mode in enumerate(modes()):
            command = ["gatedffn.bench.memory", mode]
            processes[mode] = Process(command, folder / f"memory-{number}.stderr", threads)
        for mode, process in processes.items():
            try:
                yield Memory(**process.ask({"row": asdict(row)}, PATIENCE))
            except NoAnswer as error:
                yield f"{mode}: {error}"
            process.close()
    finally:
        for process in processes.values():
            process.close()


def _make_ready(message: Message) -> tuple[Turn, Message]:
    return lambda _: {}, asdict(step_memory(sys.argv[1], Row(**message["row"])))


if __name__ == "__main__":
    serve(_make_ready)
