"""The contestants of gating alone, `phi(gate) * psi(up)`: its forward, or its backward.

In a backward workload the forward pass is made anew before every step and is not timed.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

import gatedffn
from gatedffn import functional
from gatedffn.bench import contestants, gpu_peers
from gatedffn.bench.contestants import Contestant, plain_gating
from gatedffn.bench.inputs import GatingInputs
from gatedffn.bench.workloads import Workload
from gatedffn.variants import VARIANTS

Function = Callable[[Tensor, Tensor | None], Tensor]


class Gating(Contestant):
    """A function of both branches; what differs is the function."""

    def __init__(self, workload: Workload, inputs: GatingInputs, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload = workload
        self.inputs = inputs
        self.given = {"d_gate": inputs.gate}
        if inputs.up is not None:
            self.given["d_up"] = inputs.up
        # In backward of their own: some write the gradients over the branches.
        self.branches = list(self.given.values())
        if workload.training:
            self.branches = [branch.clone().requires_grad_() for branch in self.branches]
        self.function = self.make(workload)
        self.hidden: Tensor | None = None
        self.gradients: tuple[Tensor, ...] = ()

    @abstractmethod
    def make(self, workload: Workload) -> Function:
        """What is called."""

    def _call(self) -> Tensor:
        gate, *up = self.branches
        return self.function(gate, up[0] if up else None)

    def prepare(self) -> None:
        if not self.workload.training:
            return
        self.gradients = ()
        with torch.no_grad():
            for branch, values in zip(self.branches, self.given.values(), strict=True):
                branch.copy_(values)
        self.hidden = self._call()

    def step(self) -> None:
        if self.workload.training:
            assert self.hidden is not None
            self.gradients = torch.autograd.grad(self.hidden, self.branches, self.inputs.d_hidden)
            return
        with torch.inference_mode():
            self.hidden = self._call()

    def results(self) -> dict[str, Tensor]:
        if self.workload.training:
            return dict(zip(self.given, self.gradients, strict=True))
        assert self.hidden is not None
        return {"hidden": self.hidden}

    def release(self) -> None:
        self.hidden, self.gradients = None, ()


class Eager(Gating):
    label = contestants.Eager.label

    def make(self, workload: Workload) -> Function:
        variant = VARIANTS[workload.variant]
        return lambda gate, up: plain_gating(variant, gate, up)


class Compiled(Eager):
    label = contestants.Compiled.label
    tunes = True

    def make(self, workload: Workload) -> Function:
        compiled: Function = torch.compile(super().make(workload), dynamic=False)
        return compiled


class Ours(Gating):
    label = contestants.Ours.label
    tunes = True
    tolerance = contestants.Ours.tolerance

    @classmethod
    def version(cls) -> str:
        return gatedffn.__version__

    def make(self, workload: Workload) -> Function:
        def call(gate: Tensor, up: Tensor | None) -> Tensor:
            if up is None:
                return functional.activation(gate, workload.variant)
            return functional.gating(gate, up, workload.variant)

        return call


class Liger(Gating):
    label = gpu_peers.Liger.label
    needs = gpu_peers.Liger.needs

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        return gpu_peers.Liger.refusal(workload)

    def make(self, workload: Workload) -> Function:
        function = gpu_peers.liger_function(workload.variant)
        return lambda gate, up: function(gate, up)
