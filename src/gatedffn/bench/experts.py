"""The contestants of stacked experts: what transformers has for them, and this library.

Each is a module that is called with the tokens, their experts and the routing weights, as in a
model. Those of transformers are one of its own classes, which 60 models have alike.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import gatedffn
from gatedffn.bench import contestants
from gatedffn.bench.contestants import PHI, Contestant
from gatedffn.bench.inputs import ExpertsInputs
from gatedffn.bench.workloads import Workload
from gatedffn.experts import Experts as Layer
from gatedffn.variants import PAPER, VARIANTS

MOST_COPIED = 2**32
"""Bytes of weights that one call may copy."""


class Experts(Contestant):
    """A module called as a model calls it; what differs is the module."""

    def __init__(self, workload: Workload, inputs: ExpertsInputs, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload, self.inputs = workload, inputs
        plain = self.make(workload)
        named = {"gate_up_proj": inputs.gate_up, "down_proj": inputs.down}
        plain.load_state_dict(named, assign=True)
        plain.requires_grad_(workload.training)
        self.x = inputs.x.requires_grad_(workload.training)
        self.weights = inputs.weights.requires_grad_(workload.training)
        self.leaves = {"x": self.x, "weights": self.weights, **dict(plain.named_parameters())}
        self.module = self.wrap(plain)
        self.output: Tensor = self.x

    @abstractmethod
    def make(self, workload: Workload) -> nn.Module:
        """The module, still without weights."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """What is called in its place."""
        return module

    def mode(self) -> AbstractContextManager[object]:
        return torch.inference_mode(not self.workload.training)

    def step(self) -> None:
        if self.workload.training:
            for leaf in self.leaves.values():
                leaf.grad = None
        self.output = self.module(self.x, self.inputs.index, self.weights)
        if self.workload.training:
            torch.autograd.backward(self.output, self.inputs.d_output)

    def results(self) -> dict[str, Tensor]:
        found = {"output": self.output.detach()}
        if self.workload.training:
            grads: dict[str, Any] = {name: leaf.grad for name, leaf in self.leaves.items()}
            gate, up = grads["gate_up_proj"].chunk(2, 1)
            found |= {"x": grads["x"], "weights": grads["weights"]}
            found |= {"gate": gate, "up": up, "down": grads["down_proj"]}
        return found

    def release(self) -> None:
        self.output = self.x
        for leaf in self.leaves.values():
            leaf.grad = None

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        if not VARIANTS[workload.variant].gated:
            return "experts are measured with a gate"
        return super().refusal(workload)


class Eager(Experts):
    """A loop over the experts that are named."""

    label = "transformers, eager"
    needs = ("transformers", "torch")
    way = "eager"

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        if workload.variant not in PAPER:
            return f"{workload.variant} is not among its activations"
        return super().refusal(workload)

    def make(self, workload: Workload) -> nn.Module:
        module = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = SimpleNamespace(
            num_experts=workload.experts,
            hidden_size=workload.d_model,
            moe_intermediate_size=workload.d_hidden,
            hidden_act="silu",
            _experts_implementation=self.way,
        )
        with torch.device("meta"):
            made: nn.Module = module.Qwen3MoeExperts(config)
        del made.act_fn  # a function is no module
        made.act_fn = PHI[VARIANTS[workload.variant].phi]  # type: ignore[assignment]
        return made


class GroupedMm(Eager):
    """Its default: one call of PyTorch's grouped product for each projection."""

    label = "transformers, grouped_mm"
    way = "grouped_mm"


class BatchedMm(Eager):
    """Copies the weights of each slot's expert, and multiplies in a batch."""

    label = "transformers, batched_mm"
    way = "batched_mm"

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        slots = workload.tokens * workload.slots
        copied = slots * workload.weights * workload.torch_dtype.itemsize
        if copied > MOST_COPIED:
            return f"a call copies {copied / 2**30:,.0f} GiB of weights"
        return super().refusal(workload)


class Compiled(GroupedMm):
    """The default under torch.compile."""

    label = "torch.compile, grouped_mm"

    def wrap(self, module: nn.Module) -> nn.Module:
        return contestants.compiled(module)


class Ours(Experts):
    label = contestants.Ours.label
    tunes = True
    tolerance = contestants.Ours.tolerance

    @classmethod
    def version(cls) -> str:
        return gatedffn.__version__

    def make(self, workload: Workload) -> nn.Module:
        sizes = workload.d_model, workload.d_hidden, workload.experts
        return Layer(*sizes, variant=workload.variant, device="meta", learnable=False)


class OursCompiled(Ours):
    label = contestants.OursCompiled.label

    def wrap(self, module: nn.Module) -> nn.Module:
        return contestants.compiled(module)
