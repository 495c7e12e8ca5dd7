"""The layer as an operator: the right numbers by every way, and the way that was asked for."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.cases import dtypes, rows
from support.compare import assert_matches, same_bits, unchanged
from support.layers import (
    BACKENDS,
    LIBRARIES,
    OWN,
    Case,
    Layer,
    Learned,
    Results,
    by_hand,
    check,
    draw,
    fit,
    judge,
    needs,
    ours,
    several,
    with_gradients,
)
from support.levels import amid_nans, replace_scratch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gatedffn import FeedForward, explain, functional, native
from gatedffn.errors import BackendError, GatedFFNError
from gatedffn.ops import kernels, measure
from gatedffn.ops.feed_forward import BACKENDS as PUBLIC
from gatedffn.ops.feed_forward import Weights, backward, forward, products
from gatedffn.ops.feed_forward import feed_forward as operator
from gatedffn.ops.feed_forward.ways import MOST_FEW, WAYS
from gatedffn.ops.operator import forget_plans
from gatedffn.ops.plan import Run, Way, Ways
from gatedffn.ops.spec import Spec
from gatedffn.variants import VARIANTS, Variant

backends = pytest.mark.parametrize("backend", BACKENDS)
TAKE_TILES = [backend for backend in BACKENDS if backend != "linear"]
all_but_the_definition = pytest.mark.parametrize("backend", [*OWN, *LIBRARIES])
saves = pytest.mark.parametrize("save", ["gate_up", "input"])
# Each kind of row: no gate, a gate, a learned parameter, two branches that saturate.
KINDS: tuple[tuple[str, Learned], ...] = (("gelu", ""), ("swiglu_oai", ""), ("xielu", "unit"))
kinds = pytest.mark.parametrize(("name", "learned"), KINDS, ids=[name for name, _ in KINDS])
learnable_rows = pytest.mark.parametrize(
    "row",
    [row for row in VARIANTS.values() if any(p.learnable for p in row.parameters)],
    ids=[row.name for row in VARIANTS.values() if any(p.learnable for p in row.parameters)],
)


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scratch memory starts as NaN in every dtype; the bytes of it that were asked for."""
    sizes: list[int] = []
    real = kernels.scratch

    def stale(size: int, *purpose: str) -> Tensor:
        sizes.append(size)
        return real(size, *purpose).fill_(0xFF)

    replace_scratch(monkeypatch, stale)
    return sizes


def check_by(backend: str, case: Case, *, dtype: bool = False, **more: Any) -> None:
    fitting, options = fit(backend, case, dtype=dtype)
    check(fitting, **(more | options))


SIXTEEN_TOKENS = 16 * 2 * 40 * 4  # the bytes of their gate and up, where d_hidden is 40


# numbers


@rows
@dtypes
@backends
def test_output_and_every_gradient(row: Variant, dtype: torch.dtype, backend: str) -> None:
    check_by(backend, Case(row=row, dtype=dtype), dtype=True)


@learnable_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@all_but_the_definition
@pytest.mark.parametrize("learned", ["layer", "unit"])
def test_gradients_of_learned_parameters(
    row: Variant, dtype: torch.dtype, backend: str, learned: Learned
) -> None:
    check_by(backend, Case(row=row, dtype=dtype, learned=learned, bias=False), dtype=True)


@pytest.mark.parametrize("name", ["bilinear", "geglu", "swiglu", "swiglu_oai"])
@dtypes
@backends
def test_gated_linear(name: str, dtype: torch.dtype, backend: str) -> None:
    check_by(backend, Case(row=VARIANTS[name], dtype=dtype, down=False), dtype=True)


SHAPES: tuple[tuple[tuple[int, ...], tuple[int, int, int]], ...] = (
    ((1,), (1, 1, 1)),
    ((), (16, 40, 12)),
    ((4,), (7, 31, 5)),
    ((3,), (24, 3, 33)),
    ((2, 1, 2), (1, 70, 7)),
    ((33,), (33, 67, 130)),
    ((2, 3, 11), (16, 40, 12)),
    ((65,), (64, 128, 64)),
    ((130,), (16, 24, 8)),
)


@kinds
@backends
@pytest.mark.parametrize(("batch", "sizes"), SHAPES, ids=str)
def test_shapes(
    name: str,
    learned: Learned,
    backend: str,
    batch: tuple[int, ...],
    sizes: tuple[int, int, int],
) -> None:
    check_by(backend, Case(row=VARIANTS[name], batch=batch, sizes=sizes, learned=learned))


@kinds
@backends
@pytest.mark.parametrize("batch", [(0,), (2, 0, 3)], ids=str)
def test_no_tokens(name: str, learned: Learned, backend: str, batch: tuple[int, ...]) -> None:
    case = Case(row=VARIANTS[name], batch=batch, learned=learned)
    for backend_or_auto in {backend, "auto"} - set(OWN):
        needs(backend_or_auto)
        layer = draw(case)
        found = with_gradients(layer, ours(layer, backend=backend_or_auto))
        judge([found], [layer])
        assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("sizes", [(0, 40, 12), (16, 0, 12), (16, 40, 0)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_sizes_of_zero(name: str, sizes: tuple[int, int, int]) -> None:
    # Forced ways may refuse; what a call takes by itself must be right.
    for save in ("gate_up", "input"):
        check(Case(row=VARIANTS[name], batch=(5,), sizes=sizes), save=save)


@pytest.mark.parametrize("tile", [None, 1, 5, 18, 19, 100])
@saves
@kinds
@pytest.mark.parametrize("backend", TAKE_TILES)
def test_tiles_of_backward(
    name: str, learned: Learned, backend: str, save: str, tile: int | None
) -> None:
    case = Case(row=VARIANTS[name], learned=learned)
    check_by(backend, case, save=save, tile=tile)


@saves
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_hidden_units_in_parts(
    name: str,
    learned: Learned,
    dtype: torch.dtype,
    backend: str,
    save: str,
    tile: int | None,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs(backend, dtype)
    monkeypatch.setitem(backward.AT_ONCE, "cpu", 1)
    case = Case(row=VARIANTS[name], batch=(20,), sizes=(24, 300, 16), dtype=dtype, learned=learned)
    check(case, backend=backend, save=save, tile=tile)
    needs("few")  # without kernels units are not told apart
    layer = draw(case)
    output = ours(layer, backend=backend, save=save, tile=tile)
    asked.clear()
    with_gradients(layer, output)
    # The hidden values and the gradients of both branches, and both again where they are not kept.
    matrices = 3 + (save == "input") * (1 + layer.row.gated)
    assert asked[0] == matrices * (tile or 20) * 96 * dtype.itemsize


@kinds
@saves
@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_tiles_of_forward(
    name: str,
    learned: Learned,
    backend: str,
    save: str,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(forward.WORKED_ON, "cpu", SIXTEEN_TOKENS)
    case = Case(row=VARIANTS[name], batch=(69,), learned=learned)
    check_by(backend, case, save=save)
    asked.clear()
    ours(draw(case), backend=backend, save=save)
    # Even parts of 69 tokens, whose gate and up, or hidden values alone, have no memory kept.
    assert asked == [(1 if save == "gate_up" else 2) * 14 * 40 * 4]


@pytest.mark.parametrize("shape", [(), (1,), (40,), (1, 40), (3, 1), (3, 40), (2, 1, 40)], ids=str)
@saves
@pytest.mark.parametrize("tile", [None, 2])
def test_parameters_of_any_shape_that_broadcasts(
    shape: tuple[int, ...], save: str, tile: int | None
) -> None:
    layers = []
    for layer in several(Case(row=VARIANTS["swiglu"], batch=(2, 3)))[0]:
        beta = (1.0 + 0.3 * torch.randn(shape)).requires_grad_()
        layers.append(replace(layer, parameters={"beta": beta}))
    found = [with_gradients(layer, ours(layer, save=save, tile=tile)) for layer in layers]
    judge(found, layers)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("learned", ["", "layer", "unit"])
@backends
def test_the_default_dtype_changes_nothing(
    backend: str, learned: Learned, default: torch.dtype
) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"], learned=learned))
    layer = draw(case)
    kernels._fixed.cache_clear()  # so that the row is described here
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = with_gradients(layer, ours(layer, **options))
    finally:
        torch.set_default_dtype(before)
    kernels._fixed.cache_clear()
    expected = with_gradients(layer, ours(layer, **options))
    assert all(same_bits(found[name], expected[name]) for name in expected)


@backends
def test_the_default_device_changes_nothing(backend: str) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"], learned="layer"))
    layer = draw(case)
    expected = with_gradients(layer, ours(layer, **options))
    with torch.device("meta"):
        found = with_gradients(layer, ours(layer, **options))
        with torch.no_grad():
            output = ours(layer, **options)
    assert output.device == torch.device("cpu")
    for name, value in found.items():
        assert same_bits(value, expected[name]), name


# layouts


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "half_of_packed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every_other": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded_row": lambda t: t[:1].expand_as(t),
    "expanded_number": lambda t: t.reshape(-1)[0].expand_as(t),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


@layouts
@kinds
@backends
def test_any_strides_of_the_operands(
    name: str, learned: Learned, backend: str, layout: Callable[[Tensor], Tensor]
) -> None:
    case, options = fit(backend, Case(row=VARIANTS[name], batch=(9,), learned=learned))
    operands = list(draw(case).tensors())
    for some in (operands[::2], operands[1::2]):

        def strided(of: str, tensor: Tensor, some: list[str] = some) -> Tensor:
            return layout(tensor.detach()).requires_grad_() if of in some else tensor

        layers = [layer.mapped(strided) for layer in several(case)[0][:4]]
        if backend in OWN and any(by_columns(layer) for layer in layers):
            with pytest.raises(BackendError, match="not stored row by row"):
                ours(layers[0], **options)
            continue
        judge([with_gradients(layer, ours(layer, **options)) for layer in layers], layers)


def by_columns(layer: Layer) -> bool:
    """Whether a weight lies otherwise than `nn.Linear` stores it, row by row."""
    return any(w is not None and w.dim() == 2 and w.stride(1) != 1 for w in layer.weights)


@layouts
@kinds
@pytest.mark.parametrize(
    ("backend", "tile"),
    [*((backend, None) for backend in BACKENDS), *((backend, 4) for backend in TAKE_TILES)],
)
def test_any_strides_of_the_incoming_gradient(
    name: str,
    learned: Learned,
    backend: str,
    tile: int | None,
    layout: Callable[[Tensor], Tensor],
) -> None:
    for down in (True, False) if VARIANTS[name].gated else (True,):
        case = Case(row=VARIANTS[name], batch=(9,), learned=learned, down=down)
        fitting, options = fit(backend, case)
        layers = [replace(layer, grad=layout(layer.grad)) for layer in several(fitting)[0]]
        found = [with_gradients(layer, ours(layer, tile=tile, **options)) for layer in layers]
        judge(found, layers)


@backends
def test_strides_of_a_batch(backend: str) -> None:
    case, options = fit(backend, Case(row=VARIANTS["geglu"], batch=(2, 3)))
    layers = []
    for layer in several(case)[0]:
        tensors = layer.x.detach(), layer.grad
        x, grad = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors)
        layers.append(replace(layer, x=x.requires_grad_(), grad=grad))
    judge([with_gradients(layer, ours(layer, **options)) for layer in layers], layers)


@backends
def test_tokens_that_overlap(backend: str) -> None:
    wide = Case(row=VARIANTS["swiglu"], batch=(40,), sizes=(64, 48, 24))
    case, options = fit(backend, wide)
    layers = []
    for layer in several(case)[0]:
        windows = layer.x.detach().flatten()[: 63 + case.batch[0]].unfold(0, 64, 1)
        layers.append(replace(layer, x=windows.requires_grad_()))
    judge([with_gradients(layer, ours(layer, **options)) for layer in layers], layers)


@backends
def test_a_negated_view(backend: str) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"]))
    layer = draw(case)
    x = torch._neg_view(layer.x.detach())
    assert x.is_neg()
    negated = replace(layer, x=x)
    with torch.no_grad():
        expected = ours(replace(layer, x=x.resolve_neg()), **options)
        assert same_bits(ours(negated, **options), expected)
    assert same_bits(ours(negated, **options).detach(), expected)


# what a caller may do with the result


@backends
@pytest.mark.parametrize("batch", [(4,), (2, 2)], ids=str)
def test_the_output_may_be_changed_in_place(backend: str, batch: tuple[int, ...]) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"], batch=batch))
    layer = draw(case)
    expected = with_gradients(layer, ours(layer, **options) * 2.0)
    output = ours(layer, **options)
    output *= 2.0
    found = with_gradients(layer, output)
    assert all(same_bits(found[name], expected[name]) for name in expected)


@backends
@pytest.mark.parametrize("batch", [(4,), (2, 2)], ids=str)
def test_the_output_of_a_frozen_layer_may_be_changed_in_place(
    backend: str, batch: tuple[int, ...]
) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"], batch=batch, bias=False))
    with torch.no_grad():
        output = ours(draw(case), **options)
    adapter = torch.ones_like(output, requires_grad=True)
    output += adapter
    (gradient,) = torch.autograd.grad(output.sum(), adapter)
    assert torch.equal(gradient, torch.ones_like(adapter))


# which gradients


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose each product is from now on: "torch" for PyTorch's default, or "onednn"."""
    by: list[str] = []

    def spy(library: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def product(*args: Any, **kwargs: Any) -> Tensor:
            by.append(library)
            return real(*args, **kwargs)

        return product

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, spy("torch", getattr(torch, name)))
    if products.has_onednn(torch.float32):
        real = torch.ops.mkldnn._linear_pointwise
        spied = Mock(side_effect=spy("onednn", real), binary=spy("onednn", real.binary))
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spied)
    return by


@saves
@backends
@pytest.mark.parametrize(("name", "learned"), [("swiglu", "unit"), ("prelu", "layer")])
def test_every_subset_of_requires_grad(
    name: str, learned: Learned, backend: str, save: str, multiplied: list[str]
) -> None:
    case, options = fit(backend, Case(row=VARIANTS[name], batch=(5,), learned=learned))
    layer, options = draw(case), {**options, "save": save}
    everything = with_gradients(layer, ours(layer, **options))
    names = list(layer.tensors())
    branches = 2 if layer.row.gated else 1
    for chosen in itertools.product((False, True), repeat=len(names)):
        wanted = {name for name, want in zip(names, chosen, strict=True) if want}
        leaf = layer.mapped(lambda n, t, w=wanted: t.detach().requires_grad_(n in w))  # type: ignore[misc]
        output = ours(leaf, **options)
        assert output.requires_grad == bool(wanted)
        multiplied.clear()
        if wanted:
            torch.autograd.backward(output, layer.grad)
        for name, tensor in leaf.tensors().items():
            assert (tensor.grad is not None) == (name in wanted)
            if tensor.grad is not None:
                assert same_bits(tensor.grad, everything[name]), (name, wanted)
        # A product for each weight, one for each branch that leads to x, one through down.
        expected = len(wanted & {"gate", "up", "down"}) + branches * ("x" in wanted)
        expected += bool(wanted - {"down", "down_bias"})
        expected += branches * (save == "input" and bool(wanted - {"down_bias"}))
        if backend in ("torch", "onednn"):
            assert multiplied == [backend] * expected, wanted


@kinds
@saves
@backends
def test_backward_twice_gives_equal_gradients_and_changes_no_operand(
    name: str, learned: Learned, save: str, backend: str
) -> None:
    case, options = fit(backend, Case(row=VARIANTS[name], learned=learned))
    for tile in (None, 8) if backend in TAKE_TILES else (None,):
        given: dict[str, Any] = {"save": save, "tile": tile} | options
        layer = draw(case)
        tensors = list(layer.tensors().values())
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = ours(layer, **given)
        with unchanged(*tensors, *saved, layer.grad, output):
            first = torch.autograd.grad(output, tensors, layer.grad, retain_graph=True)
            ours(draw(replace(case, batch=(3,)), seed=1), **given)  # takes the scratch memory
            second = torch.autograd.grad(output, tensors, layer.grad)
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_a_saved_weight_that_was_changed_since_is_refused() -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    output = ours(layer)
    assert layer.weights.down is not None
    with torch.no_grad():
        layer.weights.down.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(output.sum())


@backends
def test_a_bias_may_change_before_backward_as_for_linear_layers(backend: str) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"]))

    def changed() -> tuple[Layer, Tensor]:
        layer = draw(case)
        output = ours(layer, **options)
        for bias in layer.weights[3:]:
            assert bias is not None
            with torch.no_grad():
                bias.add_(1.0)
        return layer, output

    layer = draw(case)
    expected, found = with_gradients(layer, ours(layer, **options)), with_gradients(*changed())
    assert all(same_bits(found[name], expected[name]) for name in expected)
    layer, output = changed()
    if backend != "definition":  # whose second derivatives are PyTorch's own
        with pytest.raises(RuntimeError, match="gate_bias, up_bias, down_bias has been modified"):
            torch.autograd.grad(output.sum(), [layer.x], create_graph=True)


@pytest.mark.parametrize("save", ["gate_up", "input"])
def test_one_tensor_in_several_roles(save: str) -> None:
    layer = draw(Case(row=VARIANTS["swiglu"], sizes=(24, 24, 24), batch=(24,), bias=False))
    tied = layer.x.detach().requires_grad_()

    def gradient(call: Callable[[Layer], Tensor], tensor: Tensor) -> Tensor:
        tied_layer = replace(layer, x=tensor, weights=Weights(*[tensor] * 3, *[None] * 3))
        grad = layer.grad.to(tensor.dtype)
        return torch.autograd.grad(call(tied_layer), tensor, grad)[0]

    doubled = tied.detach().double().requires_grad_()
    found = gradient(lambda each: ours(each, save=save), tied)
    assert_matches(found, gradient(by_hand, doubled), gradient(by_hand, tied))


# the way that was asked for


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The ways that were taken and what for, in order."""
    ways: list[tuple[str, str]] = []

    def spying(way: Way) -> Way:
        def bind(spec: Spec) -> Run:
            run = way.bind(spec)

            def spied(*args: Any) -> Any:
                ways.append((spec.stage, way.name))
                return run(*args)

            return spied

        return way._replace(bind=bind)

    class Spied(Ways):
        def of(self, spec: Spec) -> dict[str, Way]:
            return {name: spying(way) for name, way in super().of(spec).items()}

    monkeypatch.setattr(operator, "table", Spied(*operator.table))
    return ways


@backends
@saves
def test_the_way_that_was_asked_for_is_taken(
    backend: str, save: str, taken: list[tuple[str, str]]
) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"]))
    layer = draw(case)
    with torch.no_grad():
        ours(layer, **options)
    with_gradients(layer, ours(layer, save=save, **options))
    assert taken[:2] == [("inference", backend), ("forward", backend)]
    # Some are for forward alone, and the definition's gradients are autograd's.
    if any(way.name == backend and "backward" in way.stages for way in WAYS.ways):
        assert taken[2:] == [("backward", backend)]


@pytest.mark.parametrize("backend", ["torch", "onednn", "blocks"])
def test_backward_is_made_of_the_products_that_were_asked_for(
    backend: str, multiplied: list[str]
) -> None:
    needs(backend)
    layer = draw(Case(row=VARIANTS["swiglu"]))
    output = ours(layer, backend=backend)
    multiplied.clear()
    with_gradients(layer, output)
    assert multiplied == ([] if backend == "blocks" else [backend] * 6)


def test_the_ways_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("few")
    measured: list[tuple[str, Sequence[str]]] = []

    def choose(key: str, names: Sequence[str], *_: object) -> measure.Choice:
        measured.append((key, names))
        return measure.Choice(names[0], {}, "measured")

    monkeypatch.setattr(measure, "tuning", lambda: True)
    monkeypatch.setattr(measure, "choose", choose)
    for dtype in (torch.float32, torch.float16):
        # Of small weights blocks are measured for any number of tokens, else where packing pays.
        for sizes, tokens, there in (
            ((24, 40, 16), 1, True),
            ((256, 288, 16), 16, False),
            ((256, 288, 16), 17, True),
        ):
            case = Case(row=VARIANTS["swiglu"], batch=(tokens,), sizes=sizes, dtype=dtype)
            layer = draw(case)
            measured.clear()
            with_gradients(layer, ours(layer))
            assert {("blocks" in names) for _, names in measured} == {there}
            assert all(f"{kernels.level()} kernels" in key for key, _ in measured)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("instructions", [True, False])
def test_the_rule_where_a_processor_lacks_instructions(
    dtype: torch.dtype, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("blocks")
    has = instructions or dtype == torch.float32
    monkeypatch.setattr(native, "multiplies", lambda _: has)
    monkeypatch.setattr(kernels, "has_tiles", lambda: False)
    plans = explain(FeedForward(24, 40, dtype=dtype), tokens=40)[0].plans
    for plan in plans.values():
        assert (plan.chosen == "blocks") != has


@pytest.mark.parametrize(("backend", "low", "high"), [("torch", 0.1, 1.0), ("blocks", 0.0, 1e-3)])
def test_what_is_added_to_float32_is_not_rounded_by_blocks(
    backend: str, low: float, high: float
) -> None:
    """A gradient over tiles of tokens is rounded to bfloat16 once, or each tile's share of it."""
    needs(backend)
    x, grad = torch.randn(2, 192, 40).bfloat16()
    eye, down = torch.eye(40).bfloat16(), torch.zeros(40, 40).bfloat16().requires_grad_()
    options: dict[str, Any] = {"variant": "relu", "backend": backend, "tile": 24}
    y = functional.feed_forward(x, None, eye, down, **options)
    (found,) = torch.autograd.grad(y, down, grad)
    truth = grad.double().t() @ x.relu().double()
    assert low <= (found != truth.bfloat16()).double().mean() <= high


def test_backward_refuses_products_that_cannot() -> None:
    layer = draw(Case(row=VARIANTS["gelu"], dtype=torch.float64))
    with torch.no_grad():
        for backend, reason in (("blocks", "no kernel for torch.float64"), ("mine", "must be one")):
            with pytest.raises(BackendError, match=reason):
                torch.ops.gatedffn.feed_forward_backward(
                    *(layer.grad, [], ["x"], layer.x, *layer.weights, [], [], "gelu"),
                    *("input", None, backend),
                )


def test_auto_by_rule(taken: list[tuple[str, str]]) -> None:
    needs("few")
    one, none, two, many = (
        draw(Case(row=VARIANTS["swiglu"], batch=(n,))) for n in (1, 0, 2, MOST_FEW + 1)
    )
    with torch.no_grad():
        ours(one)
        ours(none)
    with_gradients(two, ours(two))
    with_gradients(many, ours(many, tile=1))
    # Linear layers take all tokens at once.
    few, tiled = ([(stage, way) for stage in ("forward", "backward")] for way in ("few", "torch"))
    assert taken == [("inference", "few"), ("inference", "linear"), *few, *tiled]


def meta(layer: Layer) -> Layer:
    return layer.mapped(lambda _, t: t.detach().to("meta"))


HALF = torch.bfloat16
GELU, SWIGLU = VARIANTS["gelu"], VARIANTS["swiglu"]
IMPOSSIBLE: dict[str, tuple[str, Case, dict[str, Any], str]] = {
    "few-tokens": ("few", Case(row=GELU, batch=(MOST_FEW + 1,)), {}, str(MOST_FEW + 1)),
    "few-none": ("few", Case(row=GELU, batch=(0,)), {}, "no tokens"),
    "few-fp64": ("few", Case(row=GELU, batch=(2,), dtype=torch.float64), {}, "torch.float64"),
    "tiles-none": ("tiles", Case(row=GELU, batch=(0,), dtype=HALF), {}, "no tokens"),
    "tiles-fp64": ("tiles", Case(row=GELU, dtype=torch.float64), {}, "float64"),
    "blocks-none": ("blocks", Case(row=GELU, batch=(0,)), {}, "no tokens"),
    "blocks-fp64": ("blocks", Case(row=GELU, dtype=torch.float64), {}, "float64"),
    "onednn-fp64": ("onednn", Case(row=GELU, dtype=torch.float64), {}, "torch.float64"),
    "linear-tile": ("linear", Case(row=GELU), {"tile": 18}, "all tokens at once, not on 18"),
    "few-parameter": (
        "few",
        Case(row=SWIGLU, batch=(3,)),
        {"beta": torch.ones(3, 1)},
        "a parameter is neither one number nor one for each hidden unit",
    ),
    "tiles-parameter": (
        "tiles",
        Case(row=SWIGLU, dtype=HALF),
        {"beta": torch.ones(37, 1)},
        "a parameter is neither one number nor one for each hidden unit",
    ),
}


@pytest.mark.parametrize(
    ("backend", "case", "options", "reason"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE)
)
def test_a_backend_that_cannot_says_why(
    backend: str, case: Case, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(
        BackendError, match=f"backend '{backend}' cannot compute this call: .*{reason}"
    ):
        ours(draw(case), backend=backend, **options)


@all_but_the_definition
def test_no_operator_where_only_the_definition_can(backend: str) -> None:
    layer = draw(Case(row=VARIANTS["gelu"], batch=(2,)))
    with pytest.raises(BackendError, match="there is no kernel for meta"):
        ours(meta(layer), backend=backend)
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(lambda x: ours(replace(layer, x=x), backend=backend))(layer.x)
    mixed = replace(layer, weights=layer.weights._replace(down_bias=torch.ones(16).bfloat16()))
    with pytest.raises(BackendError, match=r"x is torch\.float32, a weight torch\.bfloat16"):
        ours(mixed, backend=backend)


def test_pytorch_adds_a_bias_within_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, out = (torch.randn(size) for size in ((5, 8), (6, 8), (6,), (5, 6)))
    monkeypatch.setattr(Tensor, "copy_", None)
    forward.project(products.by_torch, x, weight, bias, out)
    monkeypatch.undo()
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("save", [False, True])
def test_an_operator_casts_nothing_under_autocast(save: bool) -> None:
    """Whoever calls it by its name, as a compiled graph does, has said the dtypes."""
    w = draw(Case(row=VARIANTS["swiglu"])).mapped(lambda _, t: t.detach())
    name = "feed_forward_saving" if save else "feed_forward"
    rest: tuple[Any, ...] = ([], [1.0], "swiglu", "gate_up", None, "torch")
    operator = getattr(torch.ops.gatedffn, name)
    expected = operator(w.x, *w.weights, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = operator(w.x, *w.weights, *rest)
    for one, other in zip(*((found, expected) if save else ([found], [expected])), strict=True):
        assert same_bits(one, other)


def test_a_gpu_that_is_only_thought_of() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, gate, up, down = (
            torch.empty(size, device="cuda") for size in ((3, 64), (128, 64), (128, 64), (32, 128))
        )
        y = functional.feed_forward(x, gate, up, down)
        hidden = functional.glu(torch.empty(3, 8, device="cuda"))
    assert (y.shape, y.device.type) == ((3, 32), "cuda")
    assert (hidden.shape, hidden.device.type) == ((3, 4), "cuda")


def test_every_backend_is_tested() -> None:
    assert set(PUBLIC) == {"auto", *BACKENDS, "fused"}  # which tests/gpu has


WRONG: dict[str, Callable[[Layer], Any]] = {
    "x": lambda layer: replace(layer, x=layer.x[:, 1:]),
    "scalar x": lambda layer: replace(layer, x=layer.x[0, 0]),
    "integer x": lambda layer: replace(layer, x=layer.x.detach().long()),
    "up": lambda layer: replace(layer, weights=layer.weights._replace(up=torch.ones(39, 24))),
    "up of a vector": lambda layer: replace(
        layer, weights=layer.weights._replace(up=torch.ones(24))
    ),
    "down": lambda layer: replace(layer, weights=layer.weights._replace(down=torch.ones(16, 39))),
    "gate bias": lambda layer: replace(
        layer, weights=layer.weights._replace(gate_bias=torch.ones(41))
    ),
    "up bias": lambda layer: replace(layer, weights=layer.weights._replace(up_bias=torch.ones(1))),
    "down bias": lambda layer: replace(
        layer, weights=layer.weights._replace(down_bias=torch.ones(1, 16))
    ),
    "beta": lambda layer: replace(layer, parameters={"beta": torch.ones(39)}),
    "integer beta": lambda layer: replace(layer, parameters={"beta": torch.ones(40).long()}),
    "device": lambda layer: replace(
        layer, weights=layer.weights._replace(down=torch.ones(16, 40, device="meta"))
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_wrong_operands_are_refused_alike_by_all(wrong: Callable[[Layer], Any]) -> None:
    layer = wrong(draw(Case(row=VARIANTS["swiglu"], batch=(2,))))
    said = set()
    for backend in PUBLIC:
        with pytest.raises(GatedFFNError) as raised:
            ours(layer, backend=backend)
        said.add((type(raised.value), str(raised.value)))
    assert len(said) == 1, said


def test_dtypes_that_do_not_fit_are_refused_as_pytorch_does() -> None:
    layer = draw(Case(row=VARIANTS["swiglu"]))
    mixed = replace(layer, x=layer.x.detach().double())
    with pytest.raises(RuntimeError, match="same dtype") as theirs:
        by_hand(mixed)
    with pytest.raises(RuntimeError, match="same dtype") as own:
        ours(mixed)
    assert str(own.value) == str(theirs.value)


@pytest.mark.parametrize("tile", [0, -1, 1.5, True, "8"])
def test_a_tile_is_a_number_of_tokens(tile: Any) -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(GatedFFNError, match="it must be a positive number of tokens"):
        functional.gated_linear(x, w, w, tile=tile)


@pytest.mark.parametrize(("option", "value"), [("save", "all"), ("backend", "blas")])
def test_an_option_that_does_not_exist(option: str, value: str) -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(GatedFFNError, match=f"{option} is '{value}': it must be one of"):
        functional.gated_linear(x, w, w, **{option: value})  # type: ignore[arg-type]


# known faults


def computed(layer: Layer, **options: Any) -> Results:
    return with_gradients(layer, ours(layer, **({"backend": "torch", "tile": 8} | options)))


def branches_swapped(layer: Layer, _: pytest.MonkeyPatch) -> Results:
    w = layer.weights
    assert w.up is not None
    swapped = Weights(w.up, w.gate, w.down, w.up_bias, w.gate_bias, w.down_bias)
    found = computed(replace(layer, weights=swapped))
    other = {"gate": "up", "gate_bias": "up_bias"}
    other |= {b: a for a, b in other.items()}
    return {name: found[other.get(name, name)] for name in found}


def tanh_for_erf(layer: Layer, _: pytest.MonkeyPatch) -> Results:
    return computed(replace(layer, row=VARIANTS["geglu_tanh"]))


def without(name: str) -> Callable[[Layer, pytest.MonkeyPatch], Results]:
    def wrong(layer: Layer, _: pytest.MonkeyPatch) -> Results:
        zero = torch.zeros_like(layer.tensors()[name], requires_grad=True)
        return computed(layer.mapped(lambda n, t: zero if n == name else t))

    return wrong


def last_tile_of_backward_skipped(layer: Layer, _: pytest.MonkeyPatch) -> Results:
    grad = layer.grad.clone()
    grad[32:] = 0.0
    return computed(replace(layer, grad=grad))


def last_tile_of_forward_skipped(layer: Layer, _: pytest.MonkeyPatch) -> Results:
    found = computed(layer)
    found["output"][32:] = 0.0
    return found


def tiles_not_added_up(layer: Layer, patch: pytest.MonkeyPatch) -> Results:
    real = torch.addmm

    def overwriting(of: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return torch.mm(a, b, out=out) if of is out else real(of, a, b, out=out)

    patch.setattr(torch, "addmm", overwriting)
    return computed(layer)


def stale_hidden_values(layer: Layer, patch: pytest.MonkeyPatch) -> Results:
    """Every tile after the first finds what the one before left."""
    real, calls = forward.gate_into, itertools.count()

    def gating(*args: Any) -> None:
        if next(calls) == 0:
            real(*args)

    patch.setitem(forward.WORKED_ON, "cpu", 16 * 2 * 40 * layer.x.element_size())
    patch.setattr(forward, "gate_into", gating)
    forget_plans()
    return computed(layer)


def parameter_of_the_neighbour(layer: Layer, _: pytest.MonkeyPatch) -> Results:
    return computed(layer.mapped(lambda n, t: t.roll(1) if n == "beta" else t))


def one_token_of_x_stale(layer: Layer, _: pytest.MonkeyPatch) -> Results:
    found = computed(layer)
    found["x"][-1] = found["x"][0]
    return found


FAULTS: tuple[tuple[str, Callable[[Layer, pytest.MonkeyPatch], Results]], ...] = (
    ("geglu", branches_swapped),
    ("swiglu", branches_swapped),
    ("geglu", tanh_for_erf),
    ("swiglu", without("gate_bias")),
    ("swiglu", without("up_bias")),
    ("swiglu", without("down_bias")),
    ("swiglu", last_tile_of_backward_skipped),
    ("swiglu", last_tile_of_forward_skipped),
    ("swiglu", tiles_not_added_up),
    ("swiglu", stale_hidden_values),
    ("swiglu", parameter_of_the_neighbour),
    ("swiglu", one_token_of_x_stale),
)


@pytest.mark.parametrize(
    ("name", "fault"),
    FAULTS,
    ids=[f"{name}-{getattr(fault, '__name__', '')}-{n}" for n, (name, fault) in enumerate(FAULTS)],
)
@dtypes
def test_known_faults_are_rejected(
    name: str,
    fault: Callable[[Layer, pytest.MonkeyPatch], Results],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault is tanh_for_erf and dtype != torch.float32:
        pytest.skip("the two differ by less than this dtype can tell")
    layer = draw(Case(row=VARIANTS[name], dtype=dtype, learned="unit"))
    judge([computed(layer)], [layer])
    with monkeypatch.context() as patch:
        wrong = fault(layer, patch)
    with pytest.raises(AssertionError):
        judge([wrong], [layer])


@backends
@pytest.mark.parametrize("down", [True, False], ids=["down", "no_down"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_nothing_is_read_beside_rows(
    dtype: torch.dtype, down: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backward.AT_ONCE, "cpu", 1)  # hidden units in parts, the last one narrower
    case = Case(row=VARIANTS["swiglu"], sizes=(35, 41, 37), dtype=dtype, down=down)
    case, options = fit(backend, case, dtype=True)
    layers, against = several(case)
    amid = [layer.mapped(lambda _, t: amid_nans(t).requires_grad_()) for layer in layers]
    if backend != "definition":  # whose backward is PyTorch's own
        amid = [replace(layer, grad=amid_nans(layer.grad)) for layer in amid]
    judge([with_gradients(at, ours(at, save="input", **options)) for at in amid], layers, against)


@pytest.mark.parametrize("backend", ["torch", "onednn", "blocks"])
def test_sums_of_one_token_at_a_time(backend: str) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"], batch=(16384,), sizes=(16, 24, 16)))
    layer = draw(case)
    double = layer.to(torch.float64)
    found = with_gradients(layer, ours(layer, tile=1, **options))
    truth, eager = (with_gradients(of, by_hand(of)) for of in (double, layer))
    for name in found:
        assert_matches(found[name], truth[name], eager[name], name)
