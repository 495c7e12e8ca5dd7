"""Gating as an operator: registration, autograd and what it keeps in memory."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import (
    Inputs,
    as_function,
    cases,
    draw,
    few_cases,
    gated_rows,
    gradients,
    ours,
    rows,
)
from support.compare import assert_matches, same_bits, unchanged
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from gatedffn.functional import activation, gating
from gatedffn.ops.operator import learned_and_fixed
from gatedffn.variants import Variant

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
operators = torch.ops.gatedffn


def operator_arguments(inputs: Inputs) -> tuple[Any, ...]:
    return (
        inputs.gate,
        inputs.up,
        *learned_and_fixed(inputs.parameters, inputs.gate),
        inputs.row.name,
    )


# registration; kernels do not take float64, the definition does


@cases
def test_opcheck_forward(row: Variant, learned: bool) -> None:
    inputs = draw(row, (3, 4), torch.float64, learned=learned)
    torch.library.opcheck(operators.gating.default, (*operator_arguments(inputs), "auto"))


@few_cases
@dtypes
def test_opcheck_backward(row: Variant, learned: bool, dtype: torch.dtype) -> None:
    inputs = draw(row, (3, 4), dtype, learned=learned)
    arguments = (inputs.grad, [], list(inputs.tensors()), *operator_arguments(inputs), "auto")
    # Below autograd, which calls it.
    given = tree_map_only(Tensor, Tensor.detach, arguments)
    torch.library.opcheck(operators.gating_backward.default, given)


# first, second and repeated derivatives


@cases
def test_gradcheck(row: Variant, learned: bool) -> None:
    call, tensors = as_function(draw(row, (3, 4), torch.float64, learned=learned))
    assert torch.autograd.gradcheck(call, tensors, check_batched_grad=True)


@cases
def test_double_backward(row: Variant, learned: bool) -> None:
    call, tensors = as_function(draw(row, (2, 3), torch.float64, learned=learned))
    assert torch.autograd.gradgradcheck(call, tensors)


def test_third_derivative() -> None:
    def third(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        value = function(x)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return value

    x = torch.linspace(-3.0, 3.0, 21, requires_grad=True)
    truth = third(lambda t: torch.nn.functional.silu(t), x.detach().double().requires_grad_())
    by_hand = third(lambda t: t * torch.sigmoid(t), x)
    assert_matches(third(lambda t: activation(t, "swish"), x), truth, by_hand)


@gated_rows
def test_one_tensor_in_both_roles(row: Variant) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gating(t, t, row), x)
    assert torch.autograd.gradgradcheck(lambda t: gating(t, t, row), x)


@pytest.mark.parametrize("name", ["bilinear", "reglu", "swiglu"])
def test_second_derivative_where_it_is_zero(name: str) -> None:
    # phi'' vanishes, or d_gate is made of `up` alone: then, as in PyTorch, it has no graph.
    gate, up = torch.randn(4, requires_grad=True), torch.randn(4)
    (d_gate,) = torch.autograd.grad(gating(gate, up, name).sum(), gate, create_graph=True)
    second = torch.zeros(4)
    if d_gate.requires_grad:
        (second,) = torch.autograd.grad(d_gate.sum(), gate, materialize_grads=True)
    assert torch.equal(second, torch.zeros(4)) == (name != "swiglu")


@cases
def test_every_subset_of_requires_grad(row: Variant, learned: bool) -> None:
    inputs = draw(row, (3, 4), torch.float32, learned=learned)
    call, tensors = as_function(inputs)
    everything = gradients(ours(inputs), inputs)
    names = list(everything)
    for wanted in itertools.product((False, True), repeat=len(names)):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        output = call(*leaves)
        assert output.requires_grad == any(wanted)
        if any(wanted):
            torch.autograd.backward(output, inputs.grad)
        for name, leaf, want in zip(names, leaves, wanted, strict=True):
            assert (leaf.grad is not None) == want
            if leaf.grad is not None:
                assert same_bits(leaf.grad, everything[name])


@cases
def test_backward_twice_gives_equal_gradients_and_changes_no_input(
    row: Variant, learned: bool
) -> None:
    inputs = draw(row, (3, 4), torch.float32, learned=learned)
    tensors = list(inputs.tensors().values())
    with unchanged(*tensors, inputs.grad):
        output = ours(inputs)
        with unchanged(output):
            first = torch.autograd.grad(output, tensors, inputs.grad, retain_graph=True)
            second = torch.autograd.grad(output, tensors, inputs.grad)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_a_saved_input_that_was_changed_since_is_refused() -> None:
    gate, up = torch.randn(4, requires_grad=True), torch.randn(4)
    hidden = gating(gate, up)
    up.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(hidden.sum())


# memory


@rows
def test_saves_exactly_gate_and_up(row: Variant) -> None:
    inputs = draw(row, (3, 64), torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(inputs).sum()
    expected = [inputs.gate] if inputs.up is None else [inputs.gate, inputs.up]
    storages = [tensor.untyped_storage().data_ptr() for tensor in saved]
    assert storages == [tensor.untyped_storage().data_ptr() for tensor in expected]


@few_cases
def test_saves_nothing_without_gradients(row: Variant, learned: bool) -> None:
    inputs = draw(row, (3, 64), torch.float32, learned=learned)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("a tensor was saved")

    with torch.no_grad(), saved_tensors_hooks(refuse, lambda tensor: tensor):
        assert not ours(inputs).requires_grad
    with torch.inference_mode():
        assert same_bits(ours(inputs), ours(inputs.to(torch.float32)))
