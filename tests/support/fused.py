"""Layers for the fused GPU kernels: drawn, laid out in memory as told, and judged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs, fused, fused_backward
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.ops.gating import reference
from gatedffn.variants import Variant
from support.compare import assert_matches
from support.eager import eager_gating

Sizes = tuple[int, int, int]  # tokens, d_model (or d_out), d_hidden
Results = dict[str, Tensor]


def configurations(kernel: configs.Kernel) -> list[tuple[gpu.Kind, Config]]:
    """Every configuration of the table, with every way to read operands that it may end up with."""
    chips = dict.fromkeys(fit.chip for fit in configs.TABLE)
    return list(dict.fromkeys(pair for chip in chips for pair in of_chip(kernel, chip)))


def of_chip(kernel: configs.Kernel, chip: configs.Chip) -> list[tuple[gpu.Kind, Config]]:
    """What a kernel may run with on a chip, and the kinds of products that it is for."""
    fits = [fit for fit in configs.TABLE if fit.kernel == kernel]
    own = [
        (fit.kind, configs.within(fit.config, operands))
        for fit in fits
        for operands in ("descriptors", "joined")
        if fit.chip == chip
    ]
    own += [(fit.kind, configs.askew(fit.config, fit.kind)) for fit in fits if fit.chip == "other"]
    return list(dict.fromkeys(own))


@contextmanager
def set_for(
    kernel: configs.Kernel, kind: gpu.Kind, config: Config, device: torch.device
) -> Iterator[None]:
    """PyTorch set to multiply float32 as a configuration is for.

    On a GPU the configurations of other chips are skipped: they may not fit.
    """
    if not gpu.interpreting():
        chip = configs.chip_of(device)
        if (kind, config) not in of_chip(kernel, chip):
            pytest.skip(f"it is a configuration for another chip than {chip}")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def label(value: object) -> str:
    """The name of a configuration in the list of tests."""
    if not isinstance(value, Config):
        return str(value)
    parts = (value.tokens, value.units, value.deep, value.warps, value.stages, value.subtiles)
    return "-".join([*map(str, parts), value.operands])


def dtypes_of(kind: gpu.Kind) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if kind == "half" else (torch.float32,)


@dataclass(frozen=True, slots=True)
class Placing:
    """Where matrices lie: amid NaNs, `gap` elements between their rows, `margin` around them.

    Rows are aligned to 16 bytes where both are multiples of 8.
    """

    gap: int = 8
    margin: int = 64

    def memory(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        rows, columns = shape
        stride = columns + self.gap
        size = rows * stride + 2 * self.margin
        return torch.full((size,), torch.nan, dtype=like.dtype, device=like.device)

    def view(self, memory: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows, columns = shape
        start = memory.storage_offset() + self.margin
        return memory.as_strided((rows, columns), (columns + self.gap, 1), start)

    def put(self, x: Tensor) -> Tensor:
        """The same matrix (or vector) there."""
        if x.dim() == 1:
            return self.put(x[None])[0]
        view = self.view(self.memory(x.shape, x), x.shape)
        view.copy_(x)
        return view

    def put_both(self, first: Tensor, second: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
        """Two matrices in one memory, in this order or `turned`."""
        memory = self.memory(first.shape, first)
        memory = memory.repeat(2)
        half = memory.numel() // 2
        places = [self.view(part, first.shape) for part in (memory[:half], memory[half:])]
        if turned:
            places.reverse()
        places[0].copy_(first)
        places[1].copy_(second)
        return places[0], places[1]


ALIGNED = Placing()
ODD = Placing(gap=5, margin=67)


def assert_intact(view: Tensor, name: str) -> None:
    """Raises if the NaNs around a matrix of a placing were overwritten."""
    count = view.untyped_storage().nbytes() // view.element_size()
    memory = view.as_strided((count,), (1,), 0)
    around = torch.ones(count, dtype=torch.bool, device=view.device)
    around.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert memory[around].isnan().all(), f"{name} was written beyond its ends"


@dataclass(frozen=True, slots=True)
class Hidden:
    """A call of the forward kernel."""

    row: Variant
    x: Tensor
    gate: Tensor
    up: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    parameters: Mapping[str, Value]

    def double(self) -> "Hidden":
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        return replace(
            self,
            x=self.x.double(),
            gate=self.gate.double(),
            up=wide(self.up),
            gate_bias=wide(self.gate_bias),
            up_bias=wide(self.up_bias),
            parameters={
                n: v.double() if isinstance(v, Tensor) else v for n, v in self.parameters.items()
            },
        )

    def expected(self) -> Results:
        """By PyTorch's own operations in the dtype of the call."""
        results = {"gate": F.linear(self.x, self.gate, self.gate_bias)}
        if self.up is not None:
            results["up"] = F.linear(self.x, self.up, self.up_bias)
        hidden = eager_gating(results["gate"], results.get("up"), self.row, self.parameters)
        return {"hidden": hidden.to(self.x.dtype), **results}


def drawn_parameters(
    row: Variant, units: int, learned: bool, device: torch.device
) -> dict[str, Value]:
    parameters: dict[str, Value] = dict(row.defaults)
    for parameter in row.parameters if learned else ():
        if parameter.learnable:
            # Around a value that no row has by default and every bound allows.
            spread = torch.linspace(-0.1, 0.1, units)
            parameters[parameter.name] = (0.9 + spread).to(device)
    return parameters


def draw_hidden(
    row: Variant,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    learned: bool = False,
) -> Hidden:
    """A call whose gate and up have the size that they have in a network."""
    tokens, d_model, d_hidden = sizes
    generator = torch.Generator().manual_seed(0)
    scale = row.defaults.get("limit", 1.0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).to(device)

    def weight() -> Tensor:
        return normal(d_hidden, d_model).mul(scale / d_model**0.5)

    return Hidden(
        row,
        normal(tokens, d_model),
        weight(),
        weight() if row.gated else None,
        normal(d_hidden) if bias else None,
        normal(d_hidden) if bias and row.gated else None,
        drawn_parameters(row, d_hidden, learned, device),
    )


def by_hidden_kernel(
    call: Hidden,
    config: Config | None = None,
    *,
    placing: Placing = ALIGNED,
    turned: bool = False,
    save: bool = True,
) -> Results:
    """What the kernel writes into NaNs, from operands amid NaNs."""
    gate, up = call.gate, call.up
    if up is not None:
        gate, up = placing.put_both(gate, up, turned)
    else:
        gate = placing.put(gate)
    of = call.x.shape[0], call.gate.shape[0]
    names = ["hidden", *(["gate"] if save else [])]
    names += ["up"] if save and up is not None else []
    made = {name: placing.view(placing.memory(of, call.x), of) for name in names}
    fused.hidden_values(
        placing.put(call.x),
        gate,
        call.gate_bias,
        up,
        call.up_bias,
        call.row.name,
        call.parameters,
        made["hidden"],
        made.get("gate"),
        made.get("up"),
        config,
    )
    for name, result in made.items():
        assert_intact(result, name)
    return made


@dataclass(frozen=True, slots=True)
class Gradients:
    """A call of the backward kernel."""

    row: Variant
    grad: Tensor
    down: Tensor
    gate: Tensor
    up: Tensor | None
    parameters: Mapping[str, Value]

    @property
    def learned(self) -> list[str]:
        return [name for name, value in self.parameters.items() if isinstance(value, Tensor)]

    def truth(self) -> Results:
        """By the definition, in float64."""
        grad = self.grad.double() @ self.down.double()
        up = None if self.up is None else self.up.double()
        wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in self.parameters.items()}
        names = ["gate", *(["up"] if up is not None else []), *self.learned]
        made = reference.gating_backward(grad, self.gate.double(), up, self.row.name, wide, names)
        hidden = reference.gating(self.gate.double(), up, self.row.name, wide)
        return {**dict(zip(names, made, strict=True)), "hidden": hidden}

    def expected(self) -> Results:
        """By PyTorch's own operations and autograd in the dtype of the call."""
        named: dict[str, Value | None] = {"gate": self.gate, "up": self.up}
        named |= self.parameters
        leaves = {
            name: value.detach().clone().requires_grad_()
            for name, value in named.items()
            if isinstance(value, Tensor)
        }
        hidden = eager_gating(
            leaves["gate"], leaves.get("up"), self.row, {**self.parameters, **leaves}
        )
        grad = (self.grad @ self.down).to(hidden.dtype)
        made = torch.autograd.grad(hidden, list(leaves.values()), grad)
        result = {"hidden": hidden.detach().to(self.grad.dtype)}
        return {**dict(zip(leaves, made, strict=True)), **result}


def draw_gradients(
    row: Variant, sizes: Sizes, dtype: torch.dtype, device: torch.device, *, learned: bool = False
) -> Gradients:
    tokens, d_out, units = sizes
    generator = torch.Generator().manual_seed(0)
    scale = row.defaults.get("limit", 1.0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).to(device)

    return Gradients(
        row,
        normal(tokens, d_out),
        normal(d_out, units) / units**0.5,
        scale * normal(tokens, units),
        scale * normal(tokens, units) if row.gated else None,
        drawn_parameters(row, units, learned, device),
    )


def by_gradients_kernel(
    call: Gradients,
    config: Config | None = None,
    *,
    placing: Placing = ALIGNED,
    in_place: bool = False,
) -> Results:
    """What the kernel writes into NaNs, or over the branches; and the sums of the parameters'."""
    names = ["gate", *(["up"] if call.up is not None else [])]
    branches = {
        "gate": placing.put(call.gate),
        **({} if call.up is None else {"up": placing.put(call.up)}),
    }
    of = call.gate.shape
    made = dict(branches) if in_place else {}
    for name in [*names, "hidden"]:
        made.setdefault(name, placing.view(placing.memory(of, call.grad), of))
    sums = fused_backward.branch_gradients(
        placing.put(call.grad),
        placing.put(call.down),
        branches["gate"],
        branches.get("up"),
        call.row.name,
        call.parameters,
        made["gate"],
        made.get("up"),
        made["hidden"],
        call.learned,
        config,
    )
    for name, result in made.items():
        assert_intact(result, name)
    assert all(each.dtype == torch.float64 for each in sums.values())
    return {**made, **{name: each.float() for name, each in sums.items()}}


def judge(actual: Results, truth: Results, eager: Results) -> None:
    """Every result against float64, as near as eager PyTorch's."""
    assert set(actual) <= set(truth)
    for name, result in actual.items():
        assert_matches(result, truth[name], eager[name], name)


def judge_hidden(call: Hidden, actual: Results) -> None:
    judge(actual, call.double().expected(), call.expected())


def judge_gradients(call: Gradients, actual: Results) -> None:
    judge(actual, call.truth(), call.expected())
