"""Calls whose tensors do not fit are refused, also where an equal call has been planned before."""

import pytest
import torch
from torch import Tensor

from gatedffn import FeedForward, explain, functional
from gatedffn.errors import GatedFFNError, SettingError, ShapeError

BACKENDS = ["auto", "few", "linear", "torch", "blocks"]


def operands() -> list[Tensor]:
    return [torch.randn(*size) for size in ((3, 8), (16, 8), (16, 8), (8, 16))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_that_come_back_in_another_dtype(backend: str) -> None:
    x, gate, up, down = operands()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.bfloat16() if t.shape == (3, 16) else t, lambda t: t
    ):
        y = functional.feed_forward(x.requires_grad_(), gate, up, down, backend=backend)
    with pytest.raises(ShapeError, match=r"a saved tensor is \(3, 16\) torch.bfloat16"):
        y.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("backend", [*BACKENDS, "definition"])
def test_a_weight_on_another_device_after_one_that_was_not(backend: str) -> None:
    x, gate, up, down = operands()
    functional.feed_forward(x, gate, up, down, backend=backend)
    with pytest.raises(ShapeError, match="gate_weight is on meta and x on cpu"):
        functional.feed_forward(x, gate.to("meta"), up, down, backend=backend)


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        (torch.zeros(16, device="meta"), "gate_bias is on meta and x on cpu"),
        (torch.zeros(16, dtype=torch.int64), "gate_bias is torch.int64: it must be a floating"),
    ],
)
def test_a_bias_that_is_none(bias: Tensor, reason: str) -> None:
    x, gate, up, down = operands()
    with pytest.raises(ShapeError, match=reason):
        functional.feed_forward(x, gate, up, down, bias)


def test_what_is_no_tensor() -> None:
    with pytest.raises(ShapeError, match="gate is of type list"):
        functional.gating([1.0], [2.0])  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="x is of type list"):
        functional.swish([1.0])  # type: ignore[arg-type]


def test_a_parameter_of_each_token_trains_compiled() -> None:
    layer, beta = FeedForward(256, 512), torch.linspace(0.5, 1.5, 5)[:, None]
    x = torch.randn(5, 256, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return functional.layer(
            x, layer.weights(), "swiglu_oai", {"beta": beta, "limit": 7.0}, "gate_up", None, "auto"
        )

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, call))
    torch.testing.assert_close(found, expected)


def test_explain_says_that_there_is_no_plan() -> None:
    with pytest.raises(SettingError, match="there is no kernel for meta"):
        explain(FeedForward(8, 16).to("meta"))
    negated = torch.randn(2, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises(GatedFFNError, match="PyTorch's dispatcher changes them"):
        explain(FeedForward(8, 16), negated)


@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 1, 3, 8)])
def test_float64_trains_with_any_dimensions(shape: tuple[int, ...]) -> None:
    layer, x = FeedForward(8, 16).double(), torch.randn(*shape, dtype=torch.float64)
    flat = x.reshape(-1, 8).requires_grad_()
    x.requires_grad_()
    layer(x).square().sum().backward()
    layer(flat).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.reshape(-1, 8), flat.grad)
