"""What is remembered of weights that were looked at: only as long as they are what they were."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gatedffn.ops.feed_forward.weights import find
from support.layers import needs
from torch import Tensor, nn

from gatedffn import FeedForward, functional
from gatedffn.errors import ShapeError
from gatedffn.ops.feed_forward import weights as remembered

D_MODEL, D_HIDDEN = 8, 24


def layer_and_input() -> tuple[FeedForward, Tensor]:
    layer, x = FeedForward(D_MODEL, D_HIDDEN), torch.randn(3, D_MODEL)
    with torch.no_grad():
        layer(x)
    assert find(layer.weights()) is not None  # or nothing below says anything
    return layer, x


def parts(layer: FeedForward) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = layer.weights()[:3]
    assert up is not None
    assert down is not None
    return gate, up, down


def truth(layer: FeedForward, x: Tensor) -> Tensor:
    gate, up, down = parts(layer)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone().mul_(2.0)


def other_strides(weight: nn.Parameter) -> None:
    weight.data = torch.as_strided(weight.data, weight.shape, (1, weight.shape[0]))


def negated(weight: nn.Parameter) -> None:
    weight.data = torch._neg_view(weight.data)


@pytest.mark.parametrize("change", [other_memory, other_strides, negated])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_weight_whose_data_are_exchanged(
    change: Callable[[nn.Parameter], None], name: str
) -> None:
    layer, x = layer_and_input()
    change(getattr(layer, name).weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), truth(layer, x))


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


def test_inputs_that_a_kernel_cannot_read() -> None:
    layer, x = layer_and_input()
    with torch.no_grad():
        negative = torch._neg_view(x)
        torch.testing.assert_close(layer(negative), truth(layer, -x))
        zeros = torch._efficientzerotensor((3, D_MODEL))
        torch.testing.assert_close(layer(zeros), torch.zeros(3, D_MODEL))


def test_nothing_is_kept_alive() -> None:
    layer, _ = layer_and_input()
    ends = [weakref.ref(w) for w in parts(layer)]
    del layer
    gc.collect()
    assert [end() for end in ends] == [None] * 3


def test_so_many_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "KEPT", 3)
    monkeypatch.setattr(remembered, "_known", {})
    for _ in range(3):
        held = [layer_and_input() for _ in range(3)]
        assert len(remembered._known) <= 3
    assert all(find(layer.weights()) for layer, _ in held[-1:])


def plain(weight: Tensor) -> Tensor:
    return weight


def of_another_class(weight: Tensor) -> Tensor:
    class Other(Tensor):
        pass

    return weight.detach().as_subclass(Other)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (plain, True),
        (Tensor.clone, False),
        (Tensor.to_sparse, False),
        (of_another_class, False),
        (lambda w: w.detach().view(torch.int32).view(w.dtype)[:-1], False),
        (lambda w: w.detach().view(torch.int32), False),
    ],
    ids=["the same", "memory", "sparse", "class", "shape", "dtype"],
)
def test_others_that_come_to_have_their_identities(
    make: Callable[[Tensor], Tensor], found: bool
) -> None:
    layer, _ = layer_and_input()
    entry = remembered._known[tuple(map(id, layer.weights()))]
    weights = layer.weights()
    other = weights._replace(gate=make(weights.gate))
    remembered._known[tuple(map(id, other))] = entry
    assert (find(other) is not None) is found


def test_weights_are_exchanged_as_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    layer.to(torch.float64)  # by torch.utils.swap_tensors, which nothing may stand against
    with torch.no_grad():
        torch.testing.assert_close(layer(x.double()), truth(layer, x.double()))


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_weight_whose_memory_is_gone(name: str, size: int) -> None:
    """As that of sharded weights between steps; a kernel must not read what is not there."""
    needs("few")
    layer, x = layer_and_input()
    getattr(layer, name).weight.untyped_storage().resize_(size)
    with torch.no_grad(), pytest.raises(ShapeError, match=f"has {size} bytes of 768"):
        layer(x)


def test_an_input_whose_memory_is_gone() -> None:
    needs("few")
    layer, x = layer_and_input()
    gate, up, down = parts(layer)
    x.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ShapeError, match=r"shape \(3, 8\) has no memory"):
        functional.feed_forward(x, gate, up, down, backend="few")


def test_a_copy_is_looked_at_for_itself() -> None:
    layer, x = layer_and_input()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        parts(twin)[0].mul_(2.0)
        torch.testing.assert_close(twin(x), truth(twin, x))
        torch.testing.assert_close(layer(x), truth(layer, x))
