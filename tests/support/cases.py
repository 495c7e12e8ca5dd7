"""The cases of the suite: every row of the table, in every dtype, at shapes that go wrong.

Inputs have the size that they have in a network, N(0, 1), and gate and up are drawn apart, so
that swapping them shows. Rows that clamp get inputs of the size of their limit, since a clamp
that never acts cannot be seen to be missing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.functional import activation, gating
from gatedffn.variants import VARIANTS, Variant
from support.eager import eager_gating

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# One element; one row; widths around the sizes of tiles and vectors; several batch dimensions.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "single": (1,),
    "row": (1, 63),
    "ragged": (5, 127),
    "wide": (3, 1031),
    "batch": (2, 3, 64),
}

rows = pytest.mark.parametrize("row", VARIANTS.values(), ids=list(VARIANTS))
gated_rows = pytest.mark.parametrize(
    "row",
    [row for row in VARIANTS.values() if row.gated],
    ids=[row.name for row in VARIANTS.values() if row.gated],
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))

# Each row with its parameters as numbers, and where they can be learned, as tensors.
CASES = [(row, False) for row in VARIANTS.values()] + [
    (row, True) for row in VARIANTS.values() if any(p.learnable for p in row.parameters)
]
cases = pytest.mark.parametrize(
    ("row", "learned"), CASES, ids=[f"{row.name}{'-learned' * learned}" for row, learned in CASES]
)
FEW = [(VARIANTS["gelu"], False), (VARIANTS["swiglu_oai"], False), (VARIANTS["xielu"], True)]
few_cases = pytest.mark.parametrize(
    ("row", "learned"), FEW, ids=[f"{row.name}{'-learned' * learned}" for row, learned in FEW]
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a row is computed on: its branches, its parameters and an incoming gradient."""

    row: Variant
    gate: Tensor
    up: Tensor | None
    parameters: Mapping[str, Value]
    grad: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a gradient can be asked of, by name."""
        named: dict[str, Value | None] = {"gate": self.gate, "up": self.up}
        named |= self.parameters
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype, each tensor a leaf that takes a gradient."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_()

        return Inputs(
            self.row,
            leaf(self.gate),
            None if self.up is None else leaf(self.up),
            {n: leaf(v) if isinstance(v, Tensor) else v for n, v in self.parameters.items()},
            self.grad.detach().to(dtype),
        )


def draw(
    row: Variant,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    learned: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs of a row; `learned` makes its learnable parameters tensors, one per last index."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scale = row.defaults.get("limit", 1.0)
    parameters: dict[str, Value] = dict(row.defaults)
    if learned:
        for parameter in row.parameters:
            if parameter.learnable:
                # Around a value that no row has by default and every bound allows.
                spread = torch.linspace(-0.1, 0.1, shape[-1], dtype=torch.float64)
                parameters[parameter.name] = 0.9 + spread
    return Inputs(
        row,
        scale * normal(*shape),
        scale * normal(*shape) if row.gated else None,
        parameters,
        normal(*shape),
    ).to(dtype)


def ours(inputs: Inputs) -> Tensor:
    """The hidden values by the public function that fits the row."""
    return compute(inputs.row, inputs.gate, inputs.up, inputs.parameters)


def compute(
    row: Variant, gate: Tensor, up: Tensor | None, parameters: Mapping[str, Value]
) -> Tensor:
    if up is None:
        return activation(gate, row, **parameters)
    return gating(gate, up, row, **parameters)


def eager(inputs: Inputs) -> Tensor:
    """The hidden values as written by hand in PyTorch."""
    return eager_gating(inputs.gate, inputs.up, inputs.row, inputs.parameters)


def gradients(output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """The gradient of every tensor among the inputs."""
    tensors = inputs.tensors()
    found = torch.autograd.grad(output, list(tensors.values()), inputs.grad.to(output.dtype))
    return dict(zip(tensors, found, strict=True))


def with_gradients(inputs: Inputs, *, by_hand: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The output and every gradient, by name."""
    output = eager(inputs) if by_hand else ours(inputs)
    yield "output", output.detach()
    yield from gradients(output, inputs).items()


def as_function(inputs: Inputs) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The public call as a function of every tensor among the inputs, and those tensors."""
    names = list(inputs.tensors())

    def call(*tensors: Tensor) -> Tensor:
        given: dict[str, Tensor] = dict(zip(names, tensors, strict=True))
        gate, up = given.pop("gate"), given.pop("up", None)
        parameters: dict[str, Value] = {**inputs.parameters, **given}
        return compute(inputs.row, gate, up, parameters)

    return call, list(inputs.tensors().values())
