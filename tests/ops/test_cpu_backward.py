"""The gradients by blocks in one call of own code: every instruction set, sizes that are ragged."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from support.layers import Case, Layer, check, draw, needs, ours, with_gradients
from support.levels import every_level, needs_kernels
from torch import Tensor

from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import backward
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels
SLACK = 256  # bytes before and behind scratch memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, int]]]:
    """Scratch memory of just the size that is asked for, between canaries, of the bits of NaNs."""
    places: list[tuple[Tensor, int]] = []

    def scratch(size: int, _: str = "") -> Tensor:
        memory = torch.full((size + 2 * SLACK,), 0xFF, dtype=torch.uint8)
        places.append((memory, size))
        return memory[SLACK : SLACK + size]

    monkeypatch.setattr(backward, "scratch", scratch)
    yield places
    assert places, "no call of own code was made"
    for memory, size in places:
        assert (memory[:SLACK] == 0xFF).all()
        assert (memory[SLACK + size :] == 0xFF).all(), f"scratch of {size} bytes is too small"


def at(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "_by_blocks", partial(backward._by_blocks, level=level))


@every_level
@dtypes
@pytest.mark.parametrize("sizes", [(24, 40, 16), (1, 1, 1), (67, 35, 18)], ids=str)
@pytest.mark.parametrize("tokens", [2, 19])  # of one, a gradient is a single sum: luck
def test_every_level(
    level: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs("blocks")
    at(level, monkeypatch)
    case = Case(row=VARIANTS["swiglu"], batch=(tokens,), sizes=sizes, dtype=dtype)
    check(case, backend="blocks")


@every_level
@pytest.mark.parametrize(
    ("name", "down"), [("gelu", True), ("xielu", True), ("swiglu", True), ("swiglu", False)]
)
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("tile", [None, 9])
def test_every_kind(
    level: str,
    name: str,
    down: bool,
    save: str,
    tile: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = VARIANTS[name]
    at(level, monkeypatch)
    monkeypatch.setitem(backward.AT_ONCE, "cpu", 1)
    learned = any(parameter.learnable for parameter in row.parameters)
    case = Case(row=row, batch=(20,), down=down, learned="unit" if learned else "")
    check(case, backend="blocks", save=save, tile=tile)


def swapped(layer: Layer) -> Layer:
    w = layer.weights
    assert w.up is not None
    return Layer(
        layer.row,
        layer.x,
        w._replace(gate=w.up, up=w.gate),
        layer.parameters,
        layer.grad,
    )


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    expected = with_gradients(layer, ours(layer, backend="blocks"))
    found = with_gradients(swapped(layer), ours(swapped(layer), backend="blocks"))
    assert not torch.allclose(found["x"], expected["x"])
    at(kernels.level(), monkeypatch)
    again = with_gradients(layer, ours(layer, backend="blocks"))
    assert all(torch.equal(again[name], expected[name]) for name in expected)
