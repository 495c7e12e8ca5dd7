"""Nested tensors: computed as what is in them, also where PyTorch has no function for them."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.cases import rows
from torch import Tensor, nn

from gatedffn import GLU, FeedForward, Swish, explain
from gatedffn.errors import SettingError, ShapeError
from gatedffn.functional import gating
from gatedffn.ops import measure
from gatedffn.variants import Variant

layouts = pytest.mark.parametrize("layout", [torch.strided, torch.jagged])


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        yield


def parts(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def assert_as_its_parts(layer: nn.Module, of: list[Tensor], layout: torch.layout) -> None:
    """The outputs, and the gradients of the input and of every parameter."""
    parameters = list(layer.parameters())
    apart = [part.clone().requires_grad_() for part in of]
    of_a_part: Any = copy.copy(layer)  # of the same parameters
    if getattr(layer, "dim", -1) > 0:
        of_a_part.dim -= 1  # the first dimension counts the parts
    expected = [of_a_part(part) for part in apart]
    total = torch.stack([y.square().sum() for y in expected]).sum()
    gradients = torch.autograd.grad(total, [*apart, *parameters])
    x = torch.nested.nested_tensor(of, layout=layout, requires_grad=True)
    y = layer(x)
    assert y.layout is layout
    torch.testing.assert_close(list(y.unbind()), expected)
    squares = torch.stack([part.square().sum() for part in y.unbind()]).sum()
    of_x, *found = torch.autograd.grad(squares, [x, *parameters])
    torch.testing.assert_close([*of_x.unbind(), *found], list(gradients))


@rows
@layouts
def test_the_layer(row: Variant, layout: torch.layout) -> None:
    learnable = any(p.learnable for p in row.parameters)
    layer = FeedForward(8, 12, variant=row, bias=True, learnable=learnable)
    assert_as_its_parts(layer, parts((3, 8), (5, 8)), layout)


@layouts
def test_its_children_are_called(layout: torch.layout) -> None:
    layer = FeedForward(8, 12)
    layer.up_proj.register_forward_hook(lambda *_: None)
    assert_as_its_parts(layer, parts((3, 8), (5, 8)), layout)


@pytest.mark.parametrize(
    ("layer", "of"),
    [
        (FeedForward(8, 12), [(2, 3, 8), (4, 1, 8), (0, 2, 8)]),
        (GLU("swiglu", learnable=True), [(3, 8), (5, 2)]),
        (GLU(dim=1), [(4, 3), (6, 3)]),
        (Swish(learnable=True, num_parameters=3, dim=1), [(3, 4, 5), (3, 2, 7)]),
    ],
    ids=["layer", "last", "ragged", "channels"],
)
def test_parts_of_any_shape(layer: nn.Module, of: Any) -> None:
    assert_as_its_parts(layer, parts(*of), torch.strided)


def test_half_precision_by_autocast() -> None:
    layer, of = FeedForward(8, 12), parts((3, 8), (5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(torch.nested.nested_tensor(of))
        torch.testing.assert_close(list(found.unbind()), [layer(part) for part in of])


def test_what_does_not_fit() -> None:
    x = torch.nested.nested_tensor(parts((3, 8), (5, 8)))
    with pytest.raises(ShapeError, match="the last size of the one must be"):
        FeedForward(7, 12)(x)
    with pytest.raises(ShapeError, match="2 and 1 tensors"):
        gating(x, torch.nested.nested_tensor(parts((3, 8))))
    with pytest.raises(ShapeError, match="dim 0 of a nested tensor"):
        GLU(dim=0)(x)
    with pytest.raises(ShapeError, match="x is nested: it must have 5 channels"):
        Swish(learnable=True, num_parameters=5)(x)
    with pytest.raises(SettingError, match="sparse or nested"):
        explain(FeedForward(8), torch.nested.nested_tensor(parts((3, 8)), layout=torch.jagged))
    for call in (FeedForward(8), partial(explain, FeedForward(8))):
        with pytest.raises(ShapeError, match="x is a nested tensor that holds no tensors"):
            call(torch.nested.nested_tensor([]))


def test_single_tokens_and_none() -> None:
    layer = FeedForward(8, 12, bias=True)
    for of in (parts((8,), (8,)), parts((3, 8), (0, 8))):
        assert_as_its_parts(layer, of, torch.strided)


def test_the_plan_is_that_of_the_rows() -> None:
    layer, of = FeedForward(8, 12), parts((3, 8), (5, 8))
    assert explain(layer, torch.nested.nested_tensor(of)) == explain(layer, torch.cat(of))
