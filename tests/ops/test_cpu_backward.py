"""The gradients by blocks of own code: every instruction set, sizes that are ragged."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.cases import dtypes
from support.layers import Case, check, draw, ours, with_gradients
from support.levels import at, every_level, guarded_scratch, needs_kernels

from gatedffn.ops.feed_forward import backward
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels
# Hidden units all at once, in one call where that can be, and in parts.
at_once = pytest.mark.parametrize("at_once", [backward.AT_ONCE["cpu"], 1], ids=["whole", "parts"])


@pytest.fixture(autouse=True)
def guards() -> Iterator[None]:
    with guarded_scratch() as places:
        yield
    assert places, "no call of own code was made"


@every_level
@dtypes
@pytest.mark.parametrize("sizes", [(24, 40, 16), (1, 1, 1), (67, 35, 18)], ids=str)
@pytest.mark.parametrize("tokens", [2, 19])  # of one, a gradient is a single sum: luck
def test_every_level(
    level: str, dtype: torch.dtype, sizes: tuple[int, int, int], tokens: int
) -> None:
    case = Case(row=VARIANTS["swiglu"], batch=(tokens,), sizes=sizes, dtype=dtype)
    with at(level):
        check(case, backend="blocks")


@every_level
@at_once
@pytest.mark.parametrize(
    ("name", "down"), [("gelu", True), ("xielu", True), ("swiglu", True), ("swiglu", False)]
)
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("tile", [None, 9])
def test_every_kind(
    level: str,
    at_once: int,
    name: str,
    down: bool,
    save: str,
    tile: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = VARIANTS[name]
    monkeypatch.setitem(backward.AT_ONCE, "cpu", at_once)
    learned = any(parameter.learnable for parameter in row.parameters)
    case = Case(row=row, batch=(20,), down=down, learned="unit" if learned else "")
    with at(level):
        check(case, backend="blocks", save=save, tile=tile)


@at_once
def test_faults_are_seen(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backward.AT_ONCE, "cpu", at_once)
    layer = draw(Case(row=VARIANTS["swiglu"]))
    w = layer.weights
    assert w.up is not None
    swapped = replace(layer, weights=w._replace(gate=w.up, up=w.gate))
    expected, found = (with_gradients(o, ours(o, backend="blocks")) for o in (layer, swapped))
    assert not torch.allclose(found["x"], expected["x"])
