"""`torch.fx.symbolic_trace`: the layers trace as PyTorch's own do, compute the same, and train."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.cases import gated_rows, rows
from support.compare import same_bits
from torch import Tensor, fx, nn

from gatedffn import GLU, FeedForward, GatedConv1d, Swish, functional, replace
from gatedffn.errors import ShapeError
from gatedffn.ops import measure
from gatedffn.variants import Variant


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


def trained(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, the gradients of the input and of every parameter."""
    torch.manual_seed(1)  # of dropout
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    made: dict[str, Any] = {"y": y.detach(), "x": x.grad}
    return made | {name: p.grad for name, p in module.named_parameters()}


def assert_traces(layer: nn.Module, x: Tensor) -> None:
    """Alone and inside a model."""
    for module in (layer, nn.Sequential(nn.Identity(), layer)):
        expected = trained(module, x)
        graph = fx.symbolic_trace(module)
        graph.graph.lint()
        assert graph.state_dict().keys() == module.state_dict().keys()
        for each in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            found = trained(each, x)
            assert found.keys() == expected.keys()
            assert all(same_bits(found[name], expected[name]) for name in expected)


@rows
def test_feed_forward(row: Variant) -> None:
    learnable: Any = "unit" if any(p.learnable for p in row.parameters) else False
    assert_traces(FeedForward(8, 12, variant=row, learnable=learnable), torch.randn(2, 3, 8))


@gated_rows
def test_glu(row: Variant) -> None:
    learnable = any(p.learnable for p in row.parameters)
    assert_traces(GLU(row, dim=1, order="interleaved", learnable=learnable), torch.randn(2, 6, 3))


@rows
def test_convolution(row: Variant) -> None:
    learnable: Any = "unit" if any(p.learnable for p in row.parameters) else False
    layer = GatedConv1d(3, 4, kernel_size=2, variant=row, learnable=learnable)
    assert_traces(layer, torch.randn(2, 3, 5))


@pytest.mark.parametrize(
    "layer",
    [Swish(), Swish(2.0, learnable=True), Swish(learnable=True, num_parameters=3, dim=1)],
    ids=repr,
)
def test_swish(layer: nn.Module) -> None:
    assert_traces(layer, torch.randn(2, 3, 5))


def test_a_wrong_input_is_refused_when_it_runs() -> None:
    for layer, x in (
        (FeedForward(8, 12), torch.randn(2, 7)),
        (Swish(learnable=True, num_parameters=3, dim=1), torch.randn(2, 4)),
        (GLU(), torch.randn(2, 3)),
    ):
        with pytest.raises(ShapeError):
            fx.symbolic_trace(layer)(x)


def test_children_that_are_called_are_calls_of_the_graph() -> None:
    class Adapter(nn.Linear):
        pass

    layer = FeedForward(8, 12, variant="swiglu_oai", bias=True)
    layer.up_proj = Adapter(8, 12)
    assert_traces(layer, torch.randn(5, 8))
    called = {node.target for node in fx.symbolic_trace(layer).graph.nodes}
    assert {"gate_proj", "down_proj"} <= called


def test_a_block_whose_weights_are_packed_trains() -> None:
    """A view of a weight would be a constant of the graph."""
    transformers = pytest.importorskip("transformers")
    modules = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    config = transformers.Phi3Config(hidden_size=8, intermediate_size=12)
    model = nn.Sequential(modules.Phi3MLP(config))
    assert len(replace(model).replaced) == 1
    graph, x = fx.symbolic_trace(model), torch.randn(5, 8)
    expected, found = trained(model, x), trained(graph, x)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_when_the_graph_trains(training: bool) -> None:
    """Not when it was traced."""
    layer, x = FeedForward(8, 12, dropout=0.5).train(training), torch.randn(5, 8)
    for module in (layer, nn.Sequential(layer)):
        graph = fx.symbolic_trace(module)
        expected = trained(module.train(), x)
        assert all(same_bits(found, expected[n]) for n, found in trained(graph.train(), x).items())
        torch.testing.assert_close(graph.eval()(x), module.eval()(x))
        module.train(training)


def test_functions_in_a_model_of_ones_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(6, 4), torch.randn(6, 4)])
            self.down = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.weights[0], self.weights[1]
            y = functional.feed_forward(x, gate, up, self.down, variant="geglu")
            hidden = functional.gated_linear(y, gate, up, variant="reglu")
            first, second = functional.split_packed(hidden, -1, "gate_up")
            return functional.gating(functional.swish(first), functional.activation(second))

    assert_traces(Block(), torch.randn(3, 4))
