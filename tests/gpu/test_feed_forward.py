"""The whole layer on a GPU's engine: every way forward and backward, through the public functions.

In the interpreter, tensors of the CPU stand for those of a GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import pytest
import torch
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
from gatedffn.ops import gpu, measure
from gatedffn.ops.feed_forward import backward, forward
from gatedffn.ops.feed_forward.gpu import few, fused, fused_backward, tiles
from gatedffn.ops.feed_forward.ways import WAYS
from gatedffn.ops.gating import gpu as gating
from gatedffn.ops.operator import forget_plans
from gatedffn.variants import VARIANTS, Variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
SWIGLU = VARIANTS["swiglu"]
# Every way that the table has for a GPU, and the kernels that a step of training takes by it.
KERNELS: dict[str, set[str]] = {
    way.name: {"run", "run_backward"}
    for way in WAYS.ways
    if not way.hardware or "gpu" in way.hardware
}
KERNELS |= {
    "few": {"feed_forward", "run_backward"},  # which are for the forward alone
    "fused": {"hidden_values", "branch_gradients"},
    "definition": set(),
}
backends = pytest.mark.parametrize("backend", KERNELS)
pytestmark = pytest.mark.usefixtures("on_gpu")


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule decides where a test does not measure."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, measure.Choice]:
    """What is measured, by its key: quickly, and kept nowhere else."""
    made: dict[str, measure.Choice] = {}
    monkeypatch.setattr(measure, "tuning", lambda: True)
    monkeypatch.setattr(measure, "_file", lambda: None)
    monkeypatch.setattr(measure, "_made", made)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    return made


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran."""
    names: list[str] = []

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spying(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return function(*args, **kwargs)

        return spying

    for module, name in (
        (few, "feed_forward"),
        (fused, "hidden_values"),
        (fused_backward, "branch_gradients"),
        (gating, "run"),
        (gating, "run_backward"),
    ):
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    return names


def on(device: torch.device, layer: Layer) -> Layer:
    moved = layer.mapped(lambda _, t: t.detach().to(device).requires_grad_())
    return replace(moved, grad=layer.grad.to(device))


Lay = Callable[[str, Tensor], Tensor]


def judged(
    case: Case,
    device: torch.device,
    backend: str = "auto",
    lay: Lay = lambda _, t: t,
    **options: Any,
) -> None:
    """Judges the output and every gradient of some draws of a case, its operands laid anew."""
    if backend == "few":
        tokens = min(torch.Size(case.batch).numel(), few.MOST_TOKENS)
        case, options = replace(case, batch=(tokens,)), options | {"save": "input"}
    layers = [draw(case, seed) for seed in range(4)]
    found = []
    for layer in layers:
        laid = layer.mapped(lambda name, t: lay(name, t.detach().to(device)).requires_grad_())
        there = replace(laid, grad=lay("grad", layer.grad.to(device)))
        results = with_gradients(there, ours(there, backend=backend, **options))
        found.append({name: value.cpu() for name, value in results.items()})
    judge(found, layers)


# Ways that share their kernels, or have none, take the rows in turns.
SHARING = [name for name in KERNELS if name != "fused"]
EVERY = [
    (row, name)
    for index, row in enumerate(VARIANTS.values())
    for name in ("fused", SHARING[index % len(SHARING)])
]


@pytest.mark.parametrize(("row", "backend"), EVERY, ids=[f"{r.name}-{name}" for r, name in EVERY])
def test_every_variant(row: Variant, backend: str, device: torch.device, taken: list[str]) -> None:
    judged(Case(row=row, batch=(9,)), device, backend)
    assert set(taken) == KERNELS[backend]


MODES = [
    (backend, save, tile)
    for backend in KERNELS
    for save in ("gate_up", "input")
    for tile in (None, 16)
    # few keeps nothing, and linear is for all tokens at once.
    if (backend, save) != ("few", "gate_up") and (backend, tile) != ("linear", 16)
]


@pytest.mark.parametrize(
    ("backend", "save", "tile", "dtype"),
    [
        (*mode, dtype)
        for index, mode in enumerate(MODES)
        for turn, dtype in enumerate(DTYPES)
        # Every mode meets a dtype, and the kernel of the fused way all of them.
        if mode[0] == "fused" or turn == index % 3
    ],
)
def test_dtypes_and_memory_modes(
    backend: str, save: str, tile: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    judged(Case(row=SWIGLU, dtype=dtype), device, backend, save=save, tile=tile)


@backends
@pytest.mark.parametrize(
    ("name", "learned", "bias"),
    [
        *(("gelu", "", True), ("gelu", "", False), ("swiglu", "", False)),
        *(("swiglu", "layer", True), ("swiglu", "unit", False)),
        *(("prelu", "layer", False), ("prelu", "unit", True)),
        *(("xielu", "layer", True), ("xielu", "unit", False)),
    ],
)
def test_learned_parameters_and_biases(
    backend: str, name: str, learned: Any, bias: bool, device: torch.device
) -> None:
    judged(Case(row=VARIANTS[name], batch=(2, 5), bias=bias, learned=learned), device, backend)


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def apart(x: Tensor) -> Tensor:
    """The same numbers, each beside one that is none."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


LAYOUTS: dict[str, Lay] = {
    "tokens turned": lambda name, t: turned(t) if name in ("x", "grad") else t,
    "rows further apart": lambda _, t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "biases apart": lambda name, t: apart(t) if name.endswith("bias") else t,
    "negated": lambda _, t: torch._neg_view(-t),
    "weights turned": lambda name, t: turned(t) if name in ("gate", "up", "down") else t,
}


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        (name, layout)
        for name in KERNELS
        for layout in LAYOUTS
        # Those that read the weights as they lie say so: below.
        if not (name in ("few", "fused") and layout == "weights turned")
    ],
)
def test_any_strides(backend: str, layout: str, device: torch.device) -> None:
    judged(Case(row=SWIGLU, batch=(9,)), device, backend, LAYOUTS[layout])


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_hidden_units_in_parts(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    monkeypatch.setitem(backward.AT_ONCE, "gpu", 1)
    case = Case(row=SWIGLU, sizes=(24, 136, 16), learned="unit")
    judged(case, device, backend=backend)
    # The units of four parts are multiples of 32.
    assert taken.count("branch_gradients") == (3 * 4 if backend == "fused" else 0)


def test_all_tiles_of_backward_share_their_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def places(*sizes: Any, right: Any = gating.places) -> Tensor:
        asked.append(sizes[:3])
        return cast(Tensor, right(*sizes))

    monkeypatch.setattr(gating, "places", places)
    monkeypatch.setitem(backward.AT_ONCE, "gpu", 1)
    layer = on(device, draw(Case(row=SWIGLU, sizes=(24, 136, 16))))
    with_gradients(layer, ours(layer, backend="fused", save="input", tile=16))
    assert asked == [(5, 16, 64)]


@pytest.mark.parametrize(("backend", "kernel"), [("fused", "hidden_values"), ("torch", "run")])
def test_tiles_of_inference(
    backend: str,
    kernel: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[str],
) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    made = []
    for tokens, count in ((16, 3), (40, 1)):
        branches = 1 if backend == "fused" else 2  # that are held at a time
        monkeypatch.setitem(forward.WORKED_ON, "gpu", 40 * 4 * tokens * branches)
        forget_plans()
        with torch.no_grad():
            made.append(ours(layer, backend=backend))
        assert taken == [kernel] * count
        taken.clear()
    torch.testing.assert_close(*made)


@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        *(("swiglu", 1, torch.float32), ("gelu", 5, torch.bfloat16)),
        *(("swiglu", 16, torch.float16), ("gelu", 1, torch.bfloat16)),
    ],
)
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


@backends
def test_without_the_product_down(backend: str, device: torch.device) -> None:
    judged(Case(row=SWIGLU, batch=(3,), down=False), device, backend)


@pytest.mark.parametrize("frozen", ["x", "gate", "up", "down", "down_bias", "all but down"])
@backends
def test_what_takes_no_gradient(backend: str, frozen: str, device: torch.device) -> None:
    layer = on(device, draw(Case(row=SWIGLU, batch=(16,))))
    options = {"backend": backend, "save": "input" if backend == "few" else "gate_up"}
    expected = with_gradients(layer, ours(layer, **options))
    asked = layer.tensors()
    for name in set(asked) - {"down"} if frozen == "all but down" else {frozen}:
        asked.pop(name).requires_grad_(False)
    found = torch.autograd.grad(ours(layer, **options), list(asked.values()), layer.grad)
    for name, gradient in zip(asked, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


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
    assert taken.count("branch_gradients") == 2


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
    assert taken == ["hidden_values", "branch_gradients"]


def test_columns_that_are_apart_have_no_descriptor(device: torch.device) -> None:
    matrix = torch.zeros(4, 64, device=device)
    assert tiles.have_descriptors(matrix[:, :8])
    assert not tiles.have_descriptors(torch.as_strided(matrix, (4, 1), (8, 8)))


@pytest.mark.parametrize("backend", ["linear", "torch", "fused"])
def test_what_is_saved(backend: str, device: torch.device) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    own = {t.untyped_storage().data_ptr() for t in layer.tensors().values()}
    for save, expected in (("gate_up", 2), ("input", 0)):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = ours(layer, backend=backend, save=save)
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
    assert not taken


@dtypes
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_training_a_small_layer(
    name: str, dtype: torch.dtype, device: torch.device, taken: list[str]
) -> None:
    judged(Case(row=VARIANTS[name], dtype=dtype), device)
    assert set(taken) == KERNELS["linear"]


@pytest.mark.parametrize(
    ("backend", "case", "options", "reason"),
    [
        ("few", Case(row=SWIGLU, batch=(17,)), {"save": "input"}, "takes up to 16 tokens, .* 17"),
        ("few", Case(row=SWIGLU, batch=(2,)), {}, "does not keep gate and up"),
        *(
            (backend, case, {"save": "input"}, reason)
            for backend in ("few", "fused")
            for case, reason in (
                (Case(row=SWIGLU, batch=(0,)), "there are no tokens"),
                (Case(row=SWIGLU, batch=(2,), dtype=torch.float64), "no kernel for torch.float64"),
                (Case(row=SWIGLU, batch=(2,), sizes=(24, 40, 0)), "a width is 0"),
            )
        ),
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


@pytest.mark.parametrize("backend", ["few", "fused"])
def test_what_whole_layers_need(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = on(device, draw(Case(row=SWIGLU, batch=(2,))))
    for weight in ("gate", "up", "down"):
        lying = layer.mapped(lambda name, t, weight=weight: turned(t) if name == weight else t)  # type: ignore[misc]
        with pytest.raises(BackendError, match="a weight is not stored row by row"):
            ours(lying, backend=backend, save="input")
    monkeypatch.setattr(gpu, "NO_TRITON", "there is none")
    forget_plans()
    with pytest.raises(BackendError, match="cannot compute this call: there is none"):
        ours(layer, backend=backend, save="input")
    torch.testing.assert_close(ours(layer, save="input"), by_hand(layer))


def test_more_tokens_than_a_kernel_counts(device: torch.device) -> None:
    x = torch.ones(1, 1, device=device).expand(1 << 31, 1)
    layer = FeedForward(1, 1, backend="fused", device=device)
    with torch.no_grad(), pytest.raises(BackendError, match=r"counts up to 21\d+, a size is 21\d+"):
        layer(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (turned, "a weight is not stored row by row"),
        (Tensor.double, "of another dtype"),
        (lambda t: t[:, :0], "a width is 0"),
    ],
    ids=["turned", "of another dtype", "empty"],
)
def test_a_backward_that_is_asked_for_and_cannot_says_why(
    change: Callable[[Tensor], Tensor], reason: str, device: torch.device
) -> None:
    grad, x, down = (torch.ones(*shape, device=device) for shape in ((3, 8), (3, 4), (8, 16)))
    gate, down = torch.ones(16, 4, device=device), change(down)
    gate = gate[: down.shape[1]]
    with pytest.raises(BackendError, match=f"'fused' cannot compute this call: .*{reason}"):
        torch.ops.gatedffn.feed_forward_backward(
            grad, [], ["gate"], x, gate, None, down, None, None, None, [], [], "relu",
            "input", None, "fused",
        )  # fmt: skip


def test_the_rule(device: torch.device, taken: list[str]) -> None:
    few_tokens, many = (on(device, draw(Case(row=SWIGLU, batch=(n,)))) for n in (3, 40))
    with torch.no_grad():
        ours(few_tokens)
        ours(many)
    ours(few_tokens, save="input")
    ours(few_tokens)
    # The first call tries its way before it takes it.
    once = [name for name, _ in groupby(taken)]
    assert once == ["feed_forward", "run", "feed_forward", "run"]


def test_what_is_measured(device: torch.device, chosen: dict[str, measure.Choice]) -> None:
    layer = FeedForward(24, 40, device=device)
    plans = explain(layer, tokens=3)[0].plans
    assert set(plans["inference"].milliseconds) == {"few", "linear", "fused"}
    assert "takes longer" in plans["inference"].against["torch"]
    for stage in ("training, forward", "training, backward"):
        assert set(plans[stage].milliseconds) == {"linear", "fused"}
    assert len(chosen) == 3
    assert all("triton 3" in key for key in chosen)


def test_a_choice_is_for_exact_products_or_for_tf32(
    device: torch.device, chosen: dict[str, measure.Choice]
) -> None:
    layer = on(device, draw(Case(row=SWIGLU)))
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            settings.fp32_precision = precision
            forget_plans()
            with torch.no_grad():
                ours(layer)
    finally:
        settings.fp32_precision = before
    exact, rough = chosen
    assert rough == exact.replace(" kernels", ", TF32 kernels")


def test_nothing_is_measured_while_a_graph_is_captured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, measure.Choice]
) -> None:
    layer = FeedForward(24, 40, device=device)
    with monkeypatch.context() as capture:
        capture.setattr(gpu, "capturing", lambda: True)
        plans = explain(layer, tokens=3)[0].plans
        assert {plan.reason for plan in plans.values()} == {
            "nothing can be measured while a graph is captured"
        }
    assert not chosen
    assert explain(layer, tokens=3)[0].plans["inference"].reason == "measured"


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
