"""The contestants of gating alone, `phi(gate) * psi(up)`: forward, a training step, or backward.

Where backward alone is measured, the forward pass is made anew before every step and not timed.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

import gatedffn
from gatedffn import functional
from gatedffn.bench import contestants, gpu_peers
from gatedffn.bench.contestants import PHI, Contestant, by_definition
from gatedffn.bench.inputs import GatingInputs
from gatedffn.bench.workloads import Workload
from gatedffn.layers import GLU, Swish
from gatedffn.variants import PAPER, VARIANTS

Function = Callable[..., Tensor]
"""Of gate and up, of one tensor that holds them side by side, or of one branch without a gate."""


def plain_gating(workload: Workload) -> Function:
    """`phi(gate) * psi(up)` as a user writes it, each spelling written out: every call counts."""
    variant, beta = VARIANTS[workload.variant], workload.beta
    if variant.name not in PAPER:
        # Later variants are not in torch.nn: this is the definition, in PyTorch's operations.
        return partial(by_definition, variant=variant)
    phi = PHI[variant.phi]
    if not variant.gated:
        return phi if beta is None else lambda x: x * torch.sigmoid(beta * x)
    return torch.mul if variant.phi == "identity" else lambda gate, up: phi(gate) * up


def plain_packed_gating(workload: Workload) -> Function:
    """The same of one tensor with the gate in its first half."""
    variant = VARIANTS[workload.variant]
    if variant.name not in PAPER:
        return lambda x: by_definition(*x.chunk(2, -1), variant=variant)
    phi = PHI[variant.phi]

    def packed(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return phi(gate) * up

    return packed


class Gating(Contestant):
    """A function of the branches; what differs is the function."""

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        if workload.backward and workload.device == "cpu":
            return "backward alone is measured on a GPU, where a step is timed by itself"
        return super().refusal(workload)

    def __init__(self, workload: Workload, inputs: GatingInputs, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload = workload
        self.inputs = inputs
        self.given = [inputs.gate] if inputs.up is None else [inputs.gate, inputs.up]
        if workload.part == "packed":
            self.given = [torch.cat(self.given, -1)]
        # For gradients of their own: some write these over the branches.
        self.operands = self.given
        if workload.training:
            self.operands = [tensor.clone().requires_grad_() for tensor in self.given]
        self.function = self.make(workload)
        self.hidden: Tensor | None = None
        self.gradients: tuple[Tensor, ...] = ()

    @abstractmethod
    def make(self, workload: Workload) -> Function:
        """What is called."""

    def mode(self) -> AbstractContextManager[object]:
        return torch.inference_mode(not self.workload.training)

    def prepare(self) -> None:
        if not self.workload.training:
            return
        self.gradients = ()
        with torch.no_grad():
            for operand, values in zip(self.operands, self.given, strict=True):
                operand.copy_(values)
        if self.workload.backward:
            self.hidden = self.function(*self.operands)

    def step(self) -> None:
        if not self.workload.backward:
            self.hidden = self.function(*self.operands)
        if self.workload.training:
            assert self.hidden is not None
            self.gradients = torch.autograd.grad(self.hidden, self.operands, self.inputs.d_hidden)

    def results(self) -> dict[str, Tensor]:
        assert self.hidden is not None
        found = {} if self.workload.backward else {"hidden": self.hidden.detach()}
        packed = self.workload.part == "packed"
        gradients = self.gradients[0].chunk(2, -1) if packed and self.gradients else self.gradients
        return found | dict(zip(("d_gate", "d_up"), gradients, strict=False))

    def release(self) -> None:
        self.hidden, self.gradients = None, ()


class Eager(Gating):
    label = contestants.Eager.label

    def make(self, workload: Workload) -> Function:
        packed = workload.part == "packed"
        return plain_packed_gating(workload) if packed else plain_gating(workload)


class Compiled(Eager):
    label = contestants.Compiled.label
    tunes = True

    def make(self, workload: Workload) -> Function:
        return _compiled(super().make(workload))


class Ours(Gating):
    label = contestants.Ours.label
    tunes = True
    tolerance = contestants.Ours.tolerance

    @classmethod
    def version(cls) -> str:
        return gatedffn.__version__

    def make(self, workload: Workload) -> Function:
        variant = workload.variant
        if workload.part == "packed":
            return GLU(variant, order="gate_up")
        if variant == "swish":
            return Swish(workload.parameters["beta"])
        if VARIANTS[variant].gated:
            return lambda gate, up: functional.gating(gate, up, variant)
        return lambda x: functional.activation(x, variant)


class OursCompiled(Ours):
    label = contestants.OursCompiled.label

    def make(self, workload: Workload) -> Function:
        return _compiled(super().make(workload))


def _compiled(function: Function) -> Function:
    made: Function = torch.compile(function, dynamic=False)
    return made


class Liger(Gating):
    label = gpu_peers.Liger.label
    needs = gpu_peers.Liger.needs

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        return gpu_peers.Liger.refusal(workload)

    def make(self, workload: Workload) -> Function:
        return gpu_peers.liger_function(workload.variant)
