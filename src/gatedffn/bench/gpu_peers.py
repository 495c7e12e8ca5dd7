"""The contestants that only GPUs have, and the vendor's products alone, to compare with."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gatedffn.bench.contestants import Contestant, PlainFeedForward, TorchContestant, load_weights
from gatedffn.bench.inputs import Inputs
from gatedffn.bench.workloads import Workload
from gatedffn.variants import VARIANTS

LIGER_FUNCTIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "swiglu": ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
        "geglu_tanh": ("liger_kernel.ops.geglu", "LigerGELUMulFunction"),
    }
)
QUACK_ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "relu": "relu",
        "relu2": "relu_sq",
        "swish": "silu",
        "gelu_tanh": "gelu_tanh_approx",
        "glu": "glu",
        "reglu": "reglu",
        "swiglu": "swiglu",
        "geglu_tanh": "geglu",
    }
)


def liger_function(variant: str) -> Callable[..., Tensor]:
    """Liger-Kernel's gating of two tensors."""
    module, name = LIGER_FUNCTIONS[variant]
    function: Callable[..., Tensor] = getattr(import_module(module), name).apply
    return function


class LigerFeedForward(PlainFeedForward):
    """What `LigerSwiGLUMLP` and `LigerGEGLUMLP` are: PyTorch's projections and one function."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.function = liger_function(workload.variant)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.function(self.gate_proj(x), self.up_proj(x)))
        return output


class Liger(TorchContestant):
    """Liger-Kernel's layer."""

    label = "Liger-Kernel"
    needs = ("liger_kernel", "triton")

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        if workload.variant not in LIGER_FUNCTIONS:
            return f"has no {workload.variant}, only {' and '.join(LIGER_FUNCTIONS)}"
        return super().refusal(workload)

    def make(self, workload: Workload, inputs: Inputs) -> nn.Module:
        return load_weights(LigerFeedForward(workload), inputs)


class Quack(TorchContestant):
    """quack's MLP as it comes: it chooses its kernels by timing them.

    The first projection makes both branches, a gate's unit and its up one side by side.
    """

    label = "quack"
    needs = ("quack", "cutlass")
    package = "quack-kernels"
    tunes = True

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        if workload.variant not in QUACK_ACTIVATIONS:
            return f"has no {workload.variant}, only {', '.join(QUACK_ACTIVATIONS)}"
        if workload.dtype == "float32":
            return "computes float32 in TF32"
        if workload.d_model % 8 or workload.d_hidden % 8:
            return "its kernels need sizes that 8 divides"
        return super().refusal(workload)

    def make(self, workload: Workload, inputs: Inputs) -> nn.Module:
        first = inputs.up
        if inputs.gate is not None:
            first = torch.stack([inputs.gate, inputs.up], dim=1).flatten(0, 1)
        module = import_module("quack.mlp").MLP(
            workload.d_model,
            workload.d_hidden,
            activation=QUACK_ACTIVATIONS[workload.variant],
            device="meta",
            dtype=workload.torch_dtype,
        )
        assert isinstance(module, nn.Module)
        module.load_state_dict({"fc1.weight": first, "fc2.weight": inputs.down}, assign=True)
        return module.requires_grad_()

    def results(self) -> dict[str, Tensor]:
        found = super().results()
        if self.workload.training:
            first, found["down"] = found.pop("fc1"), found.pop("fc2")
            if VARIANTS[self.workload.variant].gated:
                found["gate"], found["up"] = first[::2], first[1::2]
            else:
                found["up"] = first
        return found


class Products(Contestant):
    """The matrix products of a layer by PyTorch and nothing else: no layer, but a yardstick.

    A projection is one product in forward and two more in backward, for its input's gradient and
    its weight's. Where the layer would take gated values or their gradients, these take others of
    the same size.
    """

    label = "vendor products alone"
    yardstick = True

    def __init__(self, workload: Workload, inputs: Inputs, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload = workload
        self.inputs = inputs
        self.first = [weight for weight in (inputs.gate, inputs.up) if weight is not None]

    def mode(self) -> AbstractContextManager[object]:
        return torch.inference_mode()

    def step(self) -> None:
        x, down, d_output = self.inputs.x, self.inputs.down, self.inputs.d_output
        hidden = [torch.mm(x, weight.t()) for weight in self.first]
        torch.mm(hidden[0], down.t())
        if not self.workload.training:
            return
        d_hidden = torch.mm(d_output, down)
        torch.mm(d_output.t(), hidden[0])
        for weight in self.first:
            torch.mm(d_hidden.t(), x)
            torch.mm(d_hidden, weight)

    def results(self) -> dict[str, Tensor]:
        return {}
