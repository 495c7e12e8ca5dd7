"""The layers: what they say of themselves and of wrong arguments; GLU and Swish."""

from typing import Any

import pytest
import torch
from support.cases import gated_rows, rows
from support.compare import assert_matches, same_bits
from torch import nn

from gatedffn import GLU, FeedForward, Swish, functional
from gatedffn.errors import GatedFFNError, ParameterError, SettingError, ShapeError
from gatedffn.layers import Learnable, VariantModule
from gatedffn.variants import Variant

# what it says


@rows
def test_the_repr_shows_what_it_is(row: Variant) -> None:
    words = repr(FeedForward(8, 16, variant=row, d_out=4, dropout=0.1, bias=True))
    assert f"8 -> 16 -> 4, variant='{row.name}'" in words
    assert "dropout=0.1" in words
    assert "bias=True" in words
    for parameter in row.parameters:
        learned = parameter.learnable and row.learned
        value = f"learned per {row.learned}" if learned else f"{parameter.default:g}"
        assert f"{parameter.name}={value}" in words


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (GLU(), "GLU(variant='glu', dim=-1, order='up_gate')"),
        (
            GLU("swiglu", dim=1, order="interleaved", beta=2.0),
            "GLU(variant='swiglu', beta=2, dim=1, order='interleaved')",
        ),
        (
            GLU("swiglu", learnable=True),
            "GLU(variant='swiglu', beta=learned per layer, dim=-1, order='up_gate')",
        ),
        (Swish(), "Swish(beta=1)"),
        (Swish(1.5), "Swish(beta=1.5)"),
        (Swish(learnable=True), "Swish(beta=learned)"),
        (
            Swish(learnable=True, num_parameters=3, dim=1),
            "Swish(beta=learned, num_parameters=3, dim=1)",
        ),
    ],
)
def test_reprs(layer: nn.Module, expected: str) -> None:
    assert repr(layer) == expected


# GLU and Swish


@gated_rows
@pytest.mark.parametrize("order", functional.ORDERS)
def test_glu_is_the_function(row: Variant, order: functional.Order) -> None:
    x = torch.randn(4, 6, 8)
    layer = GLU(row, dim=1, order=order, learnable=False)
    assert same_bits(layer(x), functional.glu(x, 1, variant=row, order=order))


@pytest.mark.parametrize(
    "layer",
    [GLU("swiglu", learnable=True, beta=1.3), Swish(1.3, learnable=True)],
    ids=["GLU", "Swish"],
)
def test_reset_returns_a_learned_parameter_to_its_start(layer: GLU | Swish) -> None:
    beta = layer.get_parameter("beta")
    start = beta.detach().clone()
    nn.init.constant_(beta, torch.nan)
    layer.reset_parameters()
    assert same_bits(beta, start)


def test_glu_learns_one_parameter() -> None:
    layer = GLU("swiglu", learnable=True, beta=1.3).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    output = layer(x)
    assert same_bits(output, functional.glu(x, variant="swiglu", beta=layer.get_parameter("beta")))
    (found,) = torch.autograd.grad(output.sum(), layer.get_parameter("beta"))
    up, gate = x.chunk(2, -1)
    beta = torch.tensor([1.3]).double().requires_grad_()  # as stored
    (truth,) = torch.autograd.grad((gate * torch.sigmoid(beta * gate) * up).sum(), beta)
    assert_matches(found.float(), truth, truth.float())


@pytest.mark.parametrize("learnable", [False, True])
def test_swish_with_one_beta(learnable: bool) -> None:
    x = torch.randn(3, 4)
    layer = Swish(1.5, learnable=learnable)
    assert same_bits(layer(x), functional.swish(x, 1.5))
    assert same_bits(layer(x[0, 0]), functional.swish(x[0, 0], 1.5))
    assert len(list(layer.parameters())) == learnable


@pytest.mark.parametrize(("shape", "dim"), [((5, 3), -1), ((2, 3, 7), 1), ((3, 2), 0), ((3,), 0)])
def test_swish_per_channel(shape: tuple[int, ...], dim: int) -> None:
    layer, x = Swish(learnable=True, num_parameters=3, dim=dim), torch.randn(shape)
    with torch.no_grad():
        layer.get_parameter("beta").copy_(torch.tensor([0.5, 1.0, 2.0]))
    output = layer(x)
    for channel, beta in enumerate((0.5, 1.0, 2.0)):
        alone = x.select(dim, channel)
        truth = functional.swish(alone.double(), beta)
        assert_matches(output.select(dim, channel), truth, alone * torch.sigmoid(beta * alone))
    assert torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())
    layer.reset_parameters()
    assert torch.equal(layer.get_parameter("beta"), torch.ones(3).double())


# errors


def wrong(value: object) -> Any:
    """A value that type checkers would refuse."""
    return value


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FeedForward(0), SettingError, "d_model is 0"),
        (lambda: FeedForward(8, 0), SettingError, "d_hidden is 0"),
        (lambda: FeedForward(8, wrong(1.5)), SettingError, "d_hidden is 1.5"),
        (lambda: FeedForward(8, d_out=0), SettingError, "d_out is 0"),
        (lambda: FeedForward(8, d_out=True), SettingError, "d_out is True"),
        (lambda: FeedForward(8, dropout=1.0), SettingError, "dropout is 1.0"),
        (lambda: FeedForward(8, dropout=-0.1), SettingError, "dropout is -0.1"),
        (lambda: FeedForward(8, dropout=torch.nan), SettingError, "dropout is nan"),
        (lambda: FeedForward(8, variant="swigul"), GatedFFNError, "swiglu"),
        (lambda: FeedForward(8, gamma=1.0), ParameterError, "no parameter gamma"),
        (lambda: FeedForward(8, variant="xielu", alpha_n=0.5), ParameterError, "above 0.5"),
        (lambda: FeedForward(8, variant="relu", learnable=True), ParameterError, "no learnable"),
        (
            lambda: FeedForward(8, learnable=wrong("channel")),
            ParameterError,
            "learnable is 'channel'",
        ),
        (lambda: FeedForward(8)(torch.zeros(2, 7)), ShapeError, r"x is \(2, 7\).*d_model, 8"),
        (lambda: FeedForward(8)(torch.zeros(())), ShapeError, r"x is \(\)"),
        (lambda: GLU("relu"), ParameterError, "no gate"),
        (lambda: GLU(order=wrong("gate-up")), ParameterError, "gate_up, up_gate, interleaved"),
        (lambda: GLU("swiglu", learnable="unit"), ParameterError, "FeedForward"),
        (lambda: GLU()(torch.zeros(3)), ShapeError, "odd"),
        (lambda: Swish(num_parameters=3), SettingError, "learnable=True"),
        (lambda: Swish(num_parameters=0), SettingError, "num_parameters is 0"),
        (lambda: Swish(torch.nan), ParameterError, "NaN"),
        (
            lambda: Swish(learnable=True, num_parameters=3)(torch.zeros(2, 4)),
            ShapeError,
            "3 channels",
        ),
        (
            lambda: Swish(learnable=True, num_parameters=3, dim=2)(torch.zeros(2, 3)),
            ShapeError,
            "along dim 2",
        ),
    ],
)
def test_errors(build: Any, error: type[GatedFFNError], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("learnable", [True, "layer", "unit"])
def test_learnable_is_what_it_says(learnable: Learnable) -> None:
    layer: VariantModule = FeedForward(8, 16, learnable=learnable)
    assert layer.learned == ("unit" if learnable == "unit" else "layer")
    assert f"beta=learned per {layer.learned}" in repr(layer)


@pytest.mark.parametrize("name", ["d_model", "d_hidden", "d_out"])
def test_a_size_cannot_be_set(name: str) -> None:
    with pytest.raises(AttributeError, match=f"{name} cannot be set to 3: sizes are read from"):
        setattr(FeedForward(8), name, 3)
