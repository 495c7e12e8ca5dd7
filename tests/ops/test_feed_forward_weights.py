"""What is remembered of weights that were looked at: only as long as they are what they were."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn import FeedForward, functional
from gatedffn.errors import ShapeError
from gatedffn.ops.feed_forward import weights as remembered
from gatedffn.ops.feed_forward.weights import find

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


def test_nothing_is_kept_alive_and_nothing_is_left() -> None:
    layer, _ = layer_and_input()
    ends = [weakref.ref(w) for w in parts(layer)]
    key = tuple(map(id, layer.weights()))
    assert key in remembered._known
    del layer
    gc.collect()
    assert [end() for end in ends] == [None] * 3
    assert key not in remembered._known


def test_weights_of_a_moment_leave_nothing() -> None:
    layer, x = layer_and_input()
    before = len(remembered._known)
    for _ in range(5):
        gate, up, down = (w.detach() * 1.0 for w in parts(layer))
        functional.feed_forward(x, gate, up, down)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
    del gate, up, down
    gc.collect()
    assert len(remembered._known) == before


def test_a_copy_is_looked_at_for_itself() -> None:
    layer, x = layer_and_input()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        parts(twin)[0].mul_(2.0)
        torch.testing.assert_close(twin(x), truth(twin, x))
        torch.testing.assert_close(layer(x), truth(layer, x))
