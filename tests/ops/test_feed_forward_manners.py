"""The layer under PyTorch's transformations, and the module that reads its children's weights."""

import copy
import io
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_matches, same_bits
from support.layers import (
    BACKENDS,
    LIBRARIES,
    OWN,
    Case,
    Layer,
    by_hand,
    draw,
    fit,
    judge,
    ours,
    with_gradients,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from gatedffn import FeedForward, functional
from gatedffn.errors import BackendError, GatedFFNError
from gatedffn.ops import measure
from gatedffn.ops.operator import learned_and_fixed
from gatedffn.variants import VARIANTS, Variant

# One row of each kind: no gate, gate, learned parameters, a learned and a fixed one.
KINDS = ("gelu", "geglu", "xielu", "swiglu_oai")
kinds = pytest.mark.parametrize("row", [VARIANTS[name] for name in KINDS], ids=KINDS)
saves = pytest.mark.parametrize("save", ["gate_up", "input"])
# PyTorch itself, where it differentiates forward.
torch_uses_jit = pytest.mark.filterwarnings(
    r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"
)
TOKENS = 40


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def trained(
    layer: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The output and the gradient of the input and of every parameter."""
    x = x.detach().requires_grad_()
    output = layer(x) if forward is None else forward(x)
    named = {"x": x, **dict(layer.named_parameters())}
    weights = torch.linspace(-1.0, 1.0, output.numel()).view(output.shape).to(output.dtype)
    found = torch.autograd.grad(output, list(named.values()), weights)
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


def child_by_child(layer: nn.Module) -> nn.Module:
    """A copy whose children are called."""
    modules = copy.deepcopy(layer)
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    return modules


def judge_output(found: Tensor, layer: nn.Module, x: Tensor) -> None:
    modules = child_by_child(layer)
    eager = modules(x)
    assert_matches(found, modules.double()(x.double()), eager)


def judge_module(found: dict[str, Tensor], layer: nn.Module, x: Tensor) -> None:
    """Gradients of a layer against the same module called child by child."""
    modules = child_by_child(layer)
    eager = trained(modules, x)
    truth = trained(modules.double(), x.double())
    for name, value in found.items():
        assert_matches(value, truth[name], eager[name], name)


# the operators


operators = torch.ops.gatedffn
backends = pytest.mark.parametrize("backend", BACKENDS)


def operands(layer: Layer) -> tuple[Any, ...]:
    return layer.x, *layer.weights, *learned_and_fixed(layer.parameters, layer.x), layer.row.name


@pytest.mark.parametrize(
    ("name", "learned", "save", "down"),
    [
        ("gelu", "", "gate_up", True),
        ("geglu", "", "gate_up", False),
        ("xielu", "unit", "input", True),
        ("swiglu_oai", "layer", "gate_up", True),
        ("swiglu_oai", "", "input", True),
        ("swiglu", "unit", "input", False),
    ],
)
@pytest.mark.parametrize("backend", [*OWN, *LIBRARIES])
def test_opcheck(name: str, learned: Any, save: str, down: bool, backend: str) -> None:
    case = Case(row=VARIANTS[name], batch=(2, 3), learned=learned, down=down)
    layer = draw(fit(backend, case)[0])
    settings = (save, None if backend == "linear" else 2, backend)
    torch.library.opcheck(operators.feed_forward.default, (*operands(layer), *settings))
    frozen = layer.mapped(lambda _, tensor: tensor.detach())
    torch.library.opcheck(operators.feed_forward.default, (*operands(frozen), *settings))
    given = operands(layer)
    torch.library.opcheck(operators.feed_forward_saving.default, (*given, *settings))
    _, *saved = operators.feed_forward_saving(*given, *settings)
    assert len(saved) == (0 if save == "input" else 1 + layer.row.gated)
    backward = (layer.grad, saved, list(layer.tensors()), *given, *settings)
    torch.library.opcheck(operators.feed_forward_backward.default, backward)


def by_kernel(operator: str, *arguments: Any) -> Any:
    """The operator as PyTorch calls it for a processor, whatever device a tensor is on."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return getattr(operators, operator).default.redispatch(keys, *arguments)


@pytest.mark.parametrize(
    "operator", ["feed_forward", "feed_forward_saving", "feed_forward_backward"]
)
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (2, torch.ones(39, 24), "they must be equal"),
        (2, None, "branches of another kind of variant"),
        (2, torch.ones(40, 24, device="meta"), "move one"),
        (3, torch.ones(16, 41), "the last size of the one must be the second of the other"),
        (4, torch.ones(1), "the first size of gate_weight"),
    ],
    ids=["shape", "missing", "device", "width", "bias"],
)
def test_the_operators_refuse_what_kernels_cannot_trust(
    place: int, wrong: Tensor | None, message: str, operator: str
) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], bias=False))
    given = list(operands(layer.mapped(lambda _, tensor: tensor.detach())))
    given[place] = wrong
    first = (layer.grad, [], ["x"]) if operator == "feed_forward_backward" else ()
    with pytest.raises(GatedFFNError, match=message):
        by_kernel(operator, *first, *given, "gate_up", None, "auto")


def test_gating_refuses_what_kernels_cannot_trust() -> None:
    x = torch.randn(4, 8)
    for variant, up, message in (
        ("swiglu", None, "branches of another kind"),
        ("relu", x, "branches of another kind"),
        ("swiglu", torch.randn(4, 7), "they must be equal"),
        ("swiglu", x.to("meta"), "move one of them"),
    ):
        fixed = list(VARIANTS[variant].defaults.values())
        given: tuple[Any, ...] = (x, up, [], fixed, variant, "auto")
        with pytest.raises(GatedFFNError, match=message):
            by_kernel("gating", *given)
        with pytest.raises(GatedFFNError, match=message):
            by_kernel("gating_backward", x, [], ["gate"], *given)


# torch.compile and torch.export


class Graphs:
    """A compiler's backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.code: list[str] = []

    def compile(self, module: nn.Module, **options: Any) -> Callable[..., Tensor]:
        # They load much.
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: Any, _: object) -> Any:
            self.code.append(graph.code)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        compiled: Callable[..., Tensor] = torch.compile(
            module, backend=backend, fullgraph=True, **options
        )
        return compiled

    def operators(self) -> list[set[str]]:
        names = ("feed_forward", "feed_forward_saving", "feed_forward_backward")
        return [{n for n in names if f"gatedffn.{n}.default" in code} for code in self.code]


@kinds
def test_a_small_layer_compiles_to_pytorch_own_operators(row: Variant) -> None:
    layer, x, graphs = FeedForward(16, 24, variant=row, bias=True), torch.randn(5, 16), Graphs()
    judge_module(trained(layer, x, graphs.compile(layer)), layer, x)
    assert graphs.operators() == [set(), set()]
    assert not any("gatedffn" in code for code in graphs.code)


@kinds
@saves
def test_a_large_layer_compiles_to_the_operator(row: Variant, save: Any) -> None:
    layer = FeedForward(1024, 1040, variant=row, bias=True, save=save, tile=15)
    x, graphs = torch.randn(TOKENS, 1024), Graphs()
    found = trained(layer, x, graphs.compile(layer))
    expected = trained(layer, x)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert graphs.operators() == [{"feed_forward_saving"}, {"feed_forward_backward"}]


def test_compiles_without_gradients() -> None:
    layer, x, graphs = FeedForward(1024, 1040), torch.randn(TOKENS, 1024), Graphs()
    compiled = graphs.compile(layer)
    with torch.no_grad():
        assert same_bits(compiled(x), layer(x))
    assert graphs.operators() == [{"feed_forward"}]


@kinds
def test_compiles_once_for_all_shapes(row: Variant) -> None:
    layer, graphs = FeedForward(1024, 1040, variant=row), Graphs()
    compiled = graphs.compile(layer, dynamic=True)
    for tokens in (TOKENS, 7, TOKENS + 30):
        x = torch.randn(tokens, 1024)
        with torch.compiler.set_stance("default" if tokens == TOKENS else "fail_on_recompile"):
            found = trained(layer, x, compiled)
        expected = trained(layer, x)
        assert all(same_bits(found[name], expected[name]) for name in expected)
    assert len(graphs.code) == 2


def test_compiles_with_autocast() -> None:
    layer, x = FeedForward(1024, 1040), torch.randn(TOKENS, 1024)

    def forward(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def half(t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return module(t)

        return half

    found = trained(layer, x, forward(Graphs().compile(layer)))
    expected = trained(layer, x, forward(layer))
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tokens", [5, TOKENS])
@kinds
def test_exports_pytorch_own_operators_alone(row: Variant, tokens: int) -> None:
    layer, x = FeedForward(1024, 1040, variant=row), torch.randn(tokens, 1024)
    exported = torch.export.export(layer, (x,))
    code = str(exported.graph_module.code)
    assert "gatedffn" not in code
    assert "torch.ops.aten.linear" in code
    judge_output(exported.module()(x), layer, x)


def test_exports_any_number_of_tokens() -> None:
    layer = FeedForward(1024, 1040)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(layer, (torch.randn(5, 1024),), dynamic_shapes=({0: tokens},))
    x = torch.randn(TOKENS, 1024)
    judge_output(exported.module()(x), layer, x)


# torch.func, forward mode, batches of gradients, higher derivatives


def as_function(layer: Layer, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The public call as a function of every operand, and the operands."""
    names = list(layer.tensors())

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return ours(layer.mapped(lambda name, _: given[name]), **options)

    return call, list(layer.tensors().values())


def judge_double(found: Any, truth: Any) -> None:
    """Two float64 results that took other routes; the yardstick is float32's rounding of one."""
    for a, b in zip(found, truth, strict=True):
        assert_matches(a.float(), b, b.float())


def small(row: Variant, **changed: Any) -> Layer:
    given: dict[str, Any] = {
        "batch": (3,),
        "sizes": (4, 5, 3),
        "dtype": torch.float64,
        "learned": "unit",
    }
    return draw(Case(row=row, **(given | changed)))


@kinds
@saves
def test_gradcheck(row: Variant, save: str) -> None:
    call, tensors = as_function(small(row), save=save)
    assert torch.autograd.gradcheck(call, tensors, check_batched_grad=True)


@kinds
@saves
def test_double_backward(row: Variant, save: str) -> None:
    call, tensors = as_function(small(row, batch=(2,)), save=save)
    assert torch.autograd.gradgradcheck(call, tensors)


def penalty(layer: Layer, forward: Callable[[Layer], Tensor]) -> dict[str, Tensor]:
    """The gradients of the squares of the gradients."""
    tensors = list(layer.tensors().values())
    first = torch.autograd.grad(forward(layer), tensors, layer.grad, create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    second = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    return dict(zip(layer.tensors(), second, strict=True))


@kinds
def test_a_gradient_of_the_gradient_in_float32(row: Variant) -> None:
    layer = draw(Case(row=row, learned="layer"))
    found = penalty(layer, ours)
    truth, eager = penalty(layer.to(torch.float64), by_hand), penalty(layer, by_hand)
    for name, value in found.items():
        assert_matches(value, truth[name], eager[name], name)


@kinds
@backends
def test_every_way_has_the_second_derivatives_of_the_definition(row: Variant, backend: str) -> None:
    case, options = fit(backend, Case(row=row, learned="layer"))
    layer = draw(case)
    found = penalty(layer, lambda each: ours(each, **options))
    expected = penalty(layer, lambda each: ours(each, backend="definition"))
    assert all(same_bits(found[name], expected[name]) for name in expected)


@kinds
def test_vmap_and_func_grad(row: Variant) -> None:
    layer = small(row)
    call, tensors = as_function(layer)
    in_dims = (0, *[None] * (len(tensors) - 1))
    judge_double([vmap(call, in_dims)(*tensors)], [ours(layer)])

    def loss(*values: Tensor) -> Tensor:
        return (call(*values) * layer.grad).sum()

    found = grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    expected = with_gradients(layer, ours(layer))
    judge_double(found, [expected[name] for name in layer.tensors()])


@torch_uses_jit
@kinds
def test_forward_mode(row: Variant) -> None:
    layer = small(row)
    call, tensors = as_function(layer)
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    found = with_gradients(layer, ours(layer))
    products = [(found[n] * t).sum() for n, t in zip(layer.tensors(), tangents, strict=True)]
    truth = torch.stack(products).sum()
    forward_mode: Any = forward_ad  # which has no types
    with forward_mode.dual_level():
        duals = [forward_mode.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        tangent = forward_mode.unpack_dual(call(*duals)).tangent
    assert tangent is not None
    by_func = jvp(call, tuple(tensors), tuple(tangents))[1]
    judge_double([(tangent * layer.grad).sum(), (by_func * layer.grad).sum()], [truth, truth])


@kinds
@saves
def test_a_batch_of_incoming_gradients(row: Variant, save: str) -> None:
    layer = small(row)
    tensors = list(layer.tensors().values())
    batch = torch.randn(5, 3, 3, dtype=torch.float64)
    output = ours(layer, save=save)
    found = torch.autograd.grad(output, tensors, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, tensors, g, retain_graph=True) for g in batch]
    judge_double(found, [torch.stack(each) for each in zip(*one_by_one, strict=True)])


def test_gradients_per_sample_of_the_module() -> None:
    layer = FeedForward(4, 8, variant="xielu", bias=True).double()
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


def test_other_parameters_by_functional_call() -> None:
    layer, other, x = FeedForward(4, 8), FeedForward(4, 8), torch.randn(3, 4)
    assert layer.why_modules() is None
    called = functional_call(layer, dict(other.named_parameters()), (x,))
    assert same_bits(called, other(x))


# autocast and activation checkpointing


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@saves
def test_autocast_gives_the_dtypes_that_linear_layers_give(
    given: torch.dtype, half: torch.dtype, save: Any
) -> None:
    layer = FeedForward(24, 40, bias=True, dtype=given, save=save)
    modules = child_by_child(layer)
    x = torch.randn(5, 24, dtype=given)

    def forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def called(t: Tensor) -> Tensor:
            with torch.autocast("cpu", half):
                output: Tensor = module(t)
                return output

        return called

    found, expected = (trained(each, x, forward(each)) for each in (layer, modules))
    truth = trained(copy.deepcopy(layer).double(), x.double())
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert_matches(value, truth[name], expected[name], name)


def test_autocast_without_gradients_and_off() -> None:
    layer, x = FeedForward(24, 40), torch.randn(5, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32


def test_autocast_casts_each_weight_once() -> None:
    layer, x = FeedForward(24, 40, bias=True), torch.randn(5, 24)

    def casts(**options: Any) -> int:
        with (
            torch.autocast("cpu", torch.bfloat16, **options),
            profile(activities=[ProfilerActivity.CPU]) as found,
        ):
            for grad_enabled in (False, True, True):
                with torch.set_grad_enabled(grad_enabled):
                    layer(x)
        return sum(event.name == "aten::_to_copy" for event in found.events())

    assert casts() == 3 + 6  # the input is no leaf that autograd follows
    assert casts() == 3 + 6  # another context casts anew
    assert casts(cache_enabled=False) == 3 * (1 + 6)
    layer.requires_grad_(False)
    assert casts() == 3 * (1 + 6)


def test_autocast_to_another_dtype_within() -> None:
    """PyTorch keeps one cast a weight, of whichever dtype; linear layers fail then."""
    layer, x = FeedForward(24, 40, bias=True), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        outer = layer(x)
        with torch.autocast("cpu", torch.float16):
            inner = layer(x)
            with pytest.raises(RuntimeError, match="dtype"):
                F.linear(x, layer.get_parameter("up_proj.weight"))
    with torch.autocast("cpu", torch.float16):
        alone = layer(x)
    assert inner.dtype == torch.float16
    assert same_bits(inner, alone)
    torch.autograd.backward((inner.float() + outer.float()).sum())
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_calls_under_autocast_save_one_cast() -> None:
    """Hooks of saved tensors see what the layer saves, and nothing else."""
    layer, x = FeedForward(24, 40, bias=True), torch.randn(5, 24)
    saved: list[list[Tensor]] = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            saved.append([])
            with saved_tensors_hooks(saved[-1].append, pytest.fail):
                layer(x)
    first, second = ({t.data_ptr() for t in of if t.shape != (5, 24)} for of in saved)
    assert len(saved[0]) == len(saved[1])
    assert len(first & second) == 3  # the weights: what a bias is does not matter to backward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_weight_changed_within_autocast_counts_as_in_linear_layers(mode: Any) -> None:
    layer = FeedForward(24, 40, bias=True)
    modules, x = child_by_child(copy.deepcopy(layer)), torch.randn(5, 24)

    def outputs(module: nn.Module, *, cache_enabled: bool) -> list[Tensor]:
        found = []
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            for _ in range(2):
                with mode():
                    found.append(module(x))
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.mul_(2)
            found.append(module(x))
        torch.autograd.backward(found[-1].float().square().sum())
        return [*found, *(parameter.grad for parameter in module.parameters())]

    for cache_enabled in (True, False):
        found, expected = (outputs(m, cache_enabled=cache_enabled) for m in (layer, modules))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=0.02 * b.detach().abs().max().item(), rtol=0)
        cached = cache_enabled and mode is not torch.inference_mode
        assert torch.equal(found[0], found[1]) == cached


def test_what_autocast_is_given_by_mistake_is_told_as_without() -> None:
    x, weights = torch.randn(5, 8), [torch.randn(16, 8), torch.randn(16, 8), torch.randn(8, 16)]
    for wrong in (torch.randn(2, 16, 8), torch.tensor(1.0), torch.randn(16, 8, device="meta")):
        for given in ([wrong.requires_grad_(), *weights[1:]], [*weights[:2], wrong]):
            with pytest.raises(GatedFFNError) as plain:
                functional.feed_forward(x, *given)
            with (
                torch.autocast("cpu", torch.bfloat16),
                pytest.raises(GatedFFNError) as under,
            ):
                functional.feed_forward(x, *given)
            assert type(under.value) is type(plain.value)


def test_backward_within_autocast_gives_equal_gradients() -> None:
    for backend in ("torch", "onednn"):
        for tile in (None, 5):
            layer = draw(Case(row=VARIANTS["swiglu"]))
            expected = with_gradients(layer, ours(layer, backend=backend, tile=tile))
            output = ours(layer, backend=backend, tile=tile)
            with torch.autocast("cpu", torch.bfloat16):
                found = with_gradients(layer, output)
            assert all(same_bits(found[name], expected[name]) for name in expected)


def autocast_or_not(half: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


@pytest.mark.parametrize("half", [False, True], ids=["no", "bf16"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@saves
@kinds
def test_checkpointing(row: Variant, save: Any, reentrant: bool, half: bool) -> None:
    layer = FeedForward(8, 16, variant=row, bias=True, save=save, backend="torch")
    assert layer.why_modules() is None
    x = torch.randn(5, 8, requires_grad=True)

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        layer.zero_grad()
        x.grad = None
        with autocast_or_not(half):
            output = forward(x)
        assert output.dtype == (torch.bfloat16 if half else torch.float32)
        torch.autograd.backward(output.float().square().sum())
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    plain = gradients(layer)
    again = gradients(lambda t: checkpoint(layer, t, use_reentrant=reentrant))
    for a, b in zip(plain, again, strict=True):
        assert a is not None
        assert b is not None
        assert same_bits(a, b)


# the module and its children


@pytest.fixture
def children_called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a linear layer was called, whatever its kind."""
    calls: list[int] = []
    real = F.linear

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "linear", linear)
    return calls


def with_hook(layer: FeedForward) -> None:
    layer.up_proj.register_forward_hook(lambda *args: 2.0 * args[2])


def with_pre_hook(layer: FeedForward) -> None:
    layer.down_proj.register_forward_pre_hook(lambda *args: (2.0 * args[1][0],))


def with_backward_hook(layer: FeedForward) -> None:
    def half(_: nn.Module, inputs: Any, __: Any) -> Any:
        return tuple(None if g is None else 0.5 * g for g in inputs)

    layer.gate_proj.register_full_backward_hook(half)


def with_backward_pre_hook(layer: FeedForward) -> None:
    layer.gate_proj.register_full_backward_pre_hook(lambda *args: (0.5 * args[1][0],))


class LoRA(nn.Linear):
    """A linear layer with an adapter, as a subclass."""

    def __init__(self, up: nn.Linear) -> None:
        super().__init__(up.in_features, up.out_features)
        self.load_state_dict(up.state_dict())
        self.a = nn.Parameter(torch.randn(2, up.in_features))
        self.b = nn.Parameter(torch.randn(up.out_features, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.a), self.b)


def with_lora(layer: FeedForward) -> None:
    assert isinstance(layer.up_proj, nn.Linear)
    layer.up_proj = LoRA(layer.up_proj)


def with_parametrization(layer: FeedForward) -> None:
    parametrizations.weight_norm(layer.up_proj)


def with_forward_of_its_own(layer: FeedForward) -> None:
    real = layer.down_proj.forward
    layer.down_proj.forward = lambda t: 3.0 * real(t)


def with_pruning(layer: FeedForward) -> None:
    from torch.nn.utils import prune

    untyped: Any = prune
    untyped.l1_unstructured(layer.gate_proj, "weight", amount=0.5)


def with_a_module_in_place(layer: FeedForward) -> None:
    layer.up_proj = nn.Sequential(layer.up_proj, nn.Tanh())


CHANGES: dict[str, tuple[str, Callable[[FeedForward], None]]] = {
    "hook": ("up_proj", with_hook),
    "pre_hook": ("down_proj", with_pre_hook),
    "backward_hook": ("gate_proj", with_backward_hook),
    "backward_pre_hook": ("gate_proj", with_backward_pre_hook),
    "lora": ("up_proj", with_lora),
    "parametrization": ("up_proj", with_parametrization),
    "forward": ("down_proj", with_forward_of_its_own),
    "pruning": ("gate_proj", with_pruning),
    "module": ("up_proj", with_a_module_in_place),
}


class ByHand(nn.Module):
    """The same children, called one by one."""

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer.children()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


@pytest.mark.parametrize(("child", "change"), CHANGES.values(), ids=list(CHANGES))
def test_a_changed_child_is_called(
    child: str, change: Callable[[FeedForward], None], children_called: list[int]
) -> None:
    layer, x = FeedForward(8, 16, bias=True), torch.randn(5, 8)
    plain = trained(layer, x)
    assert layer.why_modules() is None
    assert not children_called
    change(layer)
    reason = layer.why_modules()
    assert reason is not None
    assert reason.startswith(f"{child} is not a plain nn.Linear")
    found = trained(layer, x)
    assert len(children_called) >= 3
    assert set(found) - set(plain) or any(not same_bits(found[n], plain[n]) for n in plain)
    modules = ByHand(layer)
    eager = trained(modules, x)
    truth = trained(modules.double(), x.double())
    for name, value in found.items():
        assert_matches(value, truth[name], eager[name], name)


def test_a_hook_that_is_removed_leaves_a_plain_child() -> None:
    layer = FeedForward(8, 16)
    handle = layer.up_proj.register_forward_hook(lambda *_: None)
    assert layer.why_modules() is not None
    handle.remove()
    assert layer.why_modules() is None
    parametrizations.orthogonal(layer.up_proj)
    assert layer.why_modules() is not None
    parametrize.remove_parametrizations(layer.up_proj, "weight")
    # PyTorch leaves the class that it made.
    assert same_bits(layer(torch.ones(2, 8)), copy.deepcopy(layer)(torch.ones(2, 8)))


def test_a_global_hook_sees_the_children() -> None:
    layer, seen = FeedForward(8, 16), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module))
    )
    try:
        layer(torch.randn(3, 8))
    finally:
        handle.remove()
    assert seen == [nn.Linear] * 3 + [FeedForward]


def test_a_weight_that_is_a_plain_attribute() -> None:
    # As fully sharded and replicated training leave it while a module runs.
    layer, x = FeedForward(8, 16, bias=True), torch.randn(3, 8)
    expected = layer(x)
    for name in ("weight", "bias"):
        value = getattr(layer.up_proj, name).detach().clone()
        delattr(layer.up_proj, name)
        setattr(layer.up_proj, name, value)
    assert same_bits(layer(x), expected) or layer.why_modules() is not None
    assert_matches(layer(x), expected.double(), expected)


def test_dropout_calls_the_children_in_training_only(children_called: list[int]) -> None:
    layer, x = FeedForward(8, 16, dropout=0.5), torch.randn(3, 8)
    layer(x)
    assert layer.why_modules() == "dropout acts between the projections"
    assert len(children_called) == 3
    layer.eval()(x)
    assert layer.why_modules() is None
    assert len(children_called) == 3


OPTIONS: dict[str, Any] = {"save": "input", "tile": 2, "backend": "torch"}


def test_copies_and_pickles_keep_the_options() -> None:
    layer, x = FeedForward(8, 16, variant="xielu", **OPTIONS), torch.randn(5, 8)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stored, weights_only=False),
    ]
    expected = trained(layer, x)
    for other in others:
        assert {name: getattr(other, name) for name in OPTIONS} == OPTIONS
        found = trained(other, x)
        assert all(same_bits(found[name], expected[name]) for name in expected)


def test_the_options_are_no_state() -> None:
    layer, plain = FeedForward(8, 16, **OPTIONS), FeedForward(8, 16)
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 8)
    judge_module(trained(layer, x), plain, x)


def test_a_wrong_option_is_refused_where_it_is_given_and_where_it_is_set() -> None:
    with pytest.raises(BackendError, match="it must be one of"):
        FeedForward(8, backend="blas")
    layer = FeedForward(8)
    layer.tile = 0
    with pytest.raises(ValueError, match="it must be a positive number of tokens"):
        layer(torch.ones(2, 8))


# modes, threads, processes


@backends
def test_inference_mode(backend: str) -> None:
    layer = draw(fit(backend, Case(row=VARIANTS["swiglu"], batch=(2,)))[0])
    with torch.no_grad():
        expected = ours(layer, backend=backend)
    with torch.inference_mode():
        output = ours(layer, backend=backend)
        assert output.is_inference()
        assert same_bits(output, expected)
    # What inference left behind does not reach training, nor the other way.
    with torch.no_grad():
        assert same_bits(ours(layer, backend=backend), expected)
    found = with_gradients(layer, ours(layer, backend=backend, save="input"))
    judge([found], [layer])
    with torch.inference_mode():
        assert same_bits(ours(layer, backend=backend), expected)


@backends
def test_threads_at_once_give_what_one_gives(backend: str) -> None:
    given = [Case(row=VARIANTS["swiglu"], batch=(40 + n,)) for n in range(4)]
    cases, options = zip(*(fit(backend, case) for case in given), strict=True)
    layers = [draw(case, seed) for seed, case in enumerate(cases)]
    expected = [with_gradients(layer, ours(layer, **options[0])) for layer in layers]
    wrong: list[object] = []
    start = threading.Barrier(len(layers))

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                layer = layers[number]
                found = with_gradients(layer, ours(layer, **options[0]))
                wrong.extend(n for n in found if not same_bits(found[n], expected[number][n]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@saves
def test_under_deterministic_algorithms(save: str) -> None:
    layer = draw(Case(row=VARIANTS["xielu"], learned="unit"))
    torch.use_deterministic_algorithms(True)
    try:
        found = with_gradients(layer, ours(layer, save=save, tile=9))
        again = with_gradients(layer, ours(layer, save=save, tile=9))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(found[name], again[name]) for name in found)
    judge([found], [layer])


@pytest.mark.parametrize("learned", ["", "unit"])
def test_under_a_profiler_and_a_tracer(learned: Any) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], learned=learned))
    expected = with_gradients(layer, ours(layer))
    with torch.autograd.profiler.profile() as profile:
        found = with_gradients(layer, ours(layer))
    assert all(same_bits(found[name], expected[name]) for name in expected)
    names = {event.name for event in profile.function_events or ()}
    assert {"gatedffn::feed_forward_saving", "gatedffn::feed_forward_backward"} <= names


def test_anomaly_mode_and_saved_tensors_elsewhere() -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    expected = with_gradients(layer, ours(layer))
    with torch.autograd.graph.save_on_cpu():
        found = with_gradients(layer, ours(layer))
    assert all(same_bits(found[name], expected[name]) for name in expected)


DATA_PARALLEL = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from gatedffn import FeedForward, functional

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
)
torch.manual_seed(0)
layer = FeedForward(8, 16, variant="xielu", save="input", tile=2, backend="torch")
x = torch.randn(10, 8)
parallel = DistributedDataParallel(layer)
parallel(x[5 * rank : 5 * rank + 5]).square().mean().backward()
found = [parameter.grad.clone() for parameter in layer.parameters()]
layer.zero_grad()
layer(x).square().mean().backward()
for one, all_tokens in zip(found, layer.parameters()):
    torch.testing.assert_close(one, all_tokens.grad)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without processes")
def test_data_parallel_in_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DATA_PARALLEL, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port)], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
