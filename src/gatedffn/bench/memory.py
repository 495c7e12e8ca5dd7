"""What a training step takes in memory, counted from the allocations: the same on each call.

Run as `python -m gatedffn.bench.memory MODE` it is a process that measures one mode, so that no
mode finds scratch that another one has left.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.bench.contestants import EAGER, OURS, load_weights, plain_feed_forward
from gatedffn.bench.devices import place_of
from gatedffn.bench.inputs import Inputs, make_inputs
from gatedffn.bench.messages import Answering, Message, serve
from gatedffn.bench.process import NoAnswer, Process
from gatedffn.bench.workloads import Workload
from gatedffn.layers import FeedForward

PATIENCE = 300.0
MEMORY = "gatedffn.bench.memory"

TILE = 1024
"""Tokens, unless the workload says how many."""


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


def modes(workload: Workload) -> list[str]:
    """Eager PyTorch, and the ways in which this library trains; of what is large the last alone."""
    tiled = f"{OURS}, save=input, tile={workload.tile or TILE}"
    if workload.large:
        return [tiled]
    return [EAGER, OURS, f"{OURS}, save=gate_up", f"{OURS}, save=input", tiled]


def _options(mode: str) -> dict[str, Any]:
    """What a mode gives to the layer.

    >>> _options("gatedffn, save=input, tile=1024")
    {'save': 'input', 'tile': 1024}
    """
    options: dict[str, Any] = dict(word.split("=") for word in mode.split(", ")[1:])
    if "tile" in options:
        options["tile"] = int(options["tile"])
    return options


def make_module(mode: str, workload: Workload) -> nn.Module:
    """The layer of a mode, still without weights."""
    if mode == EAGER:
        return plain_feed_forward(workload)
    return FeedForward(
        workload.d_model,
        workload.d_hidden,
        variant=workload.variant,
        device="meta",
        learnable=False,
        **_options(mode),
    )


def step_memory(mode: str, workload: Workload) -> Memory:
    """The memory of a mode in this process.

    Scratch that is kept from one step to the next counts; what is used only once, to build or to
    choose a path, does not.
    """
    workload = replace(workload, training=True)
    place = place_of(workload.device)
    inputs = make_inputs(workload)
    module = load_weights(make_module(mode, workload), inputs)
    x = inputs.x.requires_grad_()
    leaves = [x, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(module(x), inputs.d_output)

    if workload.device != "cpu":
        _take_workspace(inputs)
    most, left = place.in_use(step)
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return Memory(
        mode=mode,
        extra=most - gradients,
        scratch=left - gradients,
        output=inputs.d_output.nbytes,
        saved=saved_for_backward(lambda: module(x), leaves),
        tokens=workload.tokens,
    )


def _take_workspace(inputs: Inputs) -> None:
    """Has the vendor's library take what it keeps, once for all layers, in forward and backward."""
    x = inputs.x[:1].detach().requires_grad_()
    torch.autograd.backward(x @ inputs.up.detach().t(), inputs.up.detach()[:, 0][None])


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


def measure_memory(
    workload: Workload, folder: Path, patience: float = PATIENCE
) -> Iterator[Memory | str]:
    """Each mode's memory, or why it has none, each measured in a process of its own."""
    threads = torch.get_num_threads()
    processes = {}
    try:
        for number, mode in enumerate(modes(workload)):
            command = [MEMORY, mode]
            processes[mode] = Process(command, folder / f"memory-{number}.stderr", threads)
        for mode, process in processes.items():
            try:
                yield Memory(**process.ask({"workload": asdict(workload)}, patience))
            except NoAnswer as error:
                yield f"{mode}: {error}"
            process.close()
    finally:
        for process in processes.values():
            process.close()


def _make_ready(message: Message) -> tuple[Answering, Message]:
    return lambda _: {}, asdict(step_memory(sys.argv[1], Workload(**message["workload"])))


if __name__ == "__main__":
    serve(_make_ready)
