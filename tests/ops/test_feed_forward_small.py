"""Training small layers: what PyTorch's own linear layers take over, and what stays the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gatedffn.ops.feed_forward.call import Call
from support.cases import rows
from support.layers import Case, check, draw, needs, ours, with_gradients
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from gatedffn import FeedForward, explain
from gatedffn.ops import choice
from gatedffn.ops.feed_forward import small
from gatedffn.variants import VARIANTS, Variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that go this way; the rule decides, which takes PyTorch's products."""
    needs("blocks")
    monkeypatch.setattr(choice, "_switched_off", lambda: True)
    monkeypatch.setattr("gatedffn.native.multiplies", lambda _: True)
    monkeypatch.setattr("gatedffn.ops.kernels.has_tiles", lambda: False)
    original, found = small.feed_forward, list[Call]()

    def counted(call: Call) -> Tensor:
        found.append(call)
        return original(call)

    monkeypatch.setattr(small, "feed_forward", counted)
    return found


@rows
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_output_and_gradients(
    row: Variant, dtype: torch.dtype, bias: bool, taken: list[Call]
) -> None:
    check(Case(row=row, batch=(2, 3), dtype=dtype, bias=bias))
    assert taken


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(row=VARIANTS["swiglu"]), {"save": "input"}),
        (Case(row=VARIANTS["swiglu"]), {"backend": "torch"}),
        (Case(row=VARIANTS["swiglu"], batch=(9,)), {"tile": 4}),
        (Case(row=VARIANTS["swiglu"], learned="unit"), {}),
        (Case(row=VARIANTS["swiglu"], down=False), {}),
        (Case(row=VARIANTS["swiglu"], batch=(0,)), {}),
        (Case(row=VARIANTS["swiglu"], dtype=torch.float64), {}),
        (Case(row=VARIANTS["swiglu"], batch=(9000,), sizes=(2, 80, 2)), {}),
    ],
    ids=["input", "named", "tile", "learned", "no-down", "no-tokens", "float64", "large"],
)
def test_what_goes_by_the_operator(case: Case, options: Any, taken: list[Call]) -> None:
    layer = draw(case)
    with_gradients(layer, ours(layer, **options))
    assert not taken


@pytest.mark.parametrize("frozen", ["x", "gate", "up", "down", "down_bias"])
def test_what_takes_no_gradient(frozen: str, taken: list[Call]) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], bias=True))
    expected = with_gradients(layer, ours(layer))
    tensors = layer.tensors()
    tensors.pop(frozen).requires_grad_(False)
    found = torch.autograd.grad(ours(layer), list(tensors.values()), layer.grad)
    for name, gradient in zip(tensors, found, strict=True):
        assert torch.equal(gradient, expected[name]), name
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_second_derivatives(name: str) -> None:
    """Each in float32 beside the definition's, which float64 would leave alone with it."""
    layer = draw(Case(row=VARIANTS[name], bias=False))
    found = []
    for backend in ("auto", "definition"):
        tensors = list(layer.tensors().values())
        first = torch.autograd.grad(
            ours(layer, backend=backend), tensors, layer.grad, create_graph=True
        )
        loss = torch.stack([(g * g).sum() for g in first]).sum()
        found.append(torch.autograd.grad(loss, tensors))
    for ours_, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=2e-4, atol=2e-4)


def test_batched_gradients(taken: list[Call]) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    y, weights = ours(layer), layer.weights
    grads = torch.stack([layer.grad, 2.0 * layer.grad])
    (many,) = torch.autograd.grad(y, [weights.gate], grads, is_grads_batched=True)
    (one,) = torch.autograd.grad(ours(layer), [weights.gate], layer.grad)
    torch.testing.assert_close(many, torch.stack([one, 2.0 * one]))
    assert len(taken) == 2


def turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def negative(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


@pytest.mark.parametrize("change", [turned, negative])
def test_saved_tensors_handed_out_otherwise(
    change: Callable[[Tensor], Tensor], taken: list[Call]
) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], bias=True))
    expected = with_gradients(layer, ours(layer))
    with saved_tensors_hooks(lambda tensor: tensor, change):
        found = with_gradients(layer, ours(layer))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(taken) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which PyTorch reads itself
def test_a_gradient_without_memory(taken: list[Call]) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    y = ours(layer)
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.ones(layer.grad.shape))
    (found,) = torch.autograd.grad(y, [layer.x], fake)
    assert type(found) is FakeTensor
    assert found.shape == layer.x.shape
    assert taken


def test_backward_under_autocast(taken: list[Call]) -> None:
    """Whose products are in bfloat16, as those of linear layers are there."""
    layer = draw(Case(row=VARIANTS["swiglu"], bias=True))
    expected, y = with_gradients(layer, ours(layer)), ours(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(layer, y)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        torch.testing.assert_close(gradient, expected[name], rtol=0.1, atol=0.1)
    assert len(taken) == 2


@pytest.mark.parametrize("alone", ["x", "gate", "up", "down", "down_bias"])
def test_second_derivatives_of_one_alone(alone: str, taken: list[Call]) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], bias=True))
    expected = with_gradients(layer, ours(layer))
    tensors = layer.tensors()
    wanted = tensors.pop(alone)
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    (found,) = torch.autograd.grad(ours(layer), [wanted], layer.grad, create_graph=True)
    torch.testing.assert_close(found, expected[alone])
    assert len(taken) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which PyTorch reads itself
@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_compiled_backward(save: str) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    expected, y = with_gradients(layer, ours(layer)), ours(layer, save=save)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        torch.autograd.backward([y], [layer.grad])
    for name, tensor in layer.tensors().items():
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, expected[name])


def test_the_hidden_values_are_not_saved(taken: list[Call]) -> None:
    layer, kept = draw(Case(row=VARIANTS["swiglu"])), dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(layer)
    own = {t.untyped_storage().data_ptr() for t in layer.tensors().values()}
    (call,) = taken
    hidden = call.tokens * call.d_hidden * layer.x.element_size()
    assert [size for place, size in kept.items() if place not in own] == [hidden, hidden]
    assert y.requires_grad


def test_explain_says_so() -> None:
    found = explain(FeedForward(8, 24), tokens=4)[0].decisions
    assert found["training, backward"].reason == small.REASON
    assert found["training, backward"].chosen == "torch"
    long = explain(FeedForward(8, 24, save="input"), tokens=4)[0].decisions
    assert long["training, backward"].reason != small.REASON


def test_every_way_is_measured_where_gradients_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "_switched_off", lambda: False)
    monkeypatch.setattr(choice, "_file", lambda: None)
    monkeypatch.setattr(choice, "_made", {})
    layer = draw(Case(row=VARIANTS["swiglu"], dtype=torch.bfloat16))
    ours(layer)
    (made,) = choice._made.values()
    assert set(made.milliseconds) == {"torch", "blocks"}


@pytest.mark.parametrize(("behind", "small"), [(0.01, True), (1.0, False)])
def test_another_way_must_be_ahead_by_more_than_python_takes(
    behind: float, small: bool, taken: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_switched_off", lambda: False)
    monkeypatch.setattr(choice, "_file", lambda: None)
    monkeypatch.setattr(choice, "_made", {})
    measured = {"torch": 2.0, "blocks": 2.0 - behind}
    monkeypatch.setattr(choice, "_race", lambda *_: {n: 1e-3 * ms for n, ms in measured.items()})
    monkeypatch.setattr(choice, "MARGIN", 1.0)
    check(Case(row=VARIANTS["swiglu"]))
    assert bool(taken) == small
