"""The cases of the whole layer: its operands, the options of the engine, and how it is judged."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.functional import feed_forward, gated_linear
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import Weights
from gatedffn.ops.feed_forward.products import has_onednn
from gatedffn.ops.feed_forward.ways import MOST_FEW, WAYS
from gatedffn.ops.plan import DEFINITION
from gatedffn.variants import Variant
from support.compare import assert_matches
from support.eager import eager_gating
from support.levels import WHY_NO_KERNELS

Results = dict[str, Tensor]
Learned = Literal["", "layer", "unit"]
# Every way that the table has for a processor, and the definition.
BACKENDS = (*dict.fromkeys(way.name for way in WAYS.ways if "cpu" in way.hardware), DEFINITION)
OWN = ("blocks", "tiles", "few")  # those that are kernels of our own
LIBRARIES = tuple(name for name in BACKENDS if name not in (*OWN, DEFINITION))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is drawn: a row, the sizes, the dtype, and what the layer has besides weights."""

    row: Variant
    batch: tuple[int, ...] = (37,)
    sizes: tuple[int, int, int] = (24, 40, 16)  # d_model, d_hidden, d_out
    dtype: torch.dtype = torch.float32
    bias: bool = True
    learned: Learned = ""
    down: bool = True


@dataclass(frozen=True, slots=True)
class Layer:
    """The operands of a layer, its parameters and an incoming gradient."""

    row: Variant
    x: Tensor
    weights: Weights
    parameters: Mapping[str, Value]
    grad: Tensor

    def tensors(self) -> Results:
        """Everything that a gradient can be asked of, by name."""
        named: dict[str, Value | None] = {"x": self.x, **self.weights._asdict(), **self.parameters}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Layer":
        """The layer with every operand changed; `change` gets its name."""
        weights = {
            name: None if w is None else change(name, w)
            for name, w in self.weights._asdict().items()
        }
        parameters = {
            name: change(name, value) if isinstance(value, Tensor) else value
            for name, value in self.parameters.items()
        }
        changed = Weights(**weights)  # type: ignore[arg-type]  # the required ones stay tensors
        return replace(self, x=change("x", self.x), weights=changed, parameters=parameters)

    def to(self, dtype: torch.dtype) -> "Layer":
        """The same numbers in another dtype, each tensor a leaf that takes a gradient."""
        made = self.mapped(lambda _, t: t.detach().to(dtype, copy=True).requires_grad_())
        return replace(made, grad=self.grad.detach().to(dtype))


def draw(case: Case, seed: int = 0) -> Layer:
    """A layer whose gate and up have the size that they have in a network.

    Rows that clamp get inputs of the size of their limit.
    """
    generator = torch.Generator().manual_seed(seed)
    (d_model, d_hidden, d_out), row = case.sizes, case.row

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = row.defaults.get("limit", 1.0)
    weights = Weights(
        normal(d_hidden, d_model) / max(d_model, 1) ** 0.5,
        normal(d_hidden, d_model) / max(d_model, 1) ** 0.5 if row.gated else None,
        normal(d_out, d_hidden) / max(d_hidden, 1) ** 0.5 if case.down else None,
        normal(d_hidden) if case.bias else None,
        normal(d_hidden) if case.bias and row.gated else None,
        normal(d_out) if case.bias and case.down else None,
    )
    parameters: dict[str, Value] = dict(row.defaults)
    for parameter in row.parameters if case.learned else ():
        if parameter.learnable:
            # Around a value that no row has by default and every bound allows.
            size = d_hidden if case.learned == "unit" else 1
            spread = torch.linspace(-0.1, 0.1, d_hidden, dtype=torch.float64)[:size]
            parameters[parameter.name] = 0.9 + spread
    width = d_out if case.down else d_hidden
    x, grad = scale * normal(*case.batch, d_model), normal(*case.batch, width)
    return Layer(row, x, weights, parameters, grad).to(case.dtype)


def ours(layer: Layer, **options: Any) -> Tensor:
    """The public function that fits, with options of the engine."""
    w = layer.weights
    given: dict[str, Any] = {"variant": layer.row, **layer.parameters, **options}
    if w.down is None:
        assert w.up is not None
        return gated_linear(layer.x, w.gate, w.up, w.gate_bias, w.up_bias, **given)
    if w.up is None:
        alone = None, w.gate_bias, w.down_bias
        return feed_forward(layer.x, None, w.gate, w.down, *alone, **given)
    biases = w.gate_bias, w.up_bias, w.down_bias
    return feed_forward(layer.x, w.gate, w.up, w.down, *biases, **given)


def by_hand(layer: Layer) -> Tensor:
    """The same written in PyTorch: two or three linear layers around a formula."""
    w = layer.weights
    gate = F.linear(layer.x, w.gate, w.gate_bias)
    up = None if w.up is None else F.linear(layer.x, w.up, w.up_bias)
    hidden = eager_gating(gate, up, layer.row, layer.parameters)
    return hidden if w.down is None else F.linear(hidden, w.down, w.down_bias)


def with_gradients(layer: Layer, output: Tensor) -> Results:
    """The output and the gradient of every operand, by name."""
    tensors = layer.tensors()
    found = torch.autograd.grad(output, list(tensors.values()), layer.grad)
    return {"output": output.detach(), **dict(zip(tensors, found, strict=True))}


Yardstick = tuple[Results, Results]


def yardstick(layers: Sequence[Layer]) -> Yardstick:
    """The truth in float64, and what eager PyTorch makes of it, of all layers together."""
    doubled = [layer.to(torch.float64) for layer in layers]
    truth = [with_gradients(layer, by_hand(layer)) for layer in doubled]
    eager = [with_gradients(layer, by_hand(layer)) for layer in layers]
    return stacked(truth), stacked(eager)


def stacked(results: Sequence[Results]) -> Results:
    return {name: torch.stack([each[name] for each in results]) for name in results[0]}


def judge(
    found: Sequence[Results], layers: Sequence[Layer], against: Yardstick | None = None
) -> None:
    """Holds all results together to the truth, and to what eager PyTorch makes of it."""
    truth, eager = yardstick(layers) if against is None else against
    assert all(each.keys() == truth.keys() for each in found)
    for name, actual in stacked(found).items():
        assert_matches(actual, truth[name], eager[name], name)


@functools.lru_cache(maxsize=512)
def several(case: Case) -> tuple[list[Layer], Yardstick]:
    """Draws that are judged together: on a few numbers eager PyTorch can be exact by luck."""
    d_model, d_hidden, d_out = case.sizes
    outputs = torch.Size(case.batch).numel() * min(d_hidden, d_out)
    smallest = d_hidden * min(d_model, d_out)  # numbers of a weight's gradient
    count = max(640 // max(outputs, 1), 4096 // max(smallest, 1))
    layers = [draw(case, seed) for seed in range(min(48, max(6, count)))]
    return layers, yardstick(layers)


def check(case: Case, **options: Any) -> None:
    """Judges the output and every gradient of a case."""
    layers, against = several(case)
    found = [with_gradients(layer, ours(layer, **options)) for layer in layers]
    judge(found, layers, against)


def needs(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Skips what this machine has no kernels or no oneDNN for."""
    if backend in OWN and WHY_NO_KERNELS is not None:
        pytest.skip(WHY_NO_KERNELS)
    if backend == "tiles" and not (dtype == torch.bfloat16 and kernels.has_tiles()):
        pytest.skip("tiles are for bfloat16, and for processors that multiply them")
    if backend == "onednn" and not has_onednn(dtype):
        pytest.skip(f"oneDNN has no linear layer for {dtype} here")


def fit(backend: str, case: Case, *, dtype: bool = False) -> tuple[Case, dict[str, Any]]:
    """The case and the options with which a backend takes it; skips where it never does.

    `dtype` is whether the dtype of the case matters: else it becomes one that the backend takes.
    """
    if backend == "tiles" and not dtype:
        case = replace(case, dtype=torch.bfloat16)
    needs(backend, case.dtype)
    if backend != "few":
        return case, {"backend": backend}
    tokens = torch.Size(case.batch).numel()
    batch = case.batch if tokens <= MOST_FEW else (MOST_FEW,)
    return replace(case, batch=batch), {"backend": backend}
