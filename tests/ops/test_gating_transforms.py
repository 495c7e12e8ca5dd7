"""Gating under torch.compile, torch.func, autocast and activation checkpointing."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import Inputs, as_function, cases, compute, draw, few_cases, gradients, ours
from support.compare import assert_matches, assert_same_special_values, same_bits
from support.gating import by_hand, judge
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from gatedffn import FeedForward
from gatedffn.functional import gating, glu, swish
from gatedffn.ops.gating.reference import joined
from gatedffn.variants import VARIANTS, Variant


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


# PyTorch itself, where it differentiates forward and where it loads Inductor.
torch_uses_jit = pytest.mark.filterwarnings(
    r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"
)


def judge_double(found: Any, truth: Any) -> None:
    """Two float64 results that took other routes; the yardstick is float32's rounding of one."""
    for a, b in zip(found, truth, strict=True):
        assert_matches(a.float(), b, b.float())


# torch.compile, which is shown the formula


def judge_compiled(output: Tensor, inputs: Inputs) -> None:
    found = {"output": output, **gradients(output, inputs)}
    judge(found, by_hand(inputs.to(torch.float64)), by_hand(inputs), "compiled")


@cases
def test_compiles_as_one_graph(row: Variant, learned: bool) -> None:
    inputs = draw(row, (3, 64), torch.float32, learned=learned)
    call, tensors = as_function(inputs)
    judge_compiled(torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors), inputs)


@few_cases
def test_compiles_once_for_all_shapes(row: Variant, learned: bool) -> None:
    compiled = torch.compile(
        functools.partial(compute, row), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (3, 4, 7):
        inputs = draw(row, (rows, 64), torch.float32, learned=learned)
        with torch.compiler.set_stance("default" if rows == 3 else "fail_on_recompile"):
            output = compiled(inputs.gate, inputs.up, dict(inputs.parameters))
        judge_compiled(output, inputs)


def test_compiles_with_a_parameter_that_changes() -> None:
    compiled = torch.compile(swish, backend="aot_eager", fullgraph=True)
    for beta in (1.0, 1.5, 2.5):
        inputs = draw(VARIANTS["swish"], (3, 64), torch.float32)
        inputs = replace(inputs, parameters={"beta": beta})
        judge_compiled(compiled(inputs.gate, beta), inputs)


def test_compiles_packed_input_of_any_size() -> None:
    compiled = torch.compile(glu, backend="aot_eager", fullgraph=True, dynamic=True)
    for order in ("gate_up", "up_gate", "interleaved"):
        for half in (1, 3, 32):
            inputs = draw(VARIANTS["glu"], (3, half), torch.float32)
            assert inputs.up is not None
            output = compiled(joined(inputs.gate, inputs.up, -1, order).detach(), order=order)
            truth, eager = (by_hand(each)["output"] for each in (inputs.to(torch.float64), inputs))
            assert_matches(output, truth, eager, f"{order} {half}")


@torch_uses_jit
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_trains_the_layer() -> None:
    layer = FeedForward(8, 16, variant="swiglu", learnable="unit", beta=1.3)
    truth_layer = FeedForward(8, 16, variant="swiglu", learnable="unit", beta=1.3)
    truth_layer.load_state_dict(layer.state_dict())
    truth_layer.double()
    x = torch.randn(5, 8)
    truth = gradients_of(truth_layer, truth_layer(x.double()))
    eager = gradients_of(layer, layer(x))
    compiled = torch.compile(layer, fullgraph=True)
    found = gradients_of(layer, compiled(x))
    for name in truth:
        assert_matches(found[name], truth[name], eager[name], name)


def gradients_of(layer: torch.nn.Module, output: Tensor) -> dict[str, Tensor]:
    named = dict(layer.named_parameters())
    found = torch.autograd.grad(output.sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


# torch.func, forward mode, batches of gradients


@cases
def test_vmap(row: Variant, learned: bool) -> None:
    inputs = draw(row, (5, 4), torch.float64, learned=learned)
    call, tensors = as_function(inputs)
    in_dims = tuple(None if name in inputs.parameters else 0 for name in inputs.tensors())
    judge_double([vmap(call, in_dims)(*tensors)], [ours(inputs)])


@cases
def test_func_grad(row: Variant, learned: bool) -> None:
    inputs = draw(row, (5, 4), torch.float64, learned=learned)
    call, tensors = as_function(inputs)

    def loss(*values: Tensor) -> Tensor:
        return (call(*values) * inputs.grad).sum()

    found = grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    judge_double(found, gradients(ours(inputs), inputs).values())


@pytest.mark.parametrize("row", VARIANTS.values(), ids=list(VARIANTS))
def test_func_grad_agrees_at_the_kinks(row: Variant) -> None:
    points = torch.tensor([0.0, *row.defaults.values()], dtype=torch.float64)
    inputs = draw(row, points.shape, torch.float64)
    call, tensors = as_function(inputs)
    tensors = [points.clone().requires_grad_() for _ in tensors]
    output = call(*tensors)
    expected = torch.autograd.grad(output.sum(), tensors)
    found = grad(lambda *values: call(*values).sum(), argnums=tuple(range(len(tensors))))(*tensors)
    judge_double(found, expected)


def test_gradients_per_sample() -> None:
    layer = FeedForward(4, 8, variant="xielu").double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, parameters, (sample,))
        return output.square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        named = dict(layer.named_parameters())
        one = torch.autograd.grad(layer(sample).square().sum(), list(named.values()))
        judge_double([per_sample[name][index] for name in named], one)


@torch_uses_jit
@cases
def test_forward_mode(row: Variant, learned: bool) -> None:
    inputs = draw(row, (3, 4), torch.float64, learned=learned)
    call, tensors = as_function(inputs)
    tangents = [torch.randn_like(t) for t in tensors]
    found = gradients(ours(inputs), inputs)
    truth = sum((found[n] * t).sum() for n, t in zip(found, tangents, strict=True))
    forward_mode: Any = forward_ad  # which has no types
    with forward_mode.dual_level():
        duals = [forward_mode.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        tangent = forward_mode.unpack_dual(call(*duals)).tangent
    assert tangent is not None
    by_func = jvp(call, tuple(tensors), tuple(tangents))[1]
    judge_double([(tangent * inputs.grad).sum(), (by_func * inputs.grad).sum()], [truth, truth])


@cases
def test_a_batch_of_incoming_gradients(row: Variant, learned: bool) -> None:
    inputs = draw(row, (3, 4), torch.float64, learned=learned)
    tensors = list(inputs.tensors().values())
    batch = torch.randn(5, 3, 4, dtype=torch.float64)
    output = ours(inputs)
    found = torch.autograd.grad(output, tensors, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, tensors, g, retain_graph=True) for g in batch]
    judge_double(found, [torch.stack(each) for each in zip(*one_by_one, strict=True)])


@torch_uses_jit
def test_hessian_of_each_kind_of_route() -> None:
    x = torch.linspace(-2.0, 2.0, 4, dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        return gating(t, t, "geglu").sum()

    def by_hand(t: Tensor) -> Tensor:
        return (torch.nn.functional.gelu(t) * t).sum()

    truth = hessian(by_hand)(x)
    functional: Any = torch.autograd.functional  # which has no types
    by_autograd = functional.hessian(loss, x, vectorize=True)
    judge_double([hessian(loss)(x), jacrev(grad(loss))(x), by_autograd], [truth] * 3)


def test_compiles_through_torch_func() -> None:
    x = torch.randn(4)

    def loss(t: Tensor) -> Tensor:
        return gating(t, t, "geglu").sum()

    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), grad(loss)(x))


@torch_uses_jit
def test_every_differentiation_has_the_same_infinities_and_nans() -> None:
    special = torch.tensor([-torch.inf, -50.0, -1.0, 0.0, 1.0, 50.0, torch.inf, torch.nan])
    pairs = torch.cartesian_prod(special, special)
    for row in VARIANTS.values():
        tensors = tuple(t.clone().requires_grad_() for t in pairs.unbind(1)[: 1 + row.gated])

        def hidden(*tensors: Tensor, row: Variant = row) -> Tensor:
            return compute(row, tensors[0], tensors[1] if row.gated else None, row.defaults)

        truth = torch.autograd.grad(hidden(*tensors).sum(), tensors)
        ones = torch.ones(len(pairs))
        plain = [t.detach() for t in tensors]
        for found, expected in zip(vjp(hidden, *plain)[1](ones), truth, strict=True):
            assert_same_special_values(found, expected, row.name)
        for place, expected in enumerate(truth):
            # Another tangent of 0 would make a NaN of an infinite slope.
            one = functools.partial(_with_one, hidden, plain, place)
            tangent = jvp(one, (plain[place],), (ones,))[1]
            assert_same_special_values(tangent, expected, row.name)


def _with_one(of: Callable[..., Tensor], given: list[Tensor], place: int, one: Tensor) -> Tensor:
    return of(*given[:place], one, *given[place + 1 :])


# autocast and activation checkpointing


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@cases
def test_autocast_leaves_the_operator_as_it_is(
    row: Variant, learned: bool, half: torch.dtype
) -> None:
    for dtype in (torch.float32, half):
        inputs = draw(row, (3, 64), dtype, learned=learned)
        with torch.autocast("cpu", half):
            output = ours(inputs)
            found = gradients(output, inputs)
        assert same_bits(output, ours(inputs))
        expected = gradients(ours(inputs), inputs)
        assert all(same_bits(found[name], expected[name]) for name in expected)


def autocast_or_not(half: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=["no", "bf16", "fp16"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("variant", ["gelu", "swiglu_oai", "xielu", "prelu"])
def test_checkpointing(variant: str, reentrant: bool, half: torch.dtype | None) -> None:
    layer = FeedForward(8, 16, variant=variant, bias=True, dropout=0.3)
    x = torch.randn(5, 8, requires_grad=True)

    def trained(forward: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        torch.manual_seed(1)  # the same dropout
        layer.zero_grad()
        x.grad = None
        with autocast_or_not(half):
            output = forward(x)
        assert output.dtype == (half or torch.float32)
        torch.autograd.backward(output.float().square().sum())
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    plain = trained(layer)
    again = trained(lambda t: checkpoint(layer, t, use_reentrant=reentrant))
    for a, b in zip(plain, again, strict=True):
        assert a is not None
        assert b is not None
        assert same_bits(a, b)
