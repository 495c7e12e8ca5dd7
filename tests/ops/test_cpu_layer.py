"""The layer's own kernels at every instruction-set level: numbers, and the memory they touch."""

import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gatedffn.ops.feed_forward.call import Call
from support.cases import DTYPES, dtypes
from support.compare import assert_matches, same_bits, unchanged
from support.levels import LEVELS, MARGIN, Guarded, amid_nans, every_level, guarded, needs_kernels
from torch import Tensor

from gatedffn import native
from gatedffn.activations import Value
from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import kernels
from gatedffn.ops import scratch as scratch_of
from gatedffn.ops.feed_forward import products, reference
from gatedffn.ops.feed_forward.cpu import ways as cpu
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.feed_forward.ways import Saved
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels

Sizes = tuple[int, int, int]  # d_model, d_hidden, d_out
# Around the sizes of vectors, of tiles, of the steps of the summed dimension and of blocks of rows.
# The longest sums are made of several chunks; the last size has whole tiles, which are not copied.
SIZES: tuple[Sizes, ...] = (
    (1, 1, 1),
    (7, 31, 5),
    (33, 67, 131),
    (130, 200, 33),
    (300, 67, 7),
    (9, 1, 7),
    (1, 200, 33),
    (700, 80, 67),
    (33, 1100, 3),
    (320, 288, 65),
)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))

WITH_TILES = tuple(level for level in LEVELS if level in native.WITH_TILES)
needs_tiles = pytest.mark.skipif(
    not WITH_TILES, reason="no level that runs here multiplies tiles of bfloat16"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What else a layer may have: biases, a parameter for each hidden unit, no W_down."""

    variant: str
    bias: bool = False
    per_unit: bool = False
    down: bool = True


KINDS = (
    Kind("gelu"),
    Kind("swiglu"),
    Kind("swiglu_oai", bias=True),
    Kind("xielu", bias=True, per_unit=True),
    Kind("swiglu", per_unit=True),
    Kind("glu", bias=True, down=False),
    Kind("gelu", down=False),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with its tokens."""

    x: Tensor
    weights: Weights
    variant: str
    parameters: dict[str, Value]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Layer":
        return Layer(
            change(self.x),
            Weights(*(None if w is None else change(w) for w in self.weights)),  # type: ignore[arg-type]
            self.variant,
            {n: change(v) if isinstance(v, Tensor) else v for n, v in self.parameters.items()},
        )

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, *self.weights) if t is not None]


def draw(kind: Kind, size: Sizes, tokens: int, dtype: torch.dtype, seed: int = 0) -> Layer:
    """A layer whose gate and up have the size that they have in a network."""
    d_model, d_hidden, d_out = size
    generator = torch.Generator().manual_seed(seed)
    row = VARIANTS[kind.variant]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = Weights(
        normal(d_hidden, d_model) / d_model**0.5,
        normal(d_hidden, d_model) / d_model**0.5 if row.gated else None,
        normal(d_out, d_hidden) / d_hidden**0.5 if kind.down else None,
        normal(d_hidden) if kind.bias else None,
        normal(d_hidden) if kind.bias and row.gated else None,
        normal(d_out) if kind.bias and kind.down else None,
    )
    spread = torch.linspace(0.6, 1.4, d_hidden, dtype=torch.float64)
    parameters: dict[str, Value] = dict(row.defaults)
    if kind.per_unit:
        parameters = {name: spread * value for name, value in row.defaults.items()}
    layer = Layer(normal(tokens, d_model), weights, kind.variant, parameters)
    return layer.mapped(lambda t: t.to(dtype))


def several(kind: Kind, size: Sizes, tokens: int, dtype: torch.dtype) -> list[Layer]:
    """Layers that are judged together: the largest error of a few numbers is one of luck."""
    _, d_hidden, d_out = size
    independent = tokens * (min(d_hidden, d_out) if kind.down else d_hidden)
    count = min(64, max(1, 2048 // independent))
    return [draw(kind, size, tokens, dtype, seed) for seed in range(count)]


Results = dict[str, Tensor]


def by_definition(layer: Layer) -> Results:
    """Output, gate and up by PyTorch's products and the definition, in the layer's dtype."""
    w = layer.weights
    results = {
        "output": reference.feed_forward(layer.x, w, layer.variant, layer.parameters),
        "gate": F.linear(layer.x, w.gate, w.gate_bias),
    }
    if w.up is not None:
        results["up"] = F.linear(layer.x, w.up, w.up_bias)
    return results


Way = Callable[[Call, bool, str], Saved]
few: Way = cpu._few
tiles: Way = cpu._tiles
blocks: Way = cpu._blocks


def by_kernel(
    way: Way,
    layer: Layer,
    level: str,
    *,
    save: bool = False,
    place: Callable[[Tensor], Tensor] = amid_nans,
) -> Results:
    """The same by a kernel. What it is given lies amid NaNs; neither may change."""
    given = layer.mapped(place)
    call = Call(given.x, given.weights, given.variant, given.parameters)
    for tensor, taken in zip(given.tensors(), (call.x, *filter_none(call.weights)), strict=True):
        assert tensor.data_ptr() == taken.data_ptr()  # strides reach the kernel, not a copy
    with unchanged(*map(with_surroundings, given.tensors())):
        found = way(call, save, level)
    named = zip(("output", "gate", "up"), found, strict=True)
    results = {name: tensor for name, tensor in named if tensor is not None}
    for name, result in results.items():
        assert result.storage_offset() == MARGIN, f"{name} was not guarded"
    return results


def with_surroundings(view: Tensor) -> Tensor:
    """All of the memory that a tensor is a part of."""
    count = view.untyped_storage().nbytes() // view.element_size()
    return view.as_strided((count,), (1,), 0)


def filter_none(weights: Weights) -> list[Tensor]:
    return [w for w in weights if w is not None]


def stacked(results: list[Results]) -> Results:
    return {name: torch.stack([each[name] for each in results]) for name in results[0]}


def portable(way: Way, layer: Layer) -> Results:
    """The output by kernels that run everywhere: those that sum alike, where there are."""
    if way is blocks:
        return {"output": by_kernel(blocks, layer, "portable")["output"]}
    parts = [
        Layer(x, layer.weights, layer.variant, layer.parameters)
        for x in torch.split(layer.x, cpu.FEW)
    ]
    return {"output": torch.cat([by_kernel(few, part, "portable")["output"] for part in parts])}


def judge(
    way: Way, layers: list[Layer], levels: tuple[str, ...] = LEVELS, *, save: bool = False
) -> None:
    """Every level against float64, as near as PyTorch's own composition and as the portable one."""
    eager = stacked([by_definition(layer) for layer in layers])
    truth = stacked([by_definition(layer.mapped(Tensor.double)) for layer in layers])
    plain = stacked([portable(way, layer) for layer in layers])
    for level in levels:
        results = stacked([by_kernel(way, layer, level, save=save) for layer in layers])
        assert set(results) == (set(truth) if save else {"output"})
        for name, result in results.items():
            assert_matches(result, truth[name], eager[name], f"{level} {name}")
        name = f"{level} output, portable as eager"
        assert_matches(results["output"], truth["output"], plain["output"], name)


def judge_tiles(kind: Kind, size: Sizes, tokens: int, *, save: bool = False) -> None:
    judge(tiles, several(kind, size, tokens, torch.bfloat16), WITH_TILES, save=save)


# Memory that shows what a kernel strays into.

SLACK = 4096  # bytes; keeps the alignment


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Guarded]]:
    """Outputs lie amid NaNs and scratch memory between canaries, filled with the bits of NaNs."""
    places: list[Guarded] = []
    scratches: list[tuple[Tensor, int]] = []

    def scratch(size: int, _: str = "") -> Tensor:
        memory = torch.full((size + 2 * SLACK,), 0xFF, dtype=torch.uint8)
        scratches.append((memory, size))
        return memory[SLACK : SLACK + size]

    def guarding(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def guarded_empty(*args: Any, **kwargs: Any) -> Tensor:
            made = function(*args, **kwargs)
            caller = Path(sys._getframe(1).f_code.co_filename)
            if caller.name not in ("ways.py", "call.py") or made.dim() != 2:
                return made
            rows, columns = made.shape
            places.append(guarded(rows, columns, made.dtype))
            return places[-1].view

        return guarded_empty

    for module in (cpu, products, scratch_of):
        monkeypatch.setattr(module, "scratch", scratch)
    monkeypatch.setattr(torch, "empty", guarding(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", guarding(Tensor.new_empty))
    yield places
    for place in places:
        place.assert_intact("an output")
    assert bool(places) == bool(scratches), "no scratch memory was guarded"
    for memory, size in scratches:
        assert (memory[:SLACK] == 0xFF).all()
        assert (memory[SLACK + size :] == 0xFF).all(), f"scratch of {size} bytes is too small"


# numbers


def kind_of(dtype: torch.dtype, size: Sizes, tokens: int) -> Kind:
    """One of the kinds; neighbouring cases get others, so that all meet all over the tests."""
    place = SIZES.index(size) + 2 * list(DTYPES.values()).index(dtype)
    return KINDS[(place + tokens) % len(KINDS)]


@dtypes
@sizes
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17, 31, 32])
def test_few_tokens(dtype: torch.dtype, size: Sizes, tokens: int, save: bool) -> None:
    judge(few, several(kind_of(dtype, size, tokens), size, tokens, dtype), save=save)


@dtypes
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("tokens", [3, 27])
def test_few_tokens_of_every_kind(kind: Kind, dtype: torch.dtype, tokens: int, save: bool) -> None:
    judge(few, several(kind, (33, 67, 131), tokens, dtype), save=save)


@dtypes
@every_level
@pytest.mark.parametrize("tokens", [3, 27])
def test_saving_changes_no_output(dtype: torch.dtype, level: str, tokens: int) -> None:
    layer = draw(Kind("swiglu", bias=True), (33, 67, 131), tokens, dtype)
    for way in (few, blocks):
        saved, plain = (by_kernel(way, layer, level, save=save) for save in (True, False))
        assert same_bits(saved["output"], plain["output"])


@needs_tiles
@sizes
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 33, 100, 300])
def test_tiles(size: Sizes, tokens: int, save: bool) -> None:
    judge_tiles(kind_of(torch.bfloat16, size, tokens), size, tokens, save=save)


@needs_tiles
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("tokens", [11, 100])
@pytest.mark.parametrize("cache", [0, cpu.CACHE])  # 0: as few tokens at a time as there can be
def test_tiles_of_every_kind(
    kind: Kind, tokens: int, cache: int, save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CACHE", cache)
    judge_tiles(kind, (33, 67, 131), tokens, save=save)


@dtypes
@sizes
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("tokens", [1, 17, 100, 600])
def test_blocks(size: Sizes, tokens: int, save: bool, dtype: torch.dtype) -> None:
    judge(blocks, several(kind_of(dtype, size, tokens), size, tokens, dtype), save=save)


@dtypes
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("at_a_time", [16, cpu.AT_A_TIME])
def test_blocks_of_every_kind(
    kind: Kind, at_a_time: int, save: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "AT_A_TIME", at_a_time)
    judge(blocks, several(kind, (33, 67, 131), 41, dtype), save=save)


@every_level
def test_the_last_of_many_tokens_may_pack_more(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of so long rows 208 are packed at most: 209 tokens are cut into two halves, 208 are not.
    monkeypatch.setattr(cpu, "AT_A_TIME", 209)
    layer = draw(Kind("swiglu"), (20_000, 3, 5), 417, torch.float32)
    found = by_kernel(blocks, layer, level)["output"]
    assert_matches(
        found, by_definition(layer.mapped(Tensor.double))["output"], by_definition(layer)["output"]
    )


@dtypes
@every_level
@sizes
def test_blocks_read_nothing_behind_their_inputs(
    size: Sizes, dtype: torch.dtype, level: str
) -> None:
    layer = draw(Kind("swiglu", bias=True), size, 33, dtype)
    by_kernel(blocks, layer, level, place=at_the_end)


# Operands by rows and by columns; sizes around those of squares, of chunks, and of what a thread
# takes at once.
@dtypes
@every_level
@pytest.mark.parametrize("left", [False, True], ids=["", "left_by_columns"])
@pytest.mark.parametrize("right", [False, True], ids=["", "right_by_columns"])
@pytest.mark.parametrize("add", ["", "add", "add_wider"])
def test_a_product_of_blocks(
    left: bool, right: bool, add: str, dtype: torch.dtype, level: str, guards: list[Guarded]
) -> None:
    for rows, deep, columns in ((1, 1, 1), (5, 16, 17), (33, 70, 49), (17, 401, 200), (530, 33, 3)):
        generator = torch.Generator().manual_seed(rows)
        a = torch.randn(rows, deep, generator=generator, dtype=torch.float64).to(dtype)
        b = torch.randn(deep, columns, generator=generator, dtype=torch.float64).to(dtype)
        a = amid_nans(a.t()).t() if left else amid_nans(a)
        b = amid_nans(b.t()).t() if right else amid_nans(b)
        out = guarded(rows, columns, torch.float32 if add == "add_wider" else dtype)
        guards.append(out)
        before = torch.randn(rows, columns, generator=generator)
        if add:
            out.view.copy_(before)
            before = out.view.clone()
        products.by_blocks(a, b, out.view, bool(add), level)
        truth = a.double() @ b.double() + (before.double() if add else 0.0)
        eager = (a @ b).to(out.view.dtype) + (before if add else 0.0)
        assert_matches(out.view, truth, eager, f"{rows} {deep} {columns}")
    # NaNs are in everything that may hold a stale value.
    assert products.by_blocks(a[:, :0], b[:0], None, False, level).eq(0.0).all()


@dtypes
def test_a_long_product_is_packed_by_fewer_rows(dtype: torch.dtype, guards: list[Guarded]) -> None:
    a, b = torch.randn(70, 140_001).to(dtype), torch.randn(140_001, 33).to(dtype)
    out = guarded(70, 33, dtype)
    guards.append(out)
    products.by_blocks(a, b, out.view)
    assert_matches(out.view, a.double() @ b.double(), a @ b)


@pytest.mark.parametrize(
    ("b", "out"),
    [
        (torch.ones(4, 5), None),
        (torch.ones(3, 5, dtype=torch.float16), None),
        (torch.ones(3, 5), torch.ones(2, 5, dtype=torch.float16)),
        (torch.ones(3, 5), torch.ones(5, 2)),
        (torch.ones(3, 5), torch.ones(5, 2).t()),
    ],
    ids=["length", "dtype", "dtype of out", "shape of out", "strides of out"],
)
def test_operands_that_do_not_fit(b: Tensor, out: Tensor | None) -> None:
    with pytest.raises(ShapeError, match="do not fit together"):
        products.by_blocks(torch.ones(2, 3), b, out)


def at_the_end(x: Tensor) -> Tensor:
    """The same tensor in memory behind which nothing can be read: who tries to is ended."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    none = 0  # PROT_NONE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, none) == 0
    view = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return view.view(x.shape).copy_(x)


@dtypes
@every_level
@sizes
@pytest.mark.parametrize("tokens", [1, 27])
def test_few_reads_nothing_behind_its_inputs(
    size: Sizes, tokens: int, dtype: torch.dtype, level: str
) -> None:
    layer = draw(Kind("swiglu", bias=True), size, tokens, dtype)
    by_kernel(few, layer, level, place=at_the_end)


@needs_tiles
@sizes
@pytest.mark.parametrize("tokens", [5, 33])
def test_tiles_read_nothing_behind_their_inputs(size: Sizes, tokens: int) -> None:
    layer = draw(Kind("swiglu", bias=True), size, tokens, torch.bfloat16)
    for level in WITH_TILES:
        by_kernel(tiles, layer, level, place=at_the_end)


def check_threads(
    way: Way, tokens: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads give the bits of one."""
    layer = draw(Kind("swiglu", bias=True), (130, 200, 133), tokens, dtype)
    outputs = []
    for threads in (1, 3):
        monkeypatch.setattr(kernels, "threads", lambda *_, threads=threads: threads)
        outputs.append(by_kernel(way, layer, level, save=True))
    assert outputs[0].keys() == outputs[1].keys()
    for name, output in outputs[0].items():
        assert same_bits(output, outputs[1][name]), name


@dtypes
@every_level
@pytest.mark.parametrize("tokens", [1, 3, 32])
def test_threads_of_few(
    tokens: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_threads(few, tokens, dtype, level, monkeypatch)


@dtypes
@every_level
@pytest.mark.parametrize("tokens", [17, 600])
def test_threads_of_blocks(
    tokens: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_threads(blocks, tokens, dtype, level, monkeypatch)


@needs_tiles
@pytest.mark.parametrize("cache", [0, cpu.CACHE])
@pytest.mark.parametrize("tokens", [1, 17, 70, 300])
def test_threads_of_tiles(tokens: int, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CACHE", cache)
    for level in WITH_TILES:
        check_threads(tiles, tokens, torch.bfloat16, level, monkeypatch)


ways = pytest.mark.parametrize(
    ("way", "tokens", "dtype", "level"),
    [
        *(
            pytest.param(few, tokens, dtype, LEVELS[0], id=f"few-{tokens}-{name}")
            for tokens in (2, 32)
            for name, dtype in DTYPES.items()
        ),
        *(
            pytest.param(
                *(tiles, tokens, torch.bfloat16, "".join(WITH_TILES[:1])),
                id=f"tiles-{tokens}",
                marks=needs_tiles,
            )
            for tokens in (5, 33)
        ),
        *(
            pytest.param(blocks, 33, dtype, LEVELS[0], id=f"blocks-{name}")
            for name, dtype in DTYPES.items()
        ),
    ],
)


@ways
def test_scratch_memory_is_held_while_the_kernel_runs(
    way: Way, tokens: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    scratch, bind = vars(cpu)["scratch"], kernels.Kernel.bind

    def watching(
        kernel: kernels.Kernel, level: str | None = None, **facts: int
    ) -> Callable[..., None]:
        """The kernel, which looks first whether the memory is there."""
        run = bind(kernel, level, **facts)

        def call(*addresses: int) -> None:
            assert held, kernel.name
            assert held[0]() is not None, kernel.name
            run(*addresses)

        return call

    def watched(size: int, purpose: str = "") -> Tensor:
        memory: Tensor = scratch(size, purpose)
        held.append(weakref.ref(memory))
        return memory

    for module in (cpu, products):
        monkeypatch.setattr(module, "scratch", watched)
    monkeypatch.setattr(kernels.Kernel, "bind", watching)
    by_kernel(way, draw(Kind("gelu"), (7, 31, 5), tokens, dtype), level)


# faults that this comparison must see


def bias_forgotten(layer: Layer) -> Layer:
    w = layer.weights._replace(up_bias=None)
    return Layer(layer.x, w, layer.variant, layer.parameters)


def branches_swapped(layer: Layer) -> Layer:
    w = layer.weights
    assert w.up is not None
    swapped = w._replace(gate=w.up, up=w.gate)
    return Layer(layer.x, swapped, layer.variant, layer.parameters)


def last_unit_forgotten(layer: Layer) -> Layer:
    down = layer.weights.down
    assert down is not None
    down = down.clone()
    down[:, -1] = 0.0
    return Layer(layer.x, layer.weights._replace(down=down), layer.variant, layer.parameters)


def last_input_forgotten(layer: Layer) -> Layer:
    x = layer.x.clone()
    x[:, -1] = 0.0
    return Layer(x, layer.weights, layer.variant, layer.parameters)


def tokens_shifted(layer: Layer) -> Layer:
    return Layer(layer.x.roll(1, 0), layer.weights, layer.variant, layer.parameters)


def parameter_of_the_neighbour(layer: Layer) -> Layer:
    parameters: dict[str, Value] = {
        n: v.roll(1) if isinstance(v, Tensor) else v for n, v in layer.parameters.items()
    }
    return Layer(layer.x, layer.weights, layer.variant, parameters)


@ways
@pytest.mark.parametrize(
    "fault",
    [
        bias_forgotten,
        branches_swapped,
        last_unit_forgotten,
        last_input_forgotten,
        tokens_shifted,
        parameter_of_the_neighbour,
    ],
)
def test_known_faults_are_rejected(
    way: Way, tokens: int, dtype: torch.dtype, level: str, fault: Callable[[Layer], Layer]
) -> None:
    layer = draw(Kind("swiglu", bias=True, per_unit=True), (33, 67, 130), tokens, dtype)
    eager, truth = by_definition(layer), by_definition(layer.mapped(Tensor.double))
    wrong = by_kernel(way, fault(layer), level)["output"]
    with pytest.raises(AssertionError):
        assert_matches(wrong, truth["output"], eager["output"])


# what the kernels do not take


def call_of(tokens: int, dtype: torch.dtype) -> Call:
    layer = draw(Kind("swiglu"), (7, 31, 5), tokens, dtype)
    return Call(layer.x, layer.weights, layer.variant, layer.parameters)


def refusal(name: str, call: Call, *, save: bool = False) -> str | None:
    """Why a way is impossible; asking for it by name must then say so too."""
    reason = cpu.impossible(call, save).get(name)
    if reason is not None:
        with pytest.raises(BackendError) as caught:
            cpu.WAYS.forward(call, save, name)
        assert reason in str(caught.value)
        assert name not in cpu.WAYS.among(call, save)
    return reason


@dtypes
def test_few_says_what_it_does_not_take(dtype: torch.dtype) -> None:
    for tokens in (1, cpu.FEW):
        assert refusal("few", call_of(tokens, dtype)) is None
        reason = refusal("few", call_of(tokens, dtype), save=True)
        assert reason == "it does not save gate and up"
    for save in (False, True):
        reason = refusal("few", call_of(cpu.FEW + 1, dtype), save=save)
        assert reason == f"it takes up to {cpu.FEW} tokens, these are {cpu.FEW + 1}"


@dtypes
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("there", [False, True], ids=["without", "with"])
def test_tiles_say_what_they_do_not_take(
    tokens: int, dtype: torch.dtype, save: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_tiles", lambda: there)
    reason = refusal("tiles", call_of(tokens, dtype), save=save)
    if dtype != torch.bfloat16:
        assert reason == f"it is for bfloat16, these are {dtype}"
    elif there:
        assert reason is None
    else:
        assert reason == "this processor does not multiply tiles of bfloat16"


def test_there_are_tiles_where_a_level_has_them() -> None:
    assert kernels.has_tiles() == bool(WITH_TILES)
    assert (refusal("tiles", call_of(5, torch.bfloat16)) is None) == bool(WITH_TILES)
    for level in LEVELS:
        library = kernels.library(level)
        assert hasattr(library, "gatedffn_tiles") == (level in native.WITH_TILES), level
