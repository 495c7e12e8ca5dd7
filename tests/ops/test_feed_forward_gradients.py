"""Backward in every way of the table: what it is handed, and what may ask for it."""

from collections.abc import Callable

import pytest
import torch
from support.cases import rows
from support.compare import assert_matches, assert_same_special_values, same_bits
from support.layers import (
    BACKENDS,
    LIBRARIES,
    OWN,
    Case,
    by_hand,
    draw,
    fit,
    judge,
    needs,
    ours,
    with_gradients,
)
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from gatedffn import FeedForward, explain
from gatedffn.errors import BackendError
from gatedffn.ops import measure
from gatedffn.ops.feed_forward.ways import WAYS
from gatedffn.ops.gating.reference import gating, gating_backward
from gatedffn.variants import VARIANTS, Variant

backends = pytest.mark.parametrize("backend", ["auto", *BACKENDS])
# The definition's are autograd's.
own_gradients = pytest.mark.parametrize("backend", ["auto", *OWN, *LIBRARIES])
OF_BACKWARD = {way.name for way in WAYS.ways if "backward" in way.stages} & set(OWN)
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch, of what is no leaf
SWIGLU = Case(row=VARIANTS["swiglu"])


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


@backends
def test_a_batch_of_incoming_gradients(backend: str) -> None:
    case, options = fit(backend, SWIGLU)
    layer = draw(case)
    tensors = list(layer.tensors().values())
    grads = torch.stack([layer.grad, 2.0 * layer.grad])
    many = torch.autograd.grad(ours(layer, **options), tensors, grads, is_grads_batched=True)
    found = dict(zip(layer.tensors(), many, strict=True))
    truth, eager = (
        with_gradients(each, by_hand(each)) for each in (layer.to(torch.float64), layer)
    )
    for name, (one, two) in found.items():
        assert_matches(one, truth[name], eager[name], name)
        assert_matches(two, 2.0 * truth[name], 2.0 * eager[name], name)


def turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def negative(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


@own_gradients
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("change", [turned, negative])
def test_saved_tensors_handed_out_otherwise(
    change: Callable[[Tensor], Tensor], save: str, backend: str
) -> None:
    case, options = fit(backend, SWIGLU)
    layer = draw(case)
    with saved_tensors_hooks(lambda tensor: tensor, change):
        y = ours(layer, save=save, **options)
    if backend in OF_BACKWARD and change is turned:  # it was asked for, so nothing else may run
        with pytest.raises(BackendError, match="a weight is not stored row by row"):
            with_gradients(layer, y)
    else:
        judge([with_gradients(layer, y)], [layer])


@reads_grad
@backends
def test_a_gradient_without_memory(backend: str) -> None:
    case, options = fit(backend, SWIGLU)
    layer = draw(case)
    grad = torch.ones_like(layer.grad)
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(grad)
    (found,) = torch.autograd.grad(ours(layer, **options), [layer.x], fake)
    assert type(found) is FakeTensor
    assert found.shape == layer.x.shape


@own_gradients
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("graph", [False, True], ids=["once", "graph"])
def test_autocast_changes_nothing_of_backward(graph: bool, save: str, backend: str) -> None:
    case, options = fit(backend, SWIGLU)
    layer = draw(case)
    tensors, found = list(layer.tensors().values()), []
    for autocast in (False, True):
        y = ours(layer, save=save, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found.append(torch.autograd.grad(y, tensors, layer.grad, create_graph=graph))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("alone", ["x", "gate", "up", "down", "down_bias"])
def test_a_gradient_with_a_graph_of_one_alone(alone: str) -> None:
    layer = draw(SWIGLU)
    expected = with_gradients(layer, ours(layer))
    tensors = layer.tensors()
    wanted = tensors.pop(alone)
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    (found,) = torch.autograd.grad(ours(layer), [wanted], layer.grad, create_graph=True)
    torch.testing.assert_close(found, expected[alone])


@reads_grad
@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_compiled_backward(save: str) -> None:
    layer = draw(SWIGLU)
    y = ours(layer, save=save)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        torch.autograd.backward([y], [layer.grad])
    found = {"output": y.detach()}
    for name, tensor in layer.tensors().items():
        assert tensor.grad is not None
        found[name] = tensor.grad
    judge([found], [layer])


# which way, and why not another

SMALL = "small: Python between its products takes longer than fresh memory"


@pytest.mark.parametrize(
    ("sizes", "tokens", "tile", "stage", "way", "reason"),
    [
        ((8, 24), 4, None, "inference", "torch", SMALL),
        ((8, 24), 4, None, "training, forward", "torch", SMALL),
        ((8, 24), 4, None, "training, backward", "torch", SMALL),
        ((8, 24), 9, 4, "training, backward", "linear", "works on all tokens at once, not on 4"),
        ((2, 80), 9000, None, "inference", "linear", "fresh memory for 8 MB takes longer than"),
        ((2, 80), 9000, None, "training, backward", "linear", "fresh memory for 8 MB takes longer"),
    ],
)
def test_why_a_way_is_left_out(
    sizes: tuple[int, int], tokens: int, tile: int | None, stage: str, way: str, reason: str
) -> None:
    needs("blocks")
    found = explain(FeedForward(*sizes, tile=tile), tokens=tokens)[0].plans[stage]
    other = {"linear": "torch", "torch": "linear"}[way]
    assert reason in found.against[way]
    assert other not in found.against


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_every_way_is_measured_or_has_a_reason(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "tuning", lambda: True)
    monkeypatch.setattr(measure, "_file", lambda: None)
    decisions = explain(FeedForward(24, 40, dtype=dtype), tokens=tokens)[0].plans
    for plan in decisions.values():
        ways = {w.name for w in WAYS.ways if plan.stage in w.stages and "cpu" in w.hardware}
        assert set(plan.milliseconds or [plan.chosen]) | set(plan.against) == ways
        assert not set(plan.milliseconds) & set(plan.against)


@rows
@backends
def test_infinities_and_nans_of_gradients_are_where_the_formula_has_them(
    row: Variant, backend: str
) -> None:
    # One hidden unit for each triple of gate, up and W_down, the same for each of the tokens.
    special = torch.tensor([-torch.inf, -2.0, 0.0, 2.0, torch.inf, torch.nan])
    values = torch.cartesian_prod(special, special, special)
    case, options = fit(backend, Case(row=row, batch=(20,), sizes=(1, len(values), 1), bias=False))
    layer = draw(case)
    gate, up, down = (t.to(case.dtype) for t in values.t())
    with torch.no_grad():
        layer.x.fill_(1.0)
        layer.grad.fill_(1.0)
        layer.weights.gate.copy_(gate[:, None])
        layer.weights.down.copy_(down)  # type: ignore[union-attr]
        if layer.weights.up is not None:
            layer.weights.up.copy_(up[:, None])
    other = None if layer.weights.up is None else up
    names = ["gate"] if other is None else ["gate", "up"]
    expected = gating_backward(down, gate, other, row.name, layer.parameters, names)
    for save in ("gate_up", "input"):
        found = with_gradients(layer, ours(layer, save=save, **options))
        for name, truth in zip(names, expected, strict=True):
            assert_same_special_values(found[name][:, 0], truth, name)
        hidden = gating(gate, other, row.name, layer.parameters)
        assert_same_special_values(found["down"][0], hidden, "down")
