"""The feed-forward layer: what it computes, and what it holds."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.cases import rows
from support.compare import assert_matches, same_bits
from support.eager import eager_gating
from torch import Tensor, nn

from gatedffn import GLU, FeedForward, Swish, hidden_size
from gatedffn.errors import ParameterError, SettingError
from gatedffn.layers import Learnable
from gatedffn.variants import VARIANTS, Parameter, Variant

LEARNABLE = [row for row in VARIANTS.values() if any(p.learnable for p in row.parameters)]
learnable_rows = pytest.mark.parametrize("row", LEARNABLE, ids=[row.name for row in LEARNABLE])
PARAMETERS = [(row, p) for row in VARIANTS.values() for p in row.parameters]
parameters = pytest.mark.parametrize(
    ("row", "parameter"), PARAMETERS, ids=[f"{row.name}-{p.name}" for row, p in PARAMETERS]
)


def by_hand(layer: FeedForward, x: Tensor) -> Tensor:
    """The layer from its own tensors, with formulas spelled on their own."""
    row, state = VARIANTS[layer.variant], dict(layer.named_parameters())

    def project(source: Tensor, name: str) -> Tensor:
        return F.linear(source, state[f"{name}_proj.weight"], state.get(f"{name}_proj.bias"))

    values: dict[str, Any] = dict(layer.activation_parameters())
    gate = project(x, "gate") if row.gated else None
    up = project(x, "up")
    hidden = eager_gating(up if gate is None else gate, None if gate is None else up, row, values)
    return project(hidden, "down")


def all_gradients(layer: FeedForward, x: Tensor, *, hand: bool = False) -> dict[str, Tensor]:
    """The output and the gradient of the input and of every parameter."""
    x = x.detach().requires_grad_()
    output = by_hand(layer, x) if hand else layer(x)
    named = {"x": x, **dict(layer.named_parameters())}
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view(output.shape)
    found = torch.autograd.grad(output, list(named.values()), weights)
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


def judge(layer: FeedForward, inputs: Tensor) -> None:
    """Over several inputs: the gradient of a single number can be right by luck."""
    doubled = copy.deepcopy(layer).double()
    truth = [all_gradients(doubled, x.double(), hand=True) for x in inputs]
    eager = [all_gradients(layer, x, hand=True) for x in inputs]
    actual = [all_gradients(layer, x) for x in inputs]
    for name in truth[0]:
        a, t, e = (torch.stack([each[name] for each in found]) for found in (actual, truth, eager))
        assert_matches(a, t, e, name)


# what it computes


@rows
@pytest.mark.parametrize(
    ("bias", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=["fp32-no_bias", "fp32", "bf16"],
)
def test_output_and_every_gradient(row: Variant, bias: bool, dtype: torch.dtype) -> None:
    layer = FeedForward(24, 40, variant=row, d_out=16, bias=bias, dtype=dtype)
    # Larger than at initialisation, so that gates and caps act.
    judge(layer, (6.0 * torch.randn(12, 5, 24)).to(dtype))


@learnable_rows
@pytest.mark.parametrize("learnable", ["layer", "unit"])
def test_learned_parameters_get_the_true_gradient(row: Variant, learnable: Learnable) -> None:
    layer = FeedForward(24, 40, variant=row, learnable=learnable)
    learned = [p.name for p in row.parameters if p.learnable]
    size = 40 if learnable == "unit" else 1
    for name in learned:
        raw = getattr(layer, name)
        assert isinstance(raw, nn.Parameter)
        assert raw.shape == (size,)
        with torch.no_grad():
            raw.add_(0.1 * torch.randn(size))
    judge(layer, 3.0 * torch.randn(12, 5, 24))


@learnable_rows
@pytest.mark.parametrize("learnable", ["layer", "unit"])
def test_learned_parameters_start_where_they_are_told(row: Variant, learnable: Learnable) -> None:
    other: dict[str, Any] = {name: value + 0.35 for name, value in row.defaults.items()}
    for start in (row.defaults, other):
        arguments: dict[str, Any] = {"learnable": learnable, "dtype": torch.float64, **start}
        layer = FeedForward(4, 8, variant=row, **arguments)
        for name, value in layer.activation_parameters().items():
            told = torch.as_tensor(start[name], dtype=torch.float64)
            actual = torch.as_tensor(value, dtype=torch.float64)
            truth = told.expand(actual.shape)
            assert_matches(actual.float(), truth, truth.float(), name)


@pytest.mark.parametrize("name", ["alpha_p", "alpha_n"])
def test_a_learned_parameter_stays_above_its_bound(name: str) -> None:
    layer = FeedForward(4, 8, variant="xielu")
    bound = {p.name: p.above for p in VARIANTS["xielu"].parameters}[name]
    assert bound is not None
    for raw in (-30.0, 0.0, 30.0):
        with torch.no_grad():
            getattr(layer, name).fill_(raw)
        value = layer.activation_parameters()[name]
        assert isinstance(value, Tensor)
        assert (value >= bound).all()


@rows
def test_what_is_learned_unless_told_otherwise(row: Variant) -> None:
    learned = {n for n, _ in FeedForward(4, 8, variant=row).named_parameters() if "." not in n}
    expected = {p.name for p in row.parameters if p.learnable} if row.learned else set()
    assert learned == expected
    fixed = FeedForward(4, 8, variant=row, learnable=False)
    assert all("." in name for name, _ in fixed.named_parameters())


@parameters
def test_a_parameter_changes_the_output(row: Variant, parameter: Parameter) -> None:
    x = 12.0 * torch.randn(5, 8)
    layer = FeedForward(8, 16, variant=row, learnable=False)
    value: dict[str, Any] = {parameter.name: 0.5 * parameter.default + 0.3}
    other = FeedForward(8, 16, variant=row, learnable=False, **value)
    other.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), other(x))
    judge(other, x[None])


@rows
def test_bias_is_in_every_projection_or_in_none(row: Variant) -> None:
    for bias in (True, False):
        layer = FeedForward(4, 8, variant=row, bias=bias)
        linears = [child for child in layer.children() if isinstance(child, nn.Linear)]
        assert len(linears) == len(row.projections) + 1
        assert all((linear.bias is not None) == bias for linear in linears)


@pytest.mark.parametrize("variant", ["relu", "swiglu"])
def test_dropout_acts_on_the_hidden_values_in_training_only(variant: str) -> None:
    layer = FeedForward(8, 512, variant=variant, dropout=0.25)
    seen: list[Tensor] = []
    layer.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(4, 8)
    layer.eval()(x)
    layer.train()(x)
    whole, dropped = seen
    kept = dropped != 0
    # Those that are kept are scaled by 1 / (1 - 0.25), each hidden value by itself.
    assert_matches(dropped[kept], whole[kept].double() / 0.75, whole[kept] / 0.75)
    gone = int((~kept & (whole != 0)).sum())
    spread = (0.25 * 0.75 * int((whole != 0).sum())) ** 0.5
    assert abs(gone - 0.25 * int((whole != 0).sum())) < 5 * spread


def test_a_dropout_that_is_set_later_acts() -> None:
    layer, x = FeedForward(8, 512), torch.randn(4, 8)
    plain = layer(x)
    layer.dropout = 0.5
    assert not torch.equal(layer(x), plain)
    assert torch.equal(layer.eval()(x), plain)


def test_weights_that_cannot_be_read() -> None:
    layer = FeedForward(4, 8)
    assert layer.weights().up is layer.get_parameter("up_proj.weight")
    layer.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(SettingError, match=r"call the layer instead: up_proj is not a plain nn\."):
        layer.weights()


def test_hooks_on_the_projections_run() -> None:
    layer = FeedForward(4, 8)
    seen: list[str] = []
    for name, child in layer.named_children():
        child.register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(torch.randn(2, 4))
    assert seen == ["gate_proj", "up_proj", "down_proj"]


def test_a_replaced_projection_is_called() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = 2.0 * self.inner(x)
            return output

    layer, x = FeedForward(4, 8, variant="bilinear"), torch.randn(3, 4)
    plain = layer(x)
    layer.up_proj = Doubled(layer.up_proj)
    torch.testing.assert_close(layer(x), 2.0 * plain)


@given(
    st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)
)
def test_any_shape(batch: list[int], d_model: int, d_hidden: int, d_out: int) -> None:
    for variant in ("gelu", "swiglu", "prelu"):
        layer = FeedForward(d_model, d_hidden, variant=variant, d_out=d_out)
        assert list(layer(torch.randn(*batch, d_model)).shape) == [*batch, d_out]


# what it holds


@rows
def test_the_default_width_has_equal_parameters(row: Variant) -> None:
    layer = FeedForward(48, variant=row)
    assert layer.d_hidden == hidden_size(48, variant=row) == (128 if row.gated else 192)
    weights = sum(p.numel() for name, p in layer.named_parameters() if "." in name)
    assert weights == 2 * 48 * 192


@rows
def test_state_dict(row: Variant) -> None:
    layer = FeedForward(8, 16, variant=row, bias=True)
    names = [
        f"{name}.{kind}" for name in (*row.projections, "down_proj") for kind in ("weight", "bias")
    ]
    learned = [p.name for p in row.parameters if p.learnable] if row.learned else []
    assert sorted(layer.state_dict()) == sorted([*names, *learned])
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = FeedForward(8, 16, variant=row, bias=True)
    other.load_state_dict(torch.load(stored, weights_only=True))
    x = torch.randn(3, 8)
    assert same_bits(layer(x), other(x))


@rows
def test_the_same_seed_gives_the_same_weights(row: Variant) -> None:
    def drawn() -> FeedForward:
        torch.manual_seed(5)
        return FeedForward(8, 16, variant=row, bias=True)

    first, second = drawn(), drawn()
    torch.manual_seed(5)
    first.reset_parameters()
    for name, parameter in first.named_parameters():
        assert same_bits(parameter, second.get_parameter(name)), name


@rows
def test_every_matrix_is_drawn_as_a_linear_layer_of_its_own(row: Variant) -> None:
    torch.manual_seed(5)
    layer = FeedForward(8, 16, variant=row, bias=True)
    torch.manual_seed(5)
    for name in (*row.projections, "down_proj"):
        sizes = (16, 8) if name == "down_proj" else (8, 16)
        alone = nn.Linear(*sizes)
        assert same_bits(layer.get_parameter(f"{name}.weight"), alone.weight)
        assert same_bits(layer.get_parameter(f"{name}.bias"), alone.bias)


@rows
def test_built_on_the_meta_device_and_filled_later(row: Variant) -> None:
    layer = FeedForward(8, 16, variant=row, bias=True, device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.reset_parameters()
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 8)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    other, x = FeedForward(8, 16, variant=row, bias=True), torch.randn(3, 8)
    assert same_bits(layer(x), other(x))


def test_the_meta_device_as_context() -> None:
    with torch.device("meta"):
        layers: list[nn.Module] = [FeedForward(8, variant="xielu"), Swish(learnable=True), GLU()]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_dtype(dtype: torch.dtype) -> None:
    layer = FeedForward(8, 16, variant="xielu", bias=True, dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(torch.randn(3, 8, dtype=dtype)).dtype == dtype
    assert (
        FeedForward(8, 16, variant="xielu").to(dtype)(torch.randn(3, 8, dtype=dtype)).dtype == dtype
    )


@rows
def test_a_deep_copy_is_equal_and_apart(row: Variant) -> None:
    layer, x = FeedForward(8, 16, variant=row), torch.randn(3, 8)
    other = copy.deepcopy(layer)
    assert same_bits(layer(x), other(x))
    with torch.no_grad():
        other.get_parameter("down_proj.weight").zero_()
    assert not torch.equal(layer(x), other(x))


@rows
def test_exports(row: Variant) -> None:
    layer, x = FeedForward(8, 16, variant=row), torch.randn(3, 8)
    exported = torch.export.export(layer, (x,))
    assert "gatedffn" not in str(exported.graph_module.code)  # PyTorch's own operators alone
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize(("variant", "name"), [("swiglu", "beta"), ("xielu", "alpha_n")])
def test_a_tensor_is_no_starting_value(variant: str, name: str) -> None:
    with pytest.raises(ParameterError, match="give its starting value as a number"):
        FeedForward(16, variant=variant, **{name: torch.tensor(0.7)})  # type: ignore[arg-type]
