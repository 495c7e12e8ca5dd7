"""The functions: packed input, projections, and errors that say what came."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.cases import compute, draw, gated_rows, rows
from support.compare import assert_matches, same_bits
from support.eager import eager_gating
from torch import Tensor

from gatedffn import GatedFFNError, functional
from gatedffn.errors import ParameterError, ShapeError, UnknownVariant
from gatedffn.functional import ORDERS, Order
from gatedffn.variants import VARIANTS, Parameter, Variant

orders = pytest.mark.parametrize("order", ORDERS)
PARAMETERS = [(row, p) for row in VARIANTS.values() for p in row.parameters]
parameters = pytest.mark.parametrize(
    ("row", "parameter"), PARAMETERS, ids=[f"{row.name}-{p.name}" for row, p in PARAMETERS]
)


def pack(gate: Tensor, up: Tensor, dim: int, order: Order) -> Tensor:
    if order == "interleaved":
        # A new dimension behind `dim` holds the pair, and is merged with it.
        at = dim % gate.dim()
        return torch.stack([gate, up], at + 1).flatten(at, at + 1)
    return torch.cat([gate, up] if order == "gate_up" else [up, gate], dim)


# packed input


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    half=st.integers(1, 40),
    dim=st.integers(-4, 3),
    moved=st.booleans(),
)
def test_the_default_is_the_glu_of_pytorch_bit_for_bit(
    shape: list[int], half: int, dim: int, moved: bool
) -> None:
    dim = dim % len(shape)
    shape[dim] = 2 * half
    x = 3.0 * torch.randn(shape, dtype=torch.float64)
    if moved:
        x = x.movedim(dim, 0).contiguous().movedim(0, dim)
    assert same_bits(functional.glu(x, dim), F.glu(x, dim))
    assert same_bits(functional.glu(x, dim - len(shape)), F.glu(x, dim))


@orders
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
# Rows of products and maxima, which are exact: strides must not change a bit.
@pytest.mark.parametrize("variant", ["reglu", "relu2_glu"])
def test_the_order_says_where_the_gate_is(variant: str, order: Order, dim: int) -> None:
    gate, up = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    packed = pack(gate, up, dim, order)
    assert packed.shape[dim] == 2 * gate.shape[dim]
    expected = functional.gating(gate, up, variant)
    assert same_bits(functional.glu(packed, dim, variant=variant, order=order), expected)
    for other in set(ORDERS) - {order}:
        assert not torch.equal(functional.glu(packed, dim, variant=variant, order=other), expected)


@orders
def test_gradients_of_packed_input(order: Order) -> None:
    x = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: functional.glu(t, 1, order=order), x)


@orders
@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 1), ((4, 0), 1), ((0, 4), 0), ((0,), 0)])
def test_empty_packed_input(shape: tuple[int, ...], dim: int, order: Order) -> None:
    expected = list(shape)
    expected[dim] //= 2
    assert list(functional.glu(torch.empty(shape), dim, order=order).shape) == expected


@orders
@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_odd_size_cannot_be_packed(size: int, order: Order) -> None:
    with pytest.raises(ShapeError, match=rf"dim 1 of \(2, {size}\) is odd"):
        functional.glu(torch.zeros(2, size), 1, order=order)


@pytest.mark.parametrize(("shape", "dim"), [((4, 4), 2), ((4, 4), -3), ((), 0), ((), -1)])
def test_a_dimension_that_is_not_there(shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(ShapeError, match=f"dim is {dim}"):
        functional.glu(torch.zeros(shape), dim)


def test_an_order_that_is_none_of_the_three() -> None:
    order: Any = "up-gate"
    with pytest.raises(ParameterError, match="gate_up, up_gate, interleaved"):
        functional.glu(torch.zeros(4), order=order)


# projections


def weights(row: Variant, d_model: int, d_hidden: int, d_out: int) -> dict[str, Tensor | None]:
    drawn: dict[str, Tensor | None] = {
        "gate_weight": torch.randn(d_hidden, d_model) / d_model**0.5,
        "up_weight": torch.randn(d_hidden, d_model) / d_model**0.5,
        "down_weight": torch.randn(d_out, d_hidden) / d_hidden**0.5,
        "gate_bias": torch.randn(d_hidden),
        "up_bias": torch.randn(d_hidden),
        "down_bias": torch.randn(d_out),
    }
    return drawn if row.gated else drawn | {"gate_weight": None, "gate_bias": None}


def by_hand(row: Variant, x: Tensor, w: dict[str, Tensor | None]) -> Tensor:
    """The whole layer from plain matrix products, `x @ W.T + b`."""

    def project(source: Tensor, name: str) -> Tensor:
        weight, bias = w[f"{name}_weight"], w[f"{name}_bias"]
        assert weight is not None
        return F.linear(source, weight, bias)

    up = project(x, "up")
    if row.gated:
        return project(eager_gating(project(x, "gate"), up, row, row.defaults), "down")
    return project(eager_gating(up, None, row, row.defaults), "down")


@rows
@pytest.mark.parametrize("bias", ["all", "none", "gate", "up", "down"])
def test_feed_forward(row: Variant, bias: str) -> None:
    x, w = 2.0 * torch.randn(3, 5, 24), weights(row, 24, 40, 16)
    for name in ("gate_bias", "up_bias", "down_bias"):
        if bias not in ("all", name.split("_")[0]):
            w[name] = None
    doubled = {name: None if t is None else t.double() for name, t in w.items()}
    arguments: Any = w
    actual = functional.feed_forward(x, **arguments, variant=row)
    assert_matches(actual, by_hand(row, x.double(), doubled), by_hand(row, x, w))


@gated_rows
def test_gated_linear_is_feed_forward_without_the_last_matrix(row: Variant) -> None:
    x, w = torch.randn(5, 24), weights(row, 24, 40, 16)
    down, down_bias = w.pop("down_weight"), w.pop("down_bias")
    arguments: Any = w
    arguments |= {"variant": row, "backend": "definition"}
    hidden = functional.gated_linear(x, **arguments)
    assert down is not None
    whole = functional.feed_forward(x, down_weight=down, down_bias=down_bias, **arguments)
    assert same_bits(F.linear(hidden, down, down_bias), whole)


@given(
    st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)
)
def test_any_widths(batch: list[int], d_model: int, d_hidden: int, d_out: int) -> None:
    w = weights(VARIANTS["swiglu"], d_model, d_hidden, d_out)
    arguments: Any = w
    y = functional.feed_forward(torch.randn(*batch, d_model), **arguments)
    assert list(y.shape) == [*batch, d_out]


# parameters


@parameters
def test_a_parameter_changes_the_output(row: Variant, parameter: Parameter) -> None:
    inputs = draw(row, (5, 63), torch.float32)
    changed = {**row.defaults, parameter.name: 0.5 * parameter.default + 0.3}
    expected = eager_gating(inputs.gate, inputs.up, row, changed)
    actual = compute(row, inputs.gate, inputs.up, changed)
    assert not torch.equal(actual, compute(row, inputs.gate, inputs.up, row.defaults))
    doubled = inputs.to(torch.float64)
    truth = eager_gating(doubled.gate, doubled.up, row, changed)
    assert_matches(actual, truth, expected)


@parameters
def test_a_parameter_out_of_its_bounds_is_refused(row: Variant, parameter: Parameter) -> None:
    wrong: list[Any] = [torch.nan, -torch.inf, "1", None, True, 1j]
    if parameter.above is not None:
        wrong += [parameter.above, parameter.above - 1.0]
    if parameter.below is not None:
        wrong += [parameter.below, parameter.below + 1.0]
    if not parameter.unbounded:
        wrong += [torch.inf]
    x = torch.ones(2)
    for value in wrong:
        with pytest.raises(ParameterError, match=f"{parameter.name} of '{row.name}'"):
            compute(row, x, x if row.gated else None, {parameter.name: value})


@parameters
def test_only_learnable_parameters_may_be_tensors(row: Variant, parameter: Parameter) -> None:
    x = torch.ones(3, 4)
    linear = x if row.gated else None
    if not parameter.learnable:
        with pytest.raises(ParameterError, match="not learnable"):
            compute(row, x, linear, {parameter.name: torch.ones(4)})
        return
    for wrong in (torch.ones(5), torch.ones(2, 3, 4), torch.ones(3, 1, 1), torch.ones(4).int()):
        with pytest.raises(ShapeError, match=f"{parameter.name} of '{row.name}'"):
            compute(row, x, linear, {parameter.name: wrong})


@rows
def test_an_unknown_parameter_is_refused_with_the_known_ones(row: Variant) -> None:
    known = ", ".join(row.defaults) or "none"
    with pytest.raises(ParameterError, match=f"no parameter gamma; its parameters: {known}"):
        compute(row, torch.ones(2), torch.ones(2) if row.gated else None, {"gamma": 1.0})


@parameters
def test_a_parameter_reaches_the_whole_layer(row: Variant, parameter: Parameter) -> None:
    x, w = 6.0 * torch.randn(5, 8), weights(row, 8, 16, 4)
    arguments: dict[str, Any] = {**w, parameter.name: 0.5 * parameter.default + 0.3}
    changed = {**row.defaults, parameter.name: arguments[parameter.name]}
    up = F.linear(x, arguments["up_weight"], arguments["up_bias"])
    if row.gated:
        gate = F.linear(x, arguments["gate_weight"], arguments["gate_bias"])
        hidden = compute(row, gate, up, changed)
    else:
        hidden = compute(row, up, None, changed)
    expected = F.linear(hidden, arguments["down_weight"], arguments["down_bias"])
    torch.testing.assert_close(functional.feed_forward(x, variant=row, **arguments), expected)


@pytest.mark.parametrize("variant", ["swiglu_oai", "swiglu_clamp"])
def test_an_infinite_limit_is_none(variant: str) -> None:
    gate, up = 100.0 * torch.randn(50), 100.0 * torch.randn(50)
    free = functional.gating(gate, up, variant, limit=torch.inf)
    beta = VARIANTS[variant].defaults["beta"]
    offset = 1.0 if variant == "swiglu_oai" else 0.0
    assert same_bits(free, functional.gating(gate, up + offset, "swiglu", beta=beta))


def test_a_whole_number_is_a_number() -> None:
    x = torch.randn(5)
    assert same_bits(functional.swish(x, 2), functional.swish(x, 2.0))


def test_swish_is_the_row_swish() -> None:
    x, beta = torch.randn(5, 4), torch.rand(4)
    assert same_bits(functional.swish(x, beta), functional.activation(x, "swish", beta=beta))


# errors

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functional.gating(ONES, ONES, "relu"), ParameterError, "activation"),
        (lambda: functional.activation(ONES, "glu"), ParameterError, "gating"),
        (lambda: functional.gating(ONES, ONES, "swigul"), UnknownVariant, "swiglu"),
        (lambda: functional.gating(ONES, ONES[:1]), ShapeError, r"\(2, 3\).*\(1, 3\)"),
        (lambda: functional.gating(ONES, ONES.to("meta")), ShapeError, "cpu.*meta"),
        (lambda: functional.gating(ONES.int(), ONES), ShapeError, "gate is torch.int32"),
        (lambda: functional.gating(ONES, ONES.bool()), ShapeError, "up is torch.bool"),
        (lambda: functional.activation(ONES.to(torch.cfloat)), ShapeError, "complex64"),
        (lambda: functional.glu(torch.ones(4), variant="gelu"), ParameterError, "no gate"),
        (lambda: functional.swish(ONES, ONES.to("meta")), ShapeError, "meta"),
        (
            lambda: functional.gated_linear(ONES, ONES, ONES, variant="relu"),
            ParameterError,
            "feed_forward",
        ),
        (
            lambda: functional.gated_linear(ONES, ONES, torch.ones(3, 3)),
            ShapeError,
            r"gate_weight is \(2, 3\) and up_weight \(3, 3\)",
        ),
        (
            lambda: functional.gated_linear(ONES, torch.ones(3, 2), ONES),
            ShapeError,
            r"x is \(2, 3\) and gate_weight \(3, 2\)",
        ),
        (
            lambda: functional.gated_linear(torch.ones(()), ONES, ONES),
            ShapeError,
            r"x is \(\)",
        ),
        (
            lambda: functional.gated_linear(ONES, torch.ones(3), ONES),
            ShapeError,
            r"gate_weight is \(3,\)",
        ),
        (
            lambda: functional.gated_linear(ONES, ONES, ONES, None, torch.ones(3)),
            ShapeError,
            r"up_bias is \(3,\): it must be \(2,\)",
        ),
        (
            lambda: functional.feed_forward(ONES, ONES, ONES, ONES),
            ShapeError,
            "the hidden values",
        ),
        (
            lambda: functional.feed_forward(ONES, None, ONES, ONES.t()),
            ParameterError,
            "gate_weight must not be None",
        ),
        (
            lambda: functional.feed_forward(ONES, ONES, ONES, ONES.t(), variant="relu"),
            ParameterError,
            "must be None",
        ),
        (
            lambda: functional.feed_forward(
                ONES, None, ONES, ONES.t(), torch.ones(2), variant="relu"
            ),
            ParameterError,
            "must be None",
        ),
    ],
)
def test_errors(call: Any, error: type[GatedFFNError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, GatedFFNError)
    assert isinstance(caught.value, ValueError)
