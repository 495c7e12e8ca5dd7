"""The gradients by own code: every instruction set, sizes that are ragged."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.cases import dtypes
from support.layers import Case, check, draw, judge, ours, with_gradients
from support.levels import at, every_level, guarded_outputs, guarded_scratch, needs_kernels

from gatedffn.ops.feed_forward import backward
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels
# Blocks take hidden units all at once, in one call where that can be, and in parts.
WHOLE = backward.AT_ONCE["cpu"]
ways = pytest.mark.parametrize(
    ("backend", "at_once"),
    [("few", WHOLE), ("blocks", WHOLE), ("blocks", 1)],
    ids=["few", "blocks", "parts"],
)


@pytest.fixture(autouse=True)
def guards() -> Iterator[None]:
    """Gradients lie amid NaNs and scratch memory between canaries."""
    with guarded_outputs(backward) as outputs, guarded_scratch() as scratches:
        yield
    assert outputs, "no gradient was guarded"
    assert scratches, "no call of own code was made"


@every_level
@dtypes
@pytest.mark.parametrize("backend", ["few", "blocks"])
@pytest.mark.parametrize("sizes", [(24, 40, 16), (1, 1, 1), (67, 35, 18), (131, 97, 116)], ids=str)
@pytest.mark.parametrize("tokens", [2, 7, 19, 32])  # of one, a gradient is a single sum: luck
def test_every_level(
    level: str, dtype: torch.dtype, sizes: tuple[int, int, int], tokens: int, backend: str
) -> None:
    case = Case(row=VARIANTS["swiglu"], batch=(tokens,), sizes=sizes, dtype=dtype)
    with at(level):
        check(case, backend=backend)


@every_level
@dtypes
@pytest.mark.parametrize("backend", ["few", "blocks"])
def test_a_token_alone_has_the_gradient_that_it_has_amid_zeros(
    level: str, dtype: torch.dtype, backend: str
) -> None:
    one = draw(Case(row=VARIANTS["swiglu"], batch=(1,), sizes=(67, 35, 18), dtype=dtype))
    zeros = torch.zeros(3, 67, dtype=dtype)
    amid = replace(
        one,
        x=torch.cat([one.x.detach(), zeros]).requires_grad_(),
        grad=torch.cat([one.grad, zeros[:, :18]]),
    )
    with at(level):
        found, expected = (with_gradients(o, ours(o, backend=backend)) for o in (one, amid))
    for name in ("x", "output"):
        expected[name] = expected[name][:1]
    torch.testing.assert_close(found, expected)


@every_level
@ways
@pytest.mark.parametrize(
    ("name", "down"), [("gelu", True), ("xielu", True), ("swiglu", True), ("swiglu", False)]
)
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("tile", [None, 9])
def test_every_kind(
    level: str,
    backend: str,
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
        check(case, backend=backend, save=save, tile=tile)


@ways
def test_faults_are_seen(backend: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backward.AT_ONCE, "cpu", at_once)
    layer = draw(Case(row=VARIANTS["swiglu"], batch=(20,)))
    w = layer.weights
    assert w.up is not None
    swapped = replace(layer, weights=w._replace(gate=w.up, up=w.gate))
    expected, found = (with_gradients(o, ours(o, backend=backend)) for o in (layer, swapped))
    assert not torch.allclose(found["x"], expected["x"])


@ways
def test_columns_that_are_skipped_are_seen(
    backend: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backward.AT_ONCE, "cpu", at_once)
    layer = draw(Case(row=VARIANTS["swiglu"], batch=(20,), sizes=(67, 35, 18)))
    found = with_gradients(layer, ours(layer, backend=backend))
    judge([found], [layer])
    for name in found.keys() - {"output"}:
        skipped = found[name].clone()
        skipped[..., -1] = 0.0
        with pytest.raises(AssertionError):
            judge([found | {name: skipped}], [layer])
