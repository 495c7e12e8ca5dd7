"""Who is measured: a class each, built from the same numbers, set up as a competent user would.

A contestant says beforehand whether it can do a workload, does one step at a time, and hands over
what the last step computed. Here are those that are PyTorch; the others are in `peers.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedffn
from gatedffn.bench.inputs import Inputs
from gatedffn.bench.workloads import Device, Workload
from gatedffn.errors import GatedFFNError, SettingError
from gatedffn.explanation import explain
from gatedffn.layers import FeedForward
from gatedffn.ops.gating import reference
from gatedffn.variants import PAPER, VARIANTS, Variant

CONTESTANTS: Mapping[str, str] = MappingProxyType(
    {
        "gatedffn": "gatedffn.bench.contestants:Ours",
        "eager": "gatedffn.bench.contestants:Eager",
        "compile": "gatedffn.bench.contestants:Compiled",
        "onnxruntime": "gatedffn.bench.peers:OnnxRuntime",
        "openvino": "gatedffn.bench.peers:OpenVino",
        "jax": "gatedffn.bench.peers:Jax",
        "gatedffn-compile": "gatedffn.bench.contestants:OursCompiled",
    }
)
"""Every contestant by name, with the module and class that it is."""

GPU_CONTESTANTS: Mapping[str, str] = MappingProxyType(
    {
        "gatedffn": "gatedffn.bench.contestants:Ours",
        "eager": "gatedffn.bench.contestants:Eager",
        "compile": "gatedffn.bench.contestants:Compiled",
        "liger": "gatedffn.bench.gpu_peers:Liger",
        "quack": "gatedffn.bench.gpu_peers:Quack",
        "products": "gatedffn.bench.gpu_peers:Products",
        "gatedffn-compile": "gatedffn.bench.contestants:OursCompiled",
    }
)
"""The same for a GPU."""

GATING_CONTESTANTS: Mapping[str, str] = MappingProxyType(
    {
        "gatedffn": "gatedffn.bench.gating:Ours",
        "eager": "gatedffn.bench.gating:Eager",
        "compile": "gatedffn.bench.gating:Compiled",
        "liger": "gatedffn.bench.gating:Liger",
        "gatedffn-compile": "gatedffn.bench.gating:OursCompiled",
    }
)
"""Those that have gating by itself."""

EXPERTS_CONTESTANTS: Mapping[str, str] = MappingProxyType(
    {
        "gatedffn": "gatedffn.bench.experts:Ours",
        "eager": "gatedffn.bench.experts:Eager",
        "compile": "gatedffn.bench.experts:Compiled",
        "grouped_mm": "gatedffn.bench.experts:GroupedMm",
        "batched_mm": "gatedffn.bench.experts:BatchedMm",
        "gatedffn-compile": "gatedffn.bench.experts:OursCompiled",
    }
)
"""Those that have experts: the ways of transformers, and this library."""

DECODER_CONTESTANTS: Mapping[str, str] = MappingProxyType(
    {
        "gatedffn": "gatedffn.bench.decoder:Ours",
        "eager": "gatedffn.bench.decoder:Eager",
        "compile": "gatedffn.bench.decoder:Compiled",
        "gatedffn-compile": "gatedffn.bench.decoder:OursCompiled",
    }
)
"""A whole model as it comes, or with this library's layers."""

TABLES: Mapping[Device, tuple[Mapping[str, str], ...]] = MappingProxyType(
    {"cpu": (CONTESTANTS, EXPERTS_CONTESTANTS), "cuda": (GPU_CONTESTANTS, EXPERTS_CONTESTANTS)}
)
"""Those of a device; of gating and of decoders there are the same, or less."""


OURS, EAGER, PRODUCTS = "gatedffn", "eager", "products"
OURS_COMPILED = "gatedffn-compile"
"""In a model that is compiled: measured where it is asked for."""
OWN = (OURS, OURS_COMPILED)
"""Those that are this library: all others are peers, or yardsticks."""


class Contestant(ABC):
    """A layer in some framework: weights fixed, sizes fixed, ready to do the same step again."""

    label: str
    needs: tuple[str, ...] = ("torch",)
    """The modules that must be installed; the first one's version is reported."""
    package: str | None = None
    """What has that version, where it is not called as the module is."""
    tunes = False
    """Whether it chooses by timing while it is built: then nothing else may run meanwhile."""
    yardstick = False
    """Whether it is there to compare with, computes no layer, and is not checked."""

    @classmethod
    def alone(cls, workload: Workload) -> bool:
        """Whether nothing else may run while it is built."""
        return cls.tunes or (workload.device == "cuda" and workload.large)

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        """Why it cannot do that workload; None if it can."""
        del workload
        missing = [module for module in cls.needs if find_spec(module) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    @classmethod
    def tolerance(cls, workload: Workload) -> float:
        """How far its error may be above what this project allows itself.

        Sums in other orders differ in float32, and a peer is not wrong for that; what has to be
        found is that it computes something else, or in a smaller dtype. In 16 bits the rounding of
        results hides the order.
        """
        return 8.0 if workload.dtype == "float32" else 1.0

    @classmethod
    def version(cls) -> str | None:
        """The version of what does the work; None where it is not installed."""
        try:
            return version(cls.package or cls.needs[0])
        except PackageNotFoundError:
            return None

    @abstractmethod
    def __init__(self, workload: Workload, inputs: Any, threads: int) -> None: ...

    def mode(self) -> AbstractContextManager[object]:
        """What its steps run in, entered once for many of them."""
        return nullcontext()

    def prepare(self) -> None:  # noqa: B027
        """What a step needs and is not timed: nothing, unless a contestant says otherwise."""

    @abstractmethod
    def step(self) -> None:
        """One forward pass, and backward for a training workload.

        On the processor its results are complete after it, on a GPU they are queued.
        """

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """What the last step computed: "output", and for training the gradients by the names of
        `Inputs`, weights as `torch.nn.Linear` has them.
        """

    def release(self) -> None:  # noqa: B027
        """Lets go of what the last step computed: nothing, unless a contestant says otherwise."""

    def ways(self) -> dict[str, str]:
        """By which way it computes each stage, where it chooses."""
        return {}


class TorchContestant(Contestant):
    """A PyTorch module called as users call it; what differs is the module."""

    def __init__(self, workload: Workload, inputs: Inputs, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload = workload
        self.inputs = inputs
        self.x = inputs.x.requires_grad_(workload.training)
        self.plain = self.make(workload, inputs)
        self.weights = {
            name.removesuffix("_proj"): linear.weight
            for name, linear in self.plain.named_children()
            if isinstance(linear, nn.Linear)
        }
        self.leaves = (self.x, *self.weights.values())
        self.plain.train(workload.training)
        self.module = self.wrap(self.plain)
        self.output: Tensor = self.x

    @abstractmethod
    def make(self, workload: Workload, inputs: Inputs) -> nn.Module:
        """The module, with its projections as children, such as `gate_proj`."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """What is called in its place."""
        return module

    def mode(self) -> AbstractContextManager[object]:
        return torch.inference_mode(not self.workload.training)

    def step(self) -> None:
        if not self.workload.training:
            self.output = self.module(self.x)
            return
        # As an optimizer's zero_grad does: gradients are new tensors in every step.
        for leaf in self.leaves:
            leaf.grad = None
        self.output = self.module(self.x)
        torch.autograd.backward(self.output, self.inputs.d_output)

    def results(self) -> dict[str, Tensor]:
        found = {"output": self.output.detach()}
        if self.workload.training:
            for name, tensor in {"x": self.x, **self.weights}.items():
                assert tensor.grad is not None
                found[name] = tensor.grad
        return found

    def release(self) -> None:
        self.output = self.x
        for leaf in self.leaves:
            leaf.grad = None


def load_weights(module: nn.Module, inputs: Inputs) -> nn.Module:
    """Makes the module's matrices those of the inputs, without a copy."""
    weights = {"gate": inputs.gate, "up": inputs.up, "down": inputs.down}
    named = {
        f"{name}_proj.weight": weight for name, weight in weights.items() if weight is not None
    }
    module.load_state_dict(named, assign=True)
    return module.requires_grad_()


PHI: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "swish": F.silu,
        "sigmoid": torch.sigmoid,
        "identity": lambda x: x,
    }
)
"""The activations of the paper's variants as a user calls them."""


class PlainFeedForward(nn.Module):
    """The layer as a user writes it in PyTorch, without this library."""

    gate_proj: nn.Module
    up_proj: nn.Module

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.variant = VARIANTS[workload.variant]
        for name in self.variant.projections:
            self.add_module(name, _empty_linear(workload.d_model, workload.d_hidden))
        self.down_proj = _empty_linear(workload.d_hidden, workload.d_model)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Each kind is written out: in a step of some microseconds every call counts."""


class PlainGated(PlainFeedForward):
    """A gated variant of the paper."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.phi = PHI[self.variant.phi]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.phi(self.gate_proj(x)) * self.up_proj(x))
        return output


class PlainUngated(PlainGated):
    """A variant of the paper without a gate."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.phi(self.up_proj(x)))
        return output


class PlainLater(PlainFeedForward):
    """A later variant, which is not in `torch.nn`: the definition, in PyTorch's operations."""

    def forward(self, x: Tensor) -> Tensor:
        branches = [getattr(self, name)(x) for name in self.variant.projections]
        hidden = by_definition(*branches, variant=self.variant)
        output: Tensor = self.down_proj(hidden)
        return output


def plain_feed_forward(workload: Workload) -> PlainFeedForward:
    """The plain layer of a workload, without weights."""
    if workload.variant not in PAPER:
        return PlainLater(workload)
    gated = VARIANTS[workload.variant].gated
    return PlainGated(workload) if gated else PlainUngated(workload)


def by_definition(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    variant: Variant,
    parameters: Mapping[str, float] | None = None,
) -> Tensor:
    """The hidden values by the definition, with the variant's own parameters unless given."""
    given = variant.defaults if parameters is None else parameters
    return reference.gating(gate, up, variant.name, given)


def _empty_linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta")


class Eager(TorchContestant):
    """PyTorch as it comes."""

    label = "PyTorch eager"

    def make(self, workload: Workload, inputs: Inputs) -> nn.Module:
        return load_weights(plain_feed_forward(workload), inputs)


class Compiled(Eager):
    """The same module under torch.compile."""

    label = "torch.compile"

    @classmethod
    def alone(cls, workload: Workload) -> bool:
        # For a GPU it chooses among kernels by their times.
        return super().alone(workload) or workload.device == "cuda"

    def wrap(self, module: nn.Module) -> nn.Module:
        return compiled(module)


def compiled(module: nn.Module) -> nn.Module:
    """The module under torch.compile, for the sizes that it is called with."""
    made = torch.compile(module, dynamic=False)
    assert isinstance(made, nn.Module)
    return made


class Ours(TorchContestant):
    """The layer of this library, as it chooses its own path."""

    label = "gatedffn"
    tunes = True

    @classmethod
    def tolerance(cls, workload: Workload) -> float:
        del workload
        return 1.0

    @classmethod
    def version(cls) -> str:
        return gatedffn.__version__

    def make(self, workload: Workload, inputs: Inputs) -> nn.Module:
        layer = FeedForward(
            workload.d_model,
            workload.d_hidden,
            variant=workload.variant,
            device="meta",
            learnable=False,
            save="input" if workload.tile else "gate_up",
            tile=workload.tile,
        )
        return load_weights(layer, inputs)

    def ways(self) -> dict[str, str]:
        if self.workload.device == "cpu":
            return {}
        try:
            explained = explain(self.plain, self.x)[0]
        except (GatedFFNError, RuntimeError) as error:  # the figures stand without it
            return {"explain": f"failed with: {error}"}
        if explained.why is not None:
            return {explained.path: explained.why}
        return {
            stage: f"{decision.chosen} ({decision.reason})"
            for stage, decision in explained.plans.items()
        }


class OursCompiled(Ours):
    """The layer of this library in a model that is compiled."""

    label = "gatedffn, torch.compile"

    def wrap(self, module: nn.Module) -> nn.Module:
        return compiled(module)


def kind_of(place: str) -> type[Contestant]:
    """The class of a contestant, by its module and name.

    >>> kind_of("gatedffn.bench.contestants:Eager").label
    'PyTorch eager'
    """
    module, _, name = place.partition(":")
    kind: type[Contestant] = getattr(import_module(module), name)
    return kind


def find(names: tuple[str, ...], device: Device = "cpu") -> dict[str, str]:
    """The contestants of those names in the tables' order; without names all but those on request.

    Raises:
        SettingError: a name that no table of the device has.

    >>> list(find(("eager", "gatedffn")))
    ['gatedffn', 'eager']
    """
    # Of a name that several tables have the place is the first's; `for_workload` takes its own.
    table = {n: place for of in reversed(TABLES[device]) for n, place in of.items()}
    known = dict.fromkeys(name for of in TABLES[device] for name in of)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingError(
            f"no contestant is called {unknown[0]!r}: choose from {', '.join(known)}"
        )
    wanted = names or [name for name in known if name != OURS_COMPILED]
    return {name: table[name] for name in known if name in wanted}


def for_workload(contestants: Mapping[str, str], workload: Workload) -> dict[str, str]:
    """Those of them that can be measured in a workload, as they are there."""
    tables = {
        "layer": TABLES[workload.device][0],
        "experts": EXPERTS_CONTESTANTS,
        "decoder": DECODER_CONTESTANTS,
    }
    table = tables.get(workload.part, GATING_CONTESTANTS)
    return {name: place for name, place in table.items() if name in contestants}
