"""Gating of one packed tensor: numbers, registration, derivatives, and what backward does."""

from typing import Any

import pytest
import torch
from support.cases import Inputs, cases, draw, dtypes
from support.compare import assert_matches, same_bits, unchanged
from support.gating import Results, by_hand, by_reference, judge, learned_names
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from gatedffn.functional import ORDERS, gating, glu
from gatedffn.ops.gating.reference import branches, joined
from gatedffn.ops.operator import learned_and_fixed
from gatedffn.variants import VARIANTS, Variant

orders = pytest.mark.parametrize("order", ORDERS)
dims = pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
gated_cases = pytest.mark.parametrize(
    ("name", "learned"), [("swiglu", False), ("swiglu", True), ("swiglu_oai", True), ("gtu", False)]
)


def join(inputs: Inputs, order: Any, dim: int = -1) -> Tensor:
    assert inputs.up is not None
    return joined(inputs.gate.detach(), inputs.up.detach(), dim, order)


def with_gradients(packed: Tensor, inputs: Inputs, order: Any, dim: int = -1) -> Results:
    """The output, and the gradients by the packed tensor and the learned parameters."""
    leaf = packed.detach().requires_grad_()
    names = learned_names(inputs)
    output = glu(leaf, dim, variant=inputs.row, order=order, **inputs.parameters)
    asked = [leaf, *(inputs.tensors()[name] for name in names)]
    found = torch.autograd.grad(output, asked, inputs.grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(["packed", *names], found, strict=True))}


# numbers


@cases
@dtypes
def test_output_and_gradients(row: Variant, learned: bool, dtype: torch.dtype) -> None:
    if not row.gated:
        return
    inputs = draw(row, (5, 127), dtype, learned=learned)
    truth, eager = by_reference(inputs.to(torch.float64)), by_reference(inputs)
    for order in ORDERS:
        found = with_gradients(join(inputs, order), inputs, order)
        d_gate, d_up = branches(found.pop("packed"), -1, order)
        for name, result in {**found, "gate": d_gate, "up": d_up}.items():
            assert_matches(result, truth[name], eager[name], f"{order} {name}")


@orders
@dims
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_along_any_dimension(order: Any, dim: int, dtype: torch.dtype) -> None:
    inputs = draw(VARIANTS["swiglu"], (2, 3, 4), dtype)
    assert inputs.up is not None
    packed = join(inputs, order, dim)
    with unchanged(packed):
        found = with_gradients(packed, inputs, order, dim)
    hidden = gating(inputs.gate, inputs.up)
    expected = torch.autograd.grad(hidden, [inputs.gate, inputs.up], inputs.grad)
    assert same_bits(found["output"], hidden)
    assert found["packed"].is_contiguous()
    for half, gradient in zip(branches(found["packed"], dim, order), expected, strict=True):
        assert same_bits(half.contiguous(), gradient)


@orders
def test_any_strides_of_the_packed_tensor(order: Any) -> None:
    inputs = draw(VARIANTS["geglu"], (7, 6), torch.float32)
    packed = join(inputs, order)
    expected = with_gradients(packed, inputs, order)
    for strided in (packed.t().contiguous().t(), torch.stack([packed, packed], -1)[..., 0]):
        found = with_gradients(strided, inputs, order)
        assert all(same_bits(found[name], expected[name]) for name in expected)


# what backward does


@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
def test_the_gradient_is_written_in_place_of_a_concatenation(order: Any) -> None:
    inputs = draw(VARIANTS["swiglu"], (5, 64), torch.float32)
    leaf = join(inputs, order).requires_grad_()
    output = glu(leaf, order=order, variant="swiglu")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        torch.autograd.grad(output, leaf, inputs.grad)
    names = {event.key for event in seen.key_averages()}
    assert "gatedffn::packed_gating_backward" in names
    assert not names & {"aten::cat", "aten::copy_", "aten::add", "aten::add_", "aten::zeros"}


@orders
def test_saves_the_packed_tensor_alone(order: Any) -> None:
    saved: list[int] = []
    packed = torch.randn(3, 8, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        glu(packed, order=order)
    assert saved == [packed.data_ptr()]


@gated_cases
def test_only_what_is_asked_is_computed(name: str, learned: bool) -> None:
    inputs = draw(VARIANTS[name], (3, 4), torch.float32, learned=learned)
    packed = join(inputs, "gate_up")
    everything = with_gradients(packed, inputs, "gate_up")
    for one in set(everything) - {"output"}:
        leaves = {"packed": packed, **inputs.tensors()}
        leaves = {n: leaf.detach() for n, leaf in leaves.items()}
        source = leaves[one].requires_grad_()
        parameters = {n: leaves.get(n, value) for n, value in inputs.parameters.items()}
        output = glu(leaves["packed"], -1, variant=name, order="gate_up", **parameters)
        (found,) = torch.autograd.grad(output, source, inputs.grad)
        assert same_bits(found, everything[one]), one


# registration and derivatives


@gated_cases
@orders
def test_opcheck(name: str, learned: bool, order: Any) -> None:
    inputs = draw(VARIANTS[name], (3, 4), torch.float64, learned=learned)
    packed = join(inputs, order).requires_grad_()
    given = (packed, *learned_and_fixed(inputs.parameters, packed), name)
    settings = (-1, order, "auto")
    operators = torch.ops.gatedffn
    torch.library.opcheck(operators.packed_gating.default, (*given, *settings))
    wanted = ["packed", *learned_names(inputs)]
    # Below autograd, which calls it.
    backward = tree_map_only(Tensor, Tensor.detach, (inputs.grad, [], wanted, *given, *settings))
    torch.library.opcheck(operators.packed_gating_backward.default, backward)


@gated_cases
@orders
def test_first_and_second_derivatives(name: str, learned: bool, order: Any) -> None:
    inputs = draw(VARIANTS[name], (2, 3), torch.float64, learned=learned)
    names = learned_names(inputs)
    tensors = [join(inputs, order).requires_grad_(), *(inputs.tensors()[n] for n in names)]

    def call(packed: Tensor, *values: Tensor) -> Tensor:
        parameters = {**inputs.parameters, **dict(zip(names, values, strict=True))}
        return glu(packed, -1, variant=name, order=order, **parameters)

    assert torch.autograd.gradcheck(call, tensors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, tensors)


@orders
def test_compiles_as_one_graph(order: Any) -> None:
    torch.compiler.reset()
    inputs = draw(VARIANTS["swiglu"], (3, 32), torch.float32)
    packed = join(inputs, order).requires_grad_()
    call = torch.compile(glu, backend="aot_eager", fullgraph=True)
    output = call(packed, order=order, variant="swiglu")
    (d_packed,) = torch.autograd.grad(output, packed, inputs.grad)
    d_gate, d_up = branches(d_packed, -1, order)
    found = {"output": output, "gate": d_gate, "up": d_up}
    judge(found, by_hand(inputs.to(torch.float64)), by_hand(inputs), order)


@orders
def test_torch_func_and_export(order: Any) -> None:
    packed = torch.randn(3, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return glu(x, order=order, variant="geglu").square().sum()

    leaf = packed.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(packed), expected)
    torch.testing.assert_close(vmap(grad(loss))(packed), expected)

    class Packed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return glu(x, order=order)

    exported = torch.export.export(Packed(), (packed,))
    assert not any("gatedffn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(packed), glu(packed, order=order))
