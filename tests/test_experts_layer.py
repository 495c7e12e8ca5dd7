"""`Experts`, and the operator under PyTorch's transformations."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.compare import same_bits
from support.experts import COUNT, Case, Mixture, draw, ours, with_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gatedffn as gf
from gatedffn.errors import BackendError, SettingError
from gatedffn.ops import measure
from gatedffn.ops.operator import learned_and_fixed
from gatedffn.variants import VARIANTS

operators = torch.ops.gatedffn
KINDS = {"swiglu": "gate_up", "geglu": None, "relu": None, "xielu": None}
kinds = pytest.mark.parametrize("name", KINDS)
torch_uses_jit = pytest.mark.filterwarnings(
    r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


def small(name: str, **more: Any) -> Mixture:
    case = Case(row=VARIANTS[name], order=KINDS[name], tokens=4, slots=2, sizes=(3, 4, 2), **more)
    return draw(case, torch.tensor([[0, 1], [3, 3], [1, COUNT], [4, 0]]))


def routed(layer: gf.Experts, seed: int = 0, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.d_model, generator=generator)
    index = torch.randint(layer.num_experts + 1, (tokens, 2), generator=generator)
    return x, index, torch.rand(tokens, 2, generator=generator)


def trained(layer: gf.Experts, call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of the input, of the routing weights and of the parameters."""
    x, index, weights = inputs
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    output = call(leaves[0], index, leaves[1])
    total = (output.float() * torch.linspace(-1.0, 1.0, output.numel()).view_as(output)).sum()
    return [output.detach(), *torch.autograd.grad(total, [*leaves, *layer.parameters()])]


# The layer.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "relu", "xielu"])
def test_the_layer_is_the_function_of_its_parameters(name: str, bias: bool) -> None:
    layer = gf.Experts(6, 10, 4, variant=name, bias=bias)
    first = "gate_up_proj" if VARIANTS[name].gated else "up_proj"
    rows = 20 if VARIANTS[name].gated else 10
    shapes: dict[str, tuple[int, ...]] = {first: (4, rows, 6), "down_proj": (4, 6, 10)}
    if bias:
        shapes |= {f"{first}_bias": (4, rows), "down_proj_bias": (4, 6)}
    shapes |= {p: (1,) for p in VARIANTS[name].defaults if name == "xielu"}
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == shapes
    x, index, weights = routed(layer)
    output = layer(x, index, weights)
    for token in range(len(x)):
        total = torch.zeros(6)
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert == 4:
                continue
            one = gf.FeedForward(6, 10, variant=name, bias=bias)
            held = dict(layer.named_parameters())
            with torch.no_grad():
                for child, parts in (
                    (first, [one.gate_proj, one.up_proj] if rows == 20 else [one.up_proj]),
                    ("down_proj", [one.down_proj]),
                ):
                    for what, suffix in (("weight", ""), ("bias", "_bias")):
                        if f"{child}{suffix}" in held:
                            halves = held[f"{child}{suffix}"][expert].chunk(len(parts))
                            for part, half in zip(parts, halves, strict=True):
                                getattr(part, what).copy_(half)
                total = total + weight * one(x[token])
        torch.testing.assert_close(output[token], total)


def test_what_is_drawn_and_what_it_says() -> None:
    layer = gf.Experts(64, 48, 8, bias=True)
    for weight, inputs in ((layer.gate_up_proj, 64), (layer.down_proj, 48)):
        assert isinstance(weight, Tensor)
        assert 0.99 < weight.abs().max() * inputs**0.5 <= 1.0
        assert abs(weight.mean()) < 0.01
    before = layer.down_proj.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.down_proj, before)
    assert repr(layer) == "Experts(8 x (64 -> 48 -> 64), variant='swiglu', beta=1)"
    for wrong, words in (((0, 4, 2), "d_model is 0"), ((4, 4, 0), "num_experts is 0")):
        with pytest.raises(SettingError, match=words):
            gf.Experts(*wrong)
    with pytest.raises(SettingError, match="weigh is 'x'"):
        gf.Experts(4, 4, 2, weigh="x")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="backend is 'x'"):
        gf.Experts(4, 4, 2, backend="x")


def test_copies_files_and_the_meta_device() -> None:
    layer = gf.Experts(6, 10, 4, variant="swiglu_oai", limit=5.0, bias=True, weigh="input")
    inputs = routed(layer)
    expected = layer(*inputs)
    assert same_bits(copy.deepcopy(layer)(*inputs), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    options: dict[str, Any] = {"variant": "swiglu_oai", "limit": 5.0, "weigh": "input"}
    empty = gf.Experts(6, 10, 4, bias=True, device="meta", **options)
    assert all(p.is_meta for p in empty.parameters())
    assert empty(*(t.to("meta") for t in inputs)).shape == expected.shape
    empty.load_state_dict(torch.load(file), assign=True, strict=True)
    assert same_bits(empty(*inputs), expected)
    assert (empty.num_experts, empty.d_model, empty.d_hidden) == (4, 6, 10)
    filled = gf.Experts(6, 10, 4, device="meta").to_empty(device="cpu")
    filled.reset_parameters()
    assert filled(*inputs).isfinite().all()


# Under PyTorch's transformations.


def test_compiles_once_for_all_routings() -> None:
    layer = gf.Experts(6, 10, 4, bias=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        inputs = routed(layer, seed)
        if seed == 3:
            inputs[1].fill_(2)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            found = trained(layer, compiled, *inputs)
        for one, other in zip(found, trained(layer, layer, *inputs), strict=True):
            assert same_bits(one, other)


def test_exports_pytorch_own_operators_alone() -> None:
    layer = gf.Experts(6, 10, 4, bias=True)
    inputs = routed(layer)
    exported = torch.export.export(layer, inputs)
    assert "gatedffn" not in str(exported.graph_module.code)
    for seed in range(2):
        inputs = routed(layer, seed)
        torch.testing.assert_close(exported.module()(*inputs), layer(*inputs))
    with pytest.raises(RuntimeError, match="index holds an expert below 0"):
        exported.module()(inputs[0], inputs[1] - 1, inputs[2])


@kinds
@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_gradients_of_first_and_second_order(name: str, save: str) -> None:
    mixture = small(name, weigh="input" if save == "input" else "output", learned="unit")
    names = list(mixture.tensors())

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return ours(mixture.mapped(lambda name, _: given[name]), save=save)

    tensors = list(mixture.tensors().values())
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@torch_uses_jit
@kinds
def test_func(name: str) -> None:
    mixture = small(name)
    found, names = with_gradients(mixture, ours(mixture)), list(mixture.tensors())
    tensors = tuple(mixture.tensors().values())

    def call(*given: Tensor) -> Tensor:
        of = dict(zip(names, given, strict=True))
        return ours(mixture.mapped(lambda name, _: of[name]))

    def loss(*given: Tensor) -> Tensor:
        return (call(*given) * mixture.grad).sum()

    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    gradients = torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)
    for gradient, name_of in zip(gradients, names, strict=True):
        torch.testing.assert_close(gradient, found[name_of], **close)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    products = [(found[n] * t).sum() for n, t in zip(names, tangents, strict=True)]
    tangent = torch.func.jvp(loss, tensors, tangents)[1]
    torch.testing.assert_close(tangent, torch.stack(products).sum(), **close)

    def one(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return ours(replace(mixture, x=x, index=index, weights=weights))

    batch = torch.func.vmap(one)(mixture.x, mixture.index, mixture.weights)
    torch.testing.assert_close(batch, found["output"], **close)
    each = torch.stack([mixture.grad, 2.0 * mixture.grad])
    (of_both,) = torch.autograd.grad(ours(mixture), [mixture.x], each, is_grads_batched=True)
    torch.testing.assert_close(of_both[1], 2.0 * found["x"], **close)


def test_autocast_leaves_index_and_weights() -> None:
    layer = gf.Experts(16, 24, 4)
    x, index, weights = routed(layer, tokens=9)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(layer, layer, x, index, weights)
    # In float32 these weights differ; as bfloat16 they would be equal, and the sum another.
    half = copy.deepcopy(layer).bfloat16()
    expected = trained(half, half, x.bfloat16(), index, weights)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one.to(other.dtype), other)
    assert [t.dtype for t in found[1:]] == [torch.float32] * 4
    rounded = half(x.bfloat16(), index, weights.bfloat16())
    assert not same_bits(rounded, expected[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    layer = gf.Experts(6, 10, 4)
    inputs = routed(layer)

    def again(*given: Tensor) -> Tensor:
        made: Tensor = checkpoint(layer, *given, use_reentrant=False)
        return made

    def gradients(forward: Callable[..., Tensor]) -> list[Tensor | None]:
        layer.zero_grad()
        x = inputs[0].clone().requires_grad_()
        torch.autograd.backward(forward(x, *inputs[1:]).square().sum())
        return [x.grad, *(p.grad for p in layer.parameters())]

    if reentrant:
        found = gradients(lambda *given: checkpoint(layer, *given, use_reentrant=True))
        expected = gradients(layer)
    else:
        found, expected = trained(layer, again, *inputs), trained(layer, layer, *inputs)  # type: ignore[assignment]
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert same_bits(one, other)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "xielu"])
def test_opcheck(name: str) -> None:
    save = "input" if name == "geglu" else "gate_up"
    learned: Any = "unit" if name == "xielu" else ""
    mixture = small(name, learned=learned, by_columns=name == "geglu").to(torch.float32)
    if save == "gate_up":  # what is kept of a slot that is elsewhere is not written
        mixture.index[2, 1] = 0
    case, stack = mixture.case, mixture.stack
    parameters = learned_and_fixed(mixture.parameters, mixture.x)
    operands = (mixture.x, mixture.index, mixture.weights, *stack.values())
    given = (*operands, *parameters, name, case.order or "", case.weigh, save, "linear")
    tests: Any = ("test_schema", "test_autograd_registration", "test_faketensor")
    if name == "swiglu":
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators.experts.default, given, test_utils=tests)
    torch.library.opcheck(operators.experts_saving.default, given, test_utils=tests)
    _, *saved = operators.experts_saving(*given)
    assert len(saved) == (0 if save == "input" else 1 + case.row.gated)
    backward = (mixture.grad, saved, list(mixture.tensors()), *given)
    torch.library.opcheck(operators.experts_backward.default, backward, test_utils=tests)


def test_what_is_saved() -> None:
    """Gate and up of each slot, or nothing beyond the operands."""
    mixture = draw(Case(order="gate_up", dtype=torch.float32))
    own = {t.untyped_storage().data_ptr() for t in (*mixture.tensors().values(), mixture.index)}
    for save, count in (("gate_up", 2), ("input", 0)):
        kept: list[Tensor] = []

        def pack(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = ours(mixture, save=save)
        assert output.requires_grad
        assert [tuple(t.shape) for t in kept] == [(mixture.index.numel(), 10)] * count
