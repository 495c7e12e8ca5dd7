"""What the layer keeps for backward, in bytes a token, and what backward takes besides."""

import os
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from support.compare import same_bits
from support.layers import LIBRARIES, OWN, Case, Layer, draw, fit, needs, ours, with_gradients
from support.levels import replace_scratch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gatedffn.ops import measure
from gatedffn.ops.feed_forward import backward
from gatedffn.ops.operator import forget_plans
from gatedffn.variants import VARIANTS

TOKENS, D_MODEL, D_HIDDEN, D_OUT = 6, 24, 40, 16
SIZES = (D_MODEL, D_HIDDEN, D_OUT)

# As PyTorch's own functions write the layer, which is what a model has without this library.
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "relu2": lambda gate: F.relu(gate).square(),
    "glu": torch.sigmoid,
    "bilinear": lambda gate: gate,
    "reglu": F.relu,
    "geglu": F.gelu,
    "swiglu": F.silu,
}

# Tensors of (tokens, d_model) and of (tokens, d_hidden) that are kept for backward: by eager
# PyTorch, with save="gate_up" and with save="input".
KEPT: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "relu": ((1, 1), (1, 1), (1, 0)),
    "gelu": ((1, 2), (1, 1), (1, 0)),
    "relu2": ((1, 2), (1, 1), (1, 0)),
    "glu": ((1, 3), (1, 2), (1, 0)),
    "bilinear": ((1, 3), (1, 2), (1, 0)),
    "reglu": ((1, 3), (1, 2), (1, 0)),
    "geglu": ((1, 4), (1, 2), (1, 0)),
    "swiglu": ((1, 4), (1, 2), (1, 0)),
}
backends = pytest.mark.parametrize("backend", [*OWN, *LIBRARIES])
kept = pytest.mark.parametrize("name", list(KEPT))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


def in_pytorch(layer: Layer) -> Tensor:
    w = layer.weights
    hidden = EAGER[layer.row.name](F.linear(layer.x, w.gate, w.gate_bias))
    if w.up is not None:
        hidden = hidden * F.linear(layer.x, w.up, w.up_bias)
    assert w.down is not None
    return F.linear(hidden, w.down, w.down_bias)


def saved_bytes(forward: Callable[[], Tensor], beyond: Iterable[Tensor]) -> int:
    """Bytes of the storages that are saved, once each, beyond those of some tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in beyond}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad  # and it holds what was saved: no address came twice
    return sum(found.values())


def weights_of(layer: Layer) -> list[Tensor]:
    return [tensor for name, tensor in layer.tensors().items() if name != "x"]


@kept
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_bytes_a_token(name: str, dtype: torch.dtype, bias: bool) -> None:
    case = Case(row=VARIANTS[name], batch=(2, 3), sizes=SIZES, dtype=dtype, bias=bias)
    layer = draw(case)
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: in_pytorch(layer),
        lambda: ours(layer),
        lambda: ours(layer, save="input"),
    )
    for way, (of_model, of_hidden) in zip(ways, KEPT[name], strict=True):
        expected = (of_model * D_MODEL + of_hidden * D_HIDDEN) * dtype.itemsize
        assert saved_bytes(way, weights_of(layer)) == TOKENS * expected


@pytest.mark.parametrize("name", list(VARIANTS))
@backends
def test_every_row_and_every_way_saves_the_same(name: str, backend: str) -> None:
    case = Case(row=VARIANTS[name], batch=(TOKENS,), sizes=SIZES, learned="unit")
    layer = draw(fit(backend, case)[0])
    size = layer.x.element_size()
    branches = 2 if layer.row.gated else 1

    def saved(save: str) -> int:
        return saved_bytes(lambda: ours(layer, backend=backend, save=save), weights_of(layer))

    # Beside a learned parameter the others, one number each, travel as tensors too.
    numbers = [value for value in layer.parameters.values() if not isinstance(value, Tensor)]
    constants = 4 * len(numbers) if len(numbers) < len(layer.parameters) else 0
    assert saved("gate_up") == size * TOKENS * (D_MODEL + branches * D_HIDDEN) + constants
    assert saved("input") == size * TOKENS * D_MODEL + constants


def test_gated_linear_saves_no_output() -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], batch=(TOKENS,), sizes=SIZES, down=False))
    saved = [
        saved_bytes(lambda save=save: ours(layer, save=save), weights_of(layer))  # type: ignore[misc]
        for save in ("gate_up", "input")
    ]
    assert saved == [4 * TOKENS * (D_MODEL + 2 * D_HIDDEN), 4 * TOKENS * D_MODEL]


def test_autocast_saves_the_half_input() -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], batch=(TOKENS,), sizes=SIZES, bias=False))

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(layer)

    halves = sum(2 * weight.numel() for weight in weights_of(layer))
    saved = saved_bytes(forward, weights_of(layer)) - halves
    assert saved == 2 * TOKENS * (D_MODEL + 2 * D_HIDDEN)


@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_nothing_is_saved_without_gradients(save: str) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], learned="unit"))

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("a tensor was saved")

    with torch.no_grad(), saved_tensors_hooks(refuse, lambda tensor: tensor):
        ours(layer, save=save)
    frozen = layer.mapped(lambda _, tensor: tensor.detach())
    with saved_tensors_hooks(refuse, lambda tensor: tensor):
        ours(frozen, save=save)


@pytest.mark.parametrize("name", list(VARIANTS))
@backends
def test_computing_again_gives_the_bits_that_saving_gives(name: str, backend: str) -> None:
    case, options = fit(backend, Case(row=VARIANTS[name], learned="unit"))
    layer = draw(case)
    saved = with_gradients(layer, ours(layer, save="gate_up", **options))
    again = with_gradients(layer, ours(layer, save="input", **options))
    for each, value in saved.items():
        assert same_bits(again[each], value), each


# memory of backward


def most_in_backward(tokens: int, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that backward holds at most, beyond what was there before."""
    case = Case(row=VARIANTS["swiglu"], batch=(tokens,), sizes=(32, 256, 32))
    layer = draw(case)
    output = ours(layer, backend="torch", save="input", tile=tile)
    # As in a fresh process, which keeps no scratch memory of an earlier call.
    replace_scratch(monkeypatch, lambda size, _="": torch.empty(size, dtype=torch.uint8))
    # The profiler's library reports its start and stop on the terminal unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        torch.autograd.backward(output, layer.grad)
    assert profile.profiler is not None
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    gradients = sum(t.grad.nbytes for t in layer.tensors().values() if t.grad is not None)
    assert gradients == sum(t.nbytes for t in layer.tensors().values())
    return most - gradients


def test_memory_of_backward_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = 64
    one = tile * 256 * 4  # a tensor of a tile's hidden values
    few, many = (most_in_backward(tokens, tile, monkeypatch) for tokens in (512, 4096))
    # Gate and up again, their gradients and the hidden values, and what is small.
    assert 5 * one <= few <= 5.5 * one
    assert few == many
    whole = most_in_backward(4096, None, monkeypatch)
    assert whole > 10 * many


def test_whole_backward_takes_hidden_units_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("few")
    whole = most_in_backward(1024, None, monkeypatch)
    monkeypatch.setitem(backward.AT_ONCE, "cpu", 1)
    forget_plans()
    parts = most_in_backward(1024, None, monkeypatch)
    one = 1024 * 256 * 4  # a tensor of all hidden values
    assert 5 * one <= whole <= 5.5 * one
    assert parts <= 1.5 * one
