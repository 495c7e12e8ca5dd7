"""The whole layer on a GPU's engine: every way forward and backward, through the public functions.

In the interpreter, tensors of the CPU stand for those of a GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from gatedffn.ops.feed_forward.call import Call
from support.cases import rows
from support.layers import (
    Case,
    Layer,
    by_hand,
    draw,
    judge,
    ours,
    with_gradients,
    yardstick,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gatedffn import FeedForward, explain
from gatedffn.errors import BackendError
from gatedffn.ops import choice, gpu
from gatedffn.ops.feed_forward import backward, call
from gatedffn.ops.feed_forward.gpu import few, fused, fused_backward, tiles, ways
from gatedffn.variants import VARIANTS, Variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
SWIGLU = VARIANTS["swiglu"]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The GPU's engine takes every tensor; the rule decides where a test does not measure."""
    if device.type == "cpu":
        monkeypatch.setattr(gpu, "takes", lambda _: True)
    monkeypatch.setattr(choice, "_switched_off", lambda: True)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of the layer that ran, and the ways that were taken."""
    names: list[str] = []

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spying(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return function(*args, **kwargs)

        return spying

    for module, name in (
        (few, "feed_forward"),
        (fused, "hidden_values"),
        (fused_backward, "gate_backward"),
    ):
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    monkeypatch.setitem(ways._WAYS, "torch", spy("torch", ways._WAYS["torch"]))
    return names


def on(device: torch.device, layer: Layer) -> Layer:
    moved = layer.mapped(lambda _, t: t.detach().to(device).requires_grad_())
    return replace(moved, grad=layer.grad.to(device))


def judged(case: Case, device: torch.device, **options: Any) -> None:
    """Judges the output and every gradient of some draws of a case."""
    layers = [draw(case, seed) for seed in range(4)]
    found = []
    for layer in layers:
        there = on(device, layer)
        results = with_gradients(there, ours(there, **options))
        found.append({name: value.cpu() for name, value in results.items()})
    judge(found, layers)


@rows
@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_every_variant(row: Variant, backend: str, device: torch.device, taken: list[str]) -> None:
    judged(Case(row=row, batch=(9,)), device, backend=backend)
    expected = {"fused": {"hidden_values", "gate_backward"}, "torch": {"torch"}}
    assert set(taken) == expected[backend]


@dtypes
@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("tile", [None, 16], ids=["whole", "tiles"])
def test_dtypes_and_memory_modes(
    dtype: torch.dtype, backend: str, save: str, tile: int | None, device: torch.device
) -> None:
    judged(Case(row=SWIGLU, dtype=dtype), device, backend=backend, save=save, tile=tile)


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("name", ["swiglu", "prelu", "gelu", "xielu"])
@pytest.mark.parametrize("learned", ["", "layer", "unit"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_learned_parameters_and_biases(
    backend: str, name: str, learned: Any, bias: bool, device: torch.device
) -> None:
    row = VARIANTS[name]
    if learned and not any(parameter.learnable for parameter in row.parameters):
        learned = ""
    judged(Case(row=row, batch=(2, 5), bias=bias, learned=learned), device, backend=backend)


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_hidden_units_in_parts(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    monkeypatch.setitem(backward.AT_ONCE, "gpu", 1)
    case = Case(row=SWIGLU, sizes=(24, 136, 16), learned="unit")
    judged(case, device, backend=backend)
    # The units of four parts are multiples of 32.
    assert taken.count("gate_backward") == (3 * 4 if backend == "fused" else 0)


def test_all_tiles_of_backward_share_their_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def places(*sizes: Any) -> Tensor:
        asked.append(sizes[:3])
        return call.GPU.places(*sizes)

    monkeypatch.setattr(call, "device_of", lambda _, gpu=call.GPU: gpu._replace(places=places))
    monkeypatch.setitem(backward.AT_ONCE, "gpu", 1)
    layer = on(device, draw(Case(row=SWIGLU, sizes=(24, 136, 16))))
    with_gradients(layer, ours(layer, backend="fused", save="input", tile=16))
    assert asked == [(5, 16, 64)]


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_tiles_of_inference(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    monkeypatch.setattr(ways, "TILE", 40 * 4 * 16)
    layer = on(device, draw(Case(row=SWIGLU)))
    with torch.no_grad():
        y = ours(layer, backend=backend)
        monkeypatch.setattr(ways, "TILE", 1 << 30)
        whole = ours(layer, backend=backend)
    torch.testing.assert_close(y, whole)
    assert taken == (["hidden_values"] * 4 if backend == "fused" else ["torch"] * 2)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@dtypes
def test_few_tokens(
    name: str, tokens: int, dtype: torch.dtype, device: torch.device, taken: list[str]
) -> None:
    layers = [draw(Case(row=VARIANTS[name], batch=(tokens,), dtype=dtype), s) for s in range(8)]
    found = []
    with torch.no_grad():
        for layer in layers:
            found.append({"output": ours(on(device, layer), backend="few").cpu()})
    truth, eager = yardstick(layers)
    judge(found, layers, ({"output": truth["output"]}, {"output": eager["output"]}))
    assert set(taken) == {"feed_forward"}


@pytest.mark.parametrize("backend", ["few", "fused", "torch"])
def test_without_the_product_down(backend: str, device: torch.device, taken: list[str]) -> None:
    case = Case(row=SWIGLU, batch=(3,), down=False)
    if backend == "few":
        layer = draw(case)
        with torch.no_grad():
            y = ours(on(device, layer), backend=backend)
        torch.testing.assert_close(y.cpu(), by_hand(layer))
    else:
        judged(case, device, backend=backend)
    assert taken


@pytest.mark.parametrize("frozen", ["x", "gate", "up", "down", "down_bias"])
@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_what_takes_no_gradient(backend: str, frozen: str, device: torch.device) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    expected = with_gradients(layer, ours(layer, backend=backend))
    tensors = layer.tensors()
    tensors.pop(frozen).requires_grad_(False)
    y = ours(layer, backend=backend)
    found = torch.autograd.grad(y, list(tensors.values()), layer.grad)
    for name, gradient in zip(tensors, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_only_the_weight_down(device: torch.device, taken: list[str]) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    expected = with_gradients(layer, ours(layer, backend="fused"))["down"]
    down = layer.weights.down
    assert down is not None
    taken.clear()
    (found,) = torch.autograd.grad(ours(layer, backend="fused"), [down], layer.grad)
    torch.testing.assert_close(found, expected)


def same_gradients(layer: FeedForward, other: Callable[[Tensor], Tensor], device: Any) -> None:
    """Holds another way to call a layer to the layer itself, bit by bit."""
    x = torch.randn(5, layer.d_model, device=device, requires_grad=True)
    grad = torch.randn(5, layer.d_out, device=device)
    asked = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x), asked, grad)
    found = torch.autograd.grad(other(x), asked, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_under_a_compiler(save: Any, device: torch.device, taken: list[str]) -> None:
    # Large enough to be left to the operator.
    layer = FeedForward(256, 257, backend="fused", save=save).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same_gradients(layer, compiled, device)
    assert taken.count("gate_backward") == 2


@pytest.mark.parametrize("early_stop", [True, False])
def test_under_activation_checkpointing(
    early_stop: bool, device: torch.device, taken: list[str]
) -> None:
    layer = FeedForward(24, 40, backend="fused").to(device)

    def checkpointed(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(early_stop):
            return cast(Tensor, checkpoint(layer, x, use_reentrant=False))

    same_gradients(layer, checkpointed, device)
    assert taken.count("hidden_values") == 3  # forward twice where it is recomputed


def test_under_autocast(device: torch.device, taken: list[str]) -> None:
    layer = FeedForward(24, 40, backend="fused").to(device)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert taken == ["hidden_values", "gate_backward"]


def test_columns_that_are_apart_are_not_described(device: torch.device) -> None:
    matrix = torch.zeros(4, 64, device=device)
    assert tiles.describable(matrix[:, :8])
    assert not tiles.describable(torch.as_strided(matrix, (4, 1), (8, 8)))


def test_what_is_saved(device: torch.device) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    own = {t.untyped_storage().data_ptr() for t in layer.tensors().values()}
    for save, expected in (("gate_up", 2), ("input", 0)):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = ours(layer, backend="fused", save=save)
        beyond = [t for t in kept if t.untyped_storage().data_ptr() not in own]
        assert [tuple(t.shape) for t in beyond] == [(37, 40)] * expected
        assert y.requires_grad


def test_float64_goes_by_the_definition_of_gating(device: torch.device, taken: list[str]) -> None:
    layer = draw(Case(row=SWIGLU, dtype=torch.float64))
    there = on(device, layer)
    found = with_gradients(there, ours(there, save="input"))
    expected = with_gradients(layer, by_hand(layer))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-12, atol=1e-12)
    assert set(taken) == {"torch"}


@dtypes
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_training_a_small_layer(
    name: str, dtype: torch.dtype, device: torch.device, taken: list[str]
) -> None:
    judged(Case(row=VARIANTS[name], dtype=dtype), device)
    assert not taken  # PyTorch's linear layers have the products, and the rest is one function


@pytest.mark.parametrize(
    ("backend", "case", "options", "reason"),
    [
        ("few", Case(row=SWIGLU, batch=(17,)), {"save": "input"}, "takes 1 to 16 tokens"),
        ("few", Case(row=SWIGLU, batch=(2,)), {}, "does not save gate and up"),
        ("fused", Case(row=SWIGLU, batch=(0,)), {}, "there are no tokens"),
        ("fused", Case(row=SWIGLU, dtype=torch.float64), {}, "no kernel for torch.float64"),
        ("tiles", Case(row=SWIGLU), {}, "it does not run on"),
        ("onednn", Case(row=SWIGLU), {}, "it does not run on"),
        ("blocks", Case(row=SWIGLU), {}, "it does not run on"),
        (
            "fused",
            Case(row=SWIGLU),
            {"beta": torch.ones(37, 1)},
            "neither one number nor one for each hidden unit",
        ),
    ],
)
def test_a_backend_that_cannot_says_why(
    backend: str, case: Case, options: Any, reason: str, device: torch.device
) -> None:
    layer = on(device, draw(case))
    options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    with pytest.raises(
        BackendError, match=f"backend '{backend}' cannot compute this call.*{reason}"
    ):
        ours(layer, backend=backend, **options)


def test_the_rule(device: torch.device, taken: list[str]) -> None:
    few_tokens, many = (on(device, draw(Case(row=SWIGLU, batch=(n,)))) for n in (3, 40))
    with torch.no_grad():
        ours(few_tokens)
        ours(many)
    ours(many, save="input")
    assert taken == ["feed_forward", "torch", "torch"]


def test_what_is_measured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_switched_off", lambda: False)
    monkeypatch.setattr(choice, "_file", lambda: None)
    monkeypatch.setattr(choice, "_made", {})
    monkeypatch.setattr(choice, "ROUNDS", 1)
    layer = FeedForward(24, 40, device=device)
    stages = explain(layer, tokens=3)[0].decisions
    assert set(stages["inference"].milliseconds) == {"few", "torch", "fused"}
    assert set(stages["training, forward"].milliseconds) == {"torch", "fused"}
    assert "triton 3" in str(next(iter(choice._made)))


def test_a_choice_is_for_exact_products_or_for_tf32(device: torch.device) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    given = Call(layer.x, layer.weights, "swiglu", {"beta": 1.0})
    exact = call.key_of(given, False, "forward")
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        rough = call.key_of(given, False, "forward")
    finally:
        settings.fp32_precision = before
    assert str(rough) == str(exact).replace(" kernels", ", TF32 kernels")


def test_nothing_is_measured_while_a_graph_is_captured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_switched_off", lambda: False)
    monkeypatch.setattr(choice, "_file", lambda: None)
    monkeypatch.setattr(choice, "_made", {})
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    layer = on(device, draw(Case(row=SWIGLU)))
    with_gradients(layer, ours(layer, save="input"))
    assert not choice._made


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to capture a graph on")
def test_a_cuda_graph(device: torch.device) -> None:
    layer, x = FeedForward(64, 128, device=device), torch.randn(8, 64, device=device)
    with torch.no_grad():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2^31 elements are for a GPU's memory")
@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_beyond_two_to_the_thirty_first_elements(backend: str, device: torch.device) -> None:
    tokens, d_model, d_hidden = (1 << 31) // 4096 + 64, 64, 4096
    layer = FeedForward(d_model, d_hidden, device=device, dtype=torch.bfloat16, backend=backend)
    x = torch.randn(tokens, d_model, device=device, dtype=torch.bfloat16)
    y = layer(x)
    torch.testing.assert_close(y[-64:], layer(x[-64:]), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_launches_are_on_the_device_of_the_tensors() -> None:
    layer = FeedForward(64, 128, device="cuda:1")
    x = torch.randn(8, 64, device="cuda:1")
    with torch.cuda.device(0), torch.no_grad():
        torch.testing.assert_close(layer(x).cpu(), layer.cpu()(x.cpu()))
