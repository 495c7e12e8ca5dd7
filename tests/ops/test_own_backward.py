"""The gradients by own code: what is wanted alone, sums over tiles, operands that lie anyhow."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import dtypes
from support.compare import same_bits
from support.layers import Case, Layer, Learned, check, draw, ours, with_gradients
from support.levels import amid_nans, needs_kernels
from torch import Tensor

from gatedffn import functional
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import backward
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels
saves = pytest.mark.parametrize("save", ["gate_up", "input"])
tiled = pytest.mark.parametrize(
    ("backend", "tile"), [("few", None), ("blocks", None), ("blocks", 7)]
)
kinds = pytest.mark.parametrize(
    ("name", "learned", "down"),
    [
        ("gelu", "", True),
        ("xielu", "layer", True),
        ("swiglu", "unit", True),
        ("swiglu", "layer", False),
    ],
)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden units are taken in parts, the last of them narrower."""
    monkeypatch.setitem(backward.AT_ONCE, "cpu", 1)


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several threads, whatever the work."""
    monkeypatch.setattr(kernels, "MULTIPLY_ADDS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


parts = pytest.mark.usefixtures("in_parts")


def case_of(name: str, **options: Any) -> Case:
    """A case whose hidden units make several parts."""
    return Case(row=VARIANTS[name], batch=(20,), sizes=(24, 300, 16), **options)


@parts
@dtypes
@kinds
@saves
@pytest.mark.parametrize(
    ("backend", "tile"), [("few", None), *(("blocks", tile) for tile in (None, 1, 7, 100))]
)
def test_tokens_and_hidden_units_in_parts(
    name: str,
    learned: Learned,
    down: bool,
    save: str,
    backend: str,
    tile: int | None,
    dtype: torch.dtype,
) -> None:
    case = case_of(name, dtype=dtype, learned=learned, down=down)
    check(case, backend=backend, save=save, tile=tile)


@parts
@saves
@tiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "down"), [("gelu", True), ("swiglu", True), ("swiglu", False)])
def test_what_is_wanted_alone_is_what_it_is_with_the_rest(
    name: str, down: bool, dtype: torch.dtype, backend: str, tile: int | None, save: str
) -> None:
    learned: Learned = "unit" if VARIANTS[name].parameters else ""
    layer = draw(case_of(name, dtype=dtype, learned=learned, down=down))
    options = {"backend": backend, "tile": tile, "save": save}
    expected = with_gradients(layer, ours(layer, **options))
    names = list(layer.tensors())
    for wanted in (*itertools.combinations(names, 1), *itertools.combinations(names, 2)):
        frozen = layer.mapped(lambda _, t: t.detach())
        asked = [frozen.tensors()[n].requires_grad_() for n in wanted]
        found = torch.autograd.grad(ours(frozen, **options), asked, layer.grad)
        for n, gradient in zip(wanted, found, strict=True):
            assert same_bits(gradient, expected[n]), (wanted, n)


@parts
@pytest.mark.usefixtures("threads")
@kinds
@tiled
def test_several_threads(
    name: str, learned: Learned, down: bool, backend: str, tile: int | None
) -> None:
    check(case_of(name, learned=learned, down=down), backend=backend, tile=tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tile", [None, 1, 7])
@saves
def test_sums_over_tokens_are_rounded_once(dtype: torch.dtype, tile: int | None, save: str) -> None:
    def whole_numbers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape).to(dtype).requires_grad_()

    # So few and small that all but these sums are exact in each dtype.
    x, *weights = (
        whole_numbers(*of) for of in ((6000, 4), (5, 4), (5, 4), (3, 5), (5,), (5,), (3,))
    )

    def gradients(within: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
        tensors = [t.to(within) for t in (x, *weights)]
        y = functional.feed_forward(*tensors, variant="bilinear", **options)
        return torch.autograd.grad(y, weights, torch.ones_like(y))

    truth = gradients(torch.float64)
    assert max(t.abs().max() for t in truth) > 2048  # beyond what either dtype counts to
    found = gradients(dtype, backend="blocks", tile=tile, save=save)
    assert all(map(torch.equal, found, truth))


@parts
@saves
@tiled
@pytest.mark.parametrize("down", [True, False], ids=["down", "no down"])
def test_operands_that_are_parts_of_larger_ones(
    down: bool, backend: str, tile: int | None, save: str
) -> None:
    layer = draw(case_of("swiglu", down=down))
    options = {"backend": backend, "tile": tile, "save": save}
    expected = with_gradients(layer, ours(layer, **options))
    amid = layer.mapped(lambda _, t: amid_nans(t).requires_grad_())
    found = with_gradients(amid, ours(amid, **options))
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert all(found[name].is_contiguous() for name in expected)


@tiled
def test_tokens_of_many_dimensions(backend: str, tile: int | None) -> None:
    flat = draw(Case(row=VARIANTS["swiglu"], batch=(20,)))

    def turned(t: Tensor) -> Tensor:
        return t.view(4, 5, -1).transpose(0, 1).contiguous().transpose(0, 1)

    layer: Layer = replace(flat, x=turned(flat.x.detach()).requires_grad_(), grad=turned(flat.grad))
    expected = with_gradients(flat, ours(flat, backend=backend, tile=tile))
    found = with_gradients(layer, ours(layer, backend=backend, tile=tile))
    assert all(
        same_bits(found[name].reshape(expected[name].shape), expected[name]) for name in found
    )
