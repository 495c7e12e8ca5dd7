"""Graphs that tracers make of calls: they compute the same, and have the same derivatives."""

import copy
from typing import Any

import pytest
import torch
from support.compare import same_bits
from support.layers import Case, Layer, draw, ours
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from gatedffn import GLU, FeedForward
from gatedffn.errors import BackendError
from gatedffn.functional import gated_linear
from gatedffn.ops import measure
from gatedffn.variants import VARIANTS

KINDS = ("gelu", "geglu", "xielu", "swiglu_oai")  # no gate, gate, learned, learned and fixed
above = pytest.mark.parametrize("above", [False, True], ids=["below autograd", "above autograd"])
modes = pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


def traced(module: Any, *inputs: Any, mode: Any = "real", above: bool = False) -> Any:
    return make_fx(module, tracing_mode=mode, pre_dispatch=above, _allow_non_fake_inputs=True)(
        *inputs
    )


def derivatives(module: Any, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output, its gradients, and theirs."""
    of = [x.detach().requires_grad_(), *parameters]
    y = module(of[0])
    first = torch.autograd.grad(y.square().sum(), of, create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    return [t.detach() for t in (y, *first, *torch.autograd.grad(total, of))]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("save", ["gate_up", "input"])
@modes
@above
def test_a_graph_of_the_layer_has_its_derivatives(
    name: str, save: Any, mode: str, above: bool
) -> None:
    layer, x = FeedForward(16, 24, variant=name, save=save), torch.randn(2, 5, 16)
    graph = traced(layer, x, mode=mode, above=above)
    assert "gatedffn.feed_forward" in graph.code
    parameters = list(layer.parameters())
    found = derivatives(graph, x, parameters)
    expected = derivatives(layer, x, parameters)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@modes
@above
def test_a_graph_of_gating_has_its_derivatives(mode: str, above: bool) -> None:
    layer, x = GLU("swiglu", learnable=True), torch.randn(3, 8)
    parameters = list(layer.parameters())
    found = derivatives(traced(layer, x, mode=mode, above=above), x, parameters)
    expected = derivatives(layer, x, parameters)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_a_layer_without_a_projection_down() -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], batch=(2, 5), down=False))
    given = list(layer.tensors().values())

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        gate, up, *biases = weights
        return gated_linear(x, gate, up, *biases)

    found, expected = (
        torch.autograd.grad(each(*given).square().sum(), given)
        for each in (traced(call, *given), call)
    )
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def training_step(layer: Layer, wanted: list[str]) -> Any:
    """The gradients of a call, as a function of all that it depends on."""
    names = list(layer.tensors())

    def step(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        y = ours(layer.mapped(lambda name, _: given[name]))
        return torch.autograd.grad(y, [given[name] for name in wanted], grad)

    return step


@pytest.mark.parametrize("name", KINDS)
def test_a_graph_of_a_training_step_has_derivatives(name: str) -> None:
    row, small = VARIANTS[name], (3, 4, 2)
    layer = draw(Case(row=row, batch=(2,), sizes=small, dtype=torch.float64, learned="unit"))
    given = [layer.grad.requires_grad_(), *layer.tensors().values()]
    graph = traced(training_step(layer, list(layer.tensors())), *given)
    assert "gatedffn.feed_forward_backward" in graph.code
    assert torch.autograd.gradcheck(graph, given)
    assert torch.autograd.gradgradcheck(graph, given)


def test_gradients_that_follow_from_nothing_that_is_followed() -> None:
    """The gradient of a bias down is a sum of what comes in, whatever the operands are."""
    layer = draw(Case(row=VARIANTS["geglu"], dtype=torch.float64))
    given = [layer.grad, *layer.tensors().values()]
    graph = traced(training_step(layer, ["x", "down_bias"]), *given)
    of_x, of_bias = graph(*given)
    (found,) = torch.autograd.grad(of_x.sum() + of_bias.sum(), layer.weights.gate)
    assert found.isfinite().all()
    assert found.any()


def test_an_exported_training_step() -> None:
    from torch._functorch.aot_autograd import aot_export_module

    layer, x = FeedForward(16, 24, save="input"), torch.randn(2, 5, 16)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.layer(x).square().sum(),)

    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    joint, _ = aot_export_module(Loss(), (x,), trace_joint=True, output_loss_index=0)
    torch.testing.assert_close(joint(*parameters, x)[1:], expected)
    forward, _ = aot_export_module(Loss(), (x,), trace_joint=False)
    torch.testing.assert_close(
        torch.autograd.grad(forward(*parameters, x)[0], parameters), expected
    )


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_an_exported_layer_trains() -> None:
    layer, x = FeedForward(16, 24), torch.randn(2, 5, 16)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    exported = torch.export.export(copy.deepcopy(layer), (x,))
    for each in (exported, exported.run_decompositions()):
        module = each.module()
        found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings(r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning")
def test_torch_func_over_a_graph() -> None:
    layer, x = FeedForward(16, 24), torch.randn(5, 16)

    def loss(module: Any) -> Any:
        return lambda x: module(x).square().sum()

    with torch.no_grad():
        graph = traced(lambda x: functional_call(layer, dict(layer.named_parameters()), (x,)), x)
    torch.testing.assert_close(grad(loss(graph))(x), grad(loss(layer))(x))
    torch.testing.assert_close(jvp(graph, (x,), (x,)), jvp(layer, (x,), (x,)))
    saving = traced(layer, x)  # no silent zero, and what to do
    for wrong in (lambda: grad(loss(saving))(x), lambda: jvp(saving, (x,), (x,))):
        with pytest.raises(BackendError, match=r"torch.no_grad\(\)"):
            wrong()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_vmap_over_a_graph(name: str, training: bool) -> None:
    layer = FeedForward(16, 24, variant=name)
    parameters = dict(layer.named_parameters())
    x = torch.randn(3, 5, 16)

    def call(x: Tensor, parameters: dict[str, Tensor]) -> Any:
        return functional_call(layer, parameters, (x,))

    def step(x: Tensor, parameters: dict[str, Tensor]) -> Any:
        y = call(x, parameters)
        return torch.autograd.grad(y.square().sum(), [*parameters.values()])

    several = {n: p + 0.1 * torch.randn(3, *p.shape) for n, p in parameters.items()}
    function = step if training else lambda *of: [call(*of)]
    with torch.set_grad_enabled(training):
        graph = make_fx(function)(x[0], parameters)
    assert "gatedffn.feed_forward" in graph.code
    for of_x, given in ((1, parameters), (None, several), (1, several)):
        of_each = None if given is parameters else 0
        found = vmap(graph, in_dims=(of_x, of_each))(
            x[0] if of_x is None else x.movedim(0, 1), given
        )
        for i in range(3):
            one = {
                n: (p if of_each is None else p[i]).detach().requires_grad_()
                for n, p in given.items()
            }
            expected = function(x[0] if of_x is None else x[i], one)
            torch.testing.assert_close([f[i] for f in found], [*expected])


def test_vmap_over_a_graph_of_a_gate() -> None:
    gate, x = GLU(dim=0), torch.randn(6, 4, 3)
    graph = traced(gate, x[..., 0])
    torch.testing.assert_close(vmap(graph, 2)(x), vmap(gate, 2)(x))
