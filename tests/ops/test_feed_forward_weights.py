"""Tensors that change between calls of the same facts, whose plan is kept: each is looked at."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_matches
from support.layers import BACKENDS, OWN, Case, Layer, by_hand, draw, fit, ours
from torch import Tensor, nn

from gatedffn import FeedForward, functional
from gatedffn.errors import BackendError, ShapeError
from gatedffn.variants import VARIANTS

D_MODEL, D_HIDDEN = 8, 24


def layer_and_input() -> tuple[FeedForward, Tensor]:
    """A layer that has computed this input before."""
    layer, x = FeedForward(D_MODEL, D_HIDDEN), torch.randn(3, D_MODEL)
    layer(x)
    return layer, x


def parts(layer: FeedForward) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = layer.weights()[:3]
    assert up is not None
    assert down is not None
    return gate, up, down


def truth(layer: FeedForward, x: Tensor) -> Tensor:
    gate, up, down = parts(layer)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# exchanged under the tensor, or the tensor itself, in every way of the table


def other_memory(x: Tensor) -> Tensor:
    return x.clone().mul_(2.0)


def of_another_class(x: Tensor) -> Tensor:
    class Other(Tensor):
        pass

    return x.as_subclass(Other)


backends = pytest.mark.parametrize("backend", ["auto", *BACKENDS])
NAMES = ("x", "gate", "up", "down", "gate_bias", "down_bias")
names = pytest.mark.parametrize("name", NAMES)


def called(backend: str, trained: bool = False) -> tuple[Layer, dict[str, Any]]:
    """A layer whose plan is kept, without gradients or with them."""
    case, options = fit(backend, Case(row=VARIANTS["swiglu"]))
    layer = draw(case)
    if not trained:
        layer = layer.mapped(lambda _, t: t.detach())
    ours(layer, **options)
    return layer, options


def judge(found: Tensor, layer: Layer) -> None:
    assert_matches(found, by_hand(layer.to(torch.float64)), by_hand(layer))


@backends
@names
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("change", [other_memory, torch._neg_view])
def test_data_that_are_exchanged(
    change: Callable[[Tensor], Tensor], trained: bool, name: str, backend: str
) -> None:
    layer, options = called(backend, trained)
    tensor = layer.tensors()[name]
    tensor.data = change(tensor.data)
    judge(ours(layer, **options), layer)


@backends
@names
@pytest.mark.parametrize("change", [Tensor.clone, torch._neg_view, of_another_class])
def test_another_tensor_of_the_same_facts(
    change: Callable[[Tensor], Tensor], name: str, backend: str
) -> None:
    layer, options = called(backend)
    layer = layer.mapped(lambda n, t: change(t) if n == name else t)
    found = ours(layer, **options)
    assert (type(found) is Tensor) == (change is not of_another_class)
    judge(found, layer)


@pytest.mark.parametrize(
    ("name", "backend"), [(n, "auto") for n in NAMES] + [("x", b) for b in BACKENDS]
)
def test_zeros_that_are_nowhere(name: str, backend: str) -> None:
    layer, options = called(backend)
    zeros = torch._efficientzerotensor(layer.tensors()[name].shape, dtype=layer.x.dtype)
    layer = layer.mapped(lambda n, t: zeros if n == name else t)
    judge(ours(layer, **options), layer.mapped(lambda _, t: t.clone()))


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_sparse_weight_is_left_to_the_definition(name: str) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], bias=False)).mapped(lambda _, t: t.detach())
    ours(layer)
    sparse = layer.mapped(lambda n, t: t.to_sparse() if n == name else t)
    judge(ours(sparse), layer)
    with pytest.raises(BackendError, match="a tensor is sparse or nested"):
        ours(sparse, backend="linear")


def test_strides_that_are_exchanged() -> None:
    for name in ("x", "gate", "up", "down"):
        layer, _ = called("auto")
        tensor = layer.tensors()[name]
        tensor.data = tensor.data.t().contiguous().t()
        judge(ours(layer), layer)


# of a module


def test_a_weight_of_another_shape() -> None:
    layer, x = layer_and_input()
    weight = parts(layer)[2]
    weight.data = weight.data.view(-1)[: D_MODEL * 2].view(2, D_MODEL)
    with pytest.raises(ShapeError, match=r"down_weight \(2, 8\)"):
        layer(x)


def test_a_weight_of_another_dtype() -> None:
    layer, x = layer_and_input()
    layer.to(torch.float64)
    y = layer(x.double())
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, truth(layer, x.double()))


def test_another_parameter_in_its_place() -> None:
    layer, x = layer_and_input()
    layer.up_proj.weight = nn.Parameter(torch.randn(D_HIDDEN, D_MODEL))
    torch.testing.assert_close(layer(x), truth(layer, x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, D_MODEL + 1), "must be"),
        (torch.randn(()), "must be"),
        (torch.ones(3, D_MODEL, dtype=torch.int64), "must be a floating dtype"),
        (torch.randn(3, D_MODEL, device="meta"), "move one"),
    ],
    ids=["width", "scalar", "integers", "device"],
)
def test_a_wrong_input_after_a_right_one(x: Tensor, message: str) -> None:
    layer, _ = layer_and_input()
    gate, up, down = parts(layer)
    for call in (layer, lambda x: functional.feed_forward(x, gate, up, down)):
        with pytest.raises(ShapeError, match=message):
            call(x)


def test_weights_are_exchanged_as_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    layer.to(torch.float64)  # by torch.utils.swap_tensors, which nothing may stand against
    with torch.no_grad():
        torch.testing.assert_close(layer(x.double()), truth(layer, x.double()))


def test_a_copy_is_looked_at_for_itself() -> None:
    layer, x = layer_and_input()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        parts(twin)[0].mul_(2.0)
        torch.testing.assert_close(twin(x), truth(twin, x))
        torch.testing.assert_close(layer(x), truth(layer, x))


# without memory


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", OWN)
@names
def test_a_tensor_whose_memory_is_gone(name: str, backend: str, trained: bool, size: int) -> None:
    """As that of sharded weights between steps; a kernel must not read what is not there."""
    layer, options = called(backend, trained)
    tensor = layer.tensors()[name]
    tensor.untyped_storage().resize_(size)
    there = tensor.numel() * tensor.element_size()
    with pytest.raises(ShapeError, match=f"has {size} bytes of {there}: its storage was made"):
        ours(layer, **options)
