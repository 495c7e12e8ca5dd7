"""The layer's own kernels at every instruction-set level: numbers, and the memory they touch."""

import ctypes
import mmap
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.cases import DTYPES, dtypes
from support.compare import assert_matches, same_bits, unchanged
from support.layers import Case, Layer, Results, by_hand, draw, ours, stacked, with_gradients
from support.levels import (
    LEVELS,
    MARGIN,
    Guarded,
    amid_nans,
    at,
    every_level,
    guarded,
    guarded_outputs,
    guarded_scratch,
    needs_kernels,
    replace_scratch,
)
from torch import Tensor

from gatedffn import functional, native
from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import forward, products
from gatedffn.ops.feed_forward.ways import MOST_FEW
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
saves = pytest.mark.parametrize("save", [False, True], ids=["", "save"])

WITH_TILES = tuple(level for level in LEVELS if level in native.WITH_TILES)
needs_tiles = pytest.mark.skipif(
    not WITH_TILES, reason="no level that runs here multiplies tiles of bfloat16"
)

# What else a layer may have: biases, a parameter for each hidden unit, no W_down.
KINDS = {
    "gelu": Case(row=VARIANTS["gelu"], bias=False),
    "swiglu": Case(row=VARIANTS["swiglu"], bias=False),
    "bias": Case(row=VARIANTS["swiglu_oai"]),
    "bias-unit": Case(row=VARIANTS["xielu"], learned="unit"),
    "unit": Case(row=VARIANTS["swiglu"], bias=False, learned="unit"),
    "no_down-bias": Case(row=VARIANTS["glu"], down=False),
    "no_down": Case(row=VARIANTS["gelu"], bias=False, down=False),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
BIASED = Case(row=VARIANTS["swiglu"])


def of(kind: Case, size: Sizes, tokens: int, dtype: torch.dtype) -> Case:
    return replace(kind, sizes=size, batch=(tokens,), dtype=dtype)


def several(case: Case) -> list[Layer]:
    """Layers that are judged together: the largest error of a few numbers is one of luck."""
    _, d_hidden, d_out = case.sizes
    independent = case.batch[0] * (min(d_hidden, d_out) if case.down else d_hidden)
    return [draw(case, seed) for seed in range(min(64, max(1, 2048 // independent)))]


@torch.no_grad()
def by_pytorch(*layers: Layer) -> Results:
    """Outputs, gate and up by PyTorch's functions, in the dtype of the layers."""

    def one(layer: Layer) -> Results:
        w = layer.weights
        results = {"output": by_hand(layer), "gate": F.linear(layer.x, w.gate, w.gate_bias)}
        return results if w.up is None else results | {"up": F.linear(layer.x, w.up, w.up_bias)}

    return stacked([one(layer) for layer in layers])


def by_kernel(
    backend: str,
    *layers: Layer,
    level: str,
    save: bool = False,
    place: Callable[[Tensor], Tensor] = amid_nans,
) -> Results:
    """The same by a kernel. What it is given lies amid NaNs; neither may change."""

    def one(layer: Layer) -> Results:
        given = layer.mapped(lambda _, t: place(t.detach()).requires_grad_(save))
        surroundings = map(with_surroundings, given.tensors().values())
        with unchanged(*surroundings), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "contiguous", None)  # strides reach the kernel, not a copy
            of = given.x, given.weights, given.row.name, given.parameters
            output = functional.layer(*of, "gate_up", None, backend)
        results = {"output": output.detach()}
        if save:
            names = ("gate",) if given.weights.up is None else ("gate", "up")
            saved = output.grad_fn.saved_tensors[-len(names) :]  # type: ignore[union-attr]
            results |= dict(zip(names, saved, strict=True))
        for name, result in results.items():
            assert result.storage_offset() == MARGIN, f"{name} was not guarded"
        return results

    with at(level):
        return stacked([one(layer) for layer in layers])


@torch.no_grad()
def with_surroundings(view: Tensor) -> Tensor:
    """All of the memory that a tensor is a part of."""
    count = view.untyped_storage().nbytes() // view.element_size()
    return view.as_strided((count,), (1,), 0)


def portable(backend: str, *layers: Layer) -> Tensor:
    """The output by kernels that run everywhere: those that sum alike, where there are."""
    if backend == "blocks":
        return by_kernel("blocks", *layers, level="portable")["output"]
    parts = zip(
        *([replace(o, x=x) for x in torch.split(o.x, MOST_FEW)] for o in layers), strict=True
    )
    found = [by_kernel("few", *some, level="portable")["output"] for some in parts]
    return torch.cat(found, 1)


def judge(backend: str, case: Case, *, save: bool) -> None:
    """Every level against float64, as near as PyTorch's own composition and as the portable one."""
    layers = several(case)
    eager = by_pytorch(*layers)
    truth = by_pytorch(*(layer.to(torch.float64) for layer in layers))
    plain = portable(backend, *layers)
    for level in WITH_TILES if backend == "tiles" else LEVELS:
        results = by_kernel(backend, *layers, level=level, save=save)
        assert set(results) == (set(truth) if save else {"output"})
        for name, result in results.items():
            assert_matches(result, truth[name], eager[name], f"{level} {name}")
        name = f"{level} output, portable as eager"
        assert_matches(results["output"], truth["output"], plain, name)


# Memory that shows what a kernel strays into.


@pytest.fixture(autouse=True)
def guards() -> Iterator[list[Guarded]]:
    """Outputs lie amid NaNs and scratch memory between canaries."""
    with guarded_outputs(forward) as places, guarded_scratch() as scratches:
        yield places
    assert bool(places) == bool(scratches), "no scratch memory was guarded"


# numbers


def kind_of(dtype: torch.dtype, size: Sizes, tokens: int) -> Case:
    """One of the kinds; neighbouring cases get others, so that all meet all over the tests."""
    place = SIZES.index(size) + 2 * list(DTYPES.values()).index(dtype)
    return list(KINDS.values())[(place + tokens) % len(KINDS)]


@dtypes
@sizes
@saves
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17, 31, 32])
def test_few_tokens(dtype: torch.dtype, size: Sizes, tokens: int, save: bool) -> None:
    judge("few", of(kind_of(dtype, size, tokens), size, tokens, dtype), save=save)


@dtypes
@kinds
@saves
@pytest.mark.parametrize("tokens", [3, 27])
def test_few_tokens_of_every_kind(kind: Case, dtype: torch.dtype, tokens: int, save: bool) -> None:
    judge("few", of(kind, (33, 67, 131), tokens, dtype), save=save)


@dtypes
@every_level
@pytest.mark.parametrize("tokens", [3, 27])
def test_saving_changes_no_output(dtype: torch.dtype, level: str, tokens: int) -> None:
    layer = draw(of(BIASED, (33, 67, 131), tokens, dtype))
    for backend in ("few", "blocks"):
        saved, plain = (by_kernel(backend, layer, level=level, save=save) for save in (True, False))
        assert same_bits(saved["output"], plain["output"])


@needs_tiles
@sizes
@saves
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 33, 100, 300])
def test_tiles(size: Sizes, tokens: int, save: bool) -> None:
    kind = kind_of(torch.bfloat16, size, tokens)
    judge("tiles", of(kind, size, tokens, torch.bfloat16), save=save)


@needs_tiles
@kinds
@saves
@pytest.mark.parametrize("tokens", [11, 100])
@pytest.mark.parametrize("cache", [0, forward.CACHED])  # 0: as few tokens at a time as can be
def test_tiles_of_every_kind(
    kind: Case, tokens: int, cache: int, save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CACHED", cache)
    judge("tiles", of(kind, (33, 67, 131), tokens, torch.bfloat16), save=save)


@dtypes
@sizes
@saves
@pytest.mark.parametrize("tokens", [1, 17, 100, 600])
def test_blocks(size: Sizes, tokens: int, save: bool, dtype: torch.dtype) -> None:
    judge("blocks", of(kind_of(dtype, size, tokens), size, tokens, dtype), save=save)


@dtypes
@kinds
@saves
@pytest.mark.parametrize("at_a_time", [16, forward.AT_A_TIME])
def test_blocks_of_every_kind(
    kind: Case, at_a_time: int, save: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "AT_A_TIME", at_a_time)
    judge("blocks", of(kind, (33, 67, 131), 41, dtype), save=save)


@every_level
def test_the_last_of_many_tokens_may_pack_more(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of so long rows 208 are packed at most: 209 tokens are cut into two halves, 208 are not.
    monkeypatch.setattr(forward, "AT_A_TIME", 209)
    layer = draw(of(KINDS["swiglu"], (20_000, 3, 5), 417, torch.float32))
    found = by_kernel("blocks", layer, level=level)["output"]
    truth, eager = (by_pytorch(each)["output"] for each in (layer.to(torch.float64), layer))
    assert_matches(found, truth, eager)


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
@pytest.mark.parametrize(("backend", "tokens"), [("few", 1), ("few", 27), ("blocks", 33)])
def test_nothing_is_read_behind_the_inputs(
    backend: str, tokens: int, size: Sizes, dtype: torch.dtype, level: str
) -> None:
    layer = draw(of(BIASED, size, tokens, dtype))
    by_kernel(backend, layer, level=level, place=at_the_end)


@dtypes
@every_level
@sizes
@pytest.mark.parametrize(("backend", "tokens"), [("few", 1), ("few", 27), ("blocks", 33)])
def test_backward_reads_nothing_behind_its_inputs(
    backend: str, tokens: int, size: Sizes, dtype: torch.dtype, level: str
) -> None:
    layer = draw(of(BIASED, size, tokens, dtype))
    placed = layer.mapped(lambda _, t: at_the_end(t.detach()).requires_grad_())
    placed = replace(placed, grad=at_the_end(layer.grad))
    with at(level):
        with_gradients(placed, ours(placed, backend=backend))


@needs_tiles
@sizes
@pytest.mark.parametrize("tokens", [5, 33])
def test_tiles_read_nothing_behind_their_inputs(size: Sizes, tokens: int) -> None:
    layer = draw(of(BIASED, size, tokens, torch.bfloat16))
    for level in WITH_TILES:
        by_kernel("tiles", layer, level=level, place=at_the_end)


def check_threads(
    backend: str,
    tokens: int,
    dtype: torch.dtype,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
    size: Sizes = (130, 200, 133),
) -> None:
    """Several threads give the bits of one."""
    layer = draw(of(BIASED, size, tokens, dtype))
    outputs = []
    for threads in (1, 3):
        monkeypatch.setattr(kernels, "threads", lambda *_, threads=threads: threads)
        outputs.append(by_kernel(backend, layer, level=level, save=True))
    assert outputs[0].keys() == outputs[1].keys()
    for name, output in outputs[0].items():
        assert same_bits(output, outputs[1][name]), name


@dtypes
@every_level
@pytest.mark.parametrize(
    ("backend", "tokens"), [("few", 1), ("few", 3), ("few", 32), ("blocks", 17), ("blocks", 600)]
)
def test_threads(
    backend: str, tokens: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_threads(backend, tokens, dtype, level, monkeypatch)


@needs_tiles
@pytest.mark.parametrize("cache", [0, forward.CACHED])
@pytest.mark.parametrize("tokens", [1, 17, 70, 300])
@pytest.mark.parametrize("d_hidden", [200, 2100])  # the second is taken in groups by one thread
def test_threads_of_tiles(
    tokens: int, cache: int, d_hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CACHED", cache)
    size = (130, d_hidden, 133)
    for level in WITH_TILES:
        check_threads("tiles", tokens, torch.bfloat16, level, monkeypatch, size)


ways = pytest.mark.parametrize(
    ("backend", "tokens", "dtype", "level"),
    [
        *(
            pytest.param(backend, tokens, dtype, LEVELS[0], id=f"{backend}-{tokens}-{name}")
            for backend, tokens in (("few", 2), ("few", 32), ("blocks", 33))
            for name, dtype in DTYPES.items()
        ),
        *(
            pytest.param(
                *("tiles", tokens, torch.bfloat16, "".join(WITH_TILES[:1])),
                id=f"tiles-{tokens}",
                marks=needs_tiles,
            )
            for tokens in (5, 33)
        ),
    ],
)


@ways
def test_scratch_memory_is_held_while_the_kernel_runs(
    backend: str, tokens: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    scratch, bind = kernels.scratch, kernels.Kernel.bind
    ran = []

    def watching(
        kernel: kernels.Kernel, level: str | None = None, **facts: int
    ) -> Callable[..., None]:
        """The kernel, which looks first whether the memory is there."""
        run = bind(kernel, level, **facts)

        def call(*addresses: int) -> None:
            if "scratch" in kernel.addresses:
                ran.append(kernel.name)
                assert held[-1]() is not None, kernel.name
            run(*addresses)

        return call

    def watched(size: int, purpose: str = "") -> Tensor:
        memory: Tensor = scratch(size, purpose)
        held.append(weakref.ref(memory))
        return memory

    replace_scratch(monkeypatch, watched)
    monkeypatch.setattr(kernels.Kernel, "bind", watching)
    layer = draw(of(KINDS["gelu"], (7, 31, 5), tokens, dtype))
    with at(level):
        with torch.no_grad():
            ours(layer, backend=backend)
        with_gradients(layer, ours(layer, backend=backend))
    assert ran[:2] == [backend, backend]
    assert backend == "tiles" or f"{backend}_backward" in ran


# faults that this comparison must see


def bias_forgotten(layer: Layer) -> Layer:
    return replace(layer, weights=layer.weights._replace(up_bias=None))


def branches_swapped(layer: Layer) -> Layer:
    w = layer.weights
    assert w.up is not None
    return replace(layer, weights=w._replace(gate=w.up, up=w.gate))


def last_column_forgotten(name: str, t: Tensor, of: str) -> Tensor:
    return torch.cat([t[:, :-1], 0.0 * t[:, -1:]], 1) if name == of else t


def last_unit_forgotten(layer: Layer) -> Layer:
    return layer.mapped(lambda n, t: last_column_forgotten(n, t, "down"))


def last_input_forgotten(layer: Layer) -> Layer:
    return layer.mapped(lambda n, t: last_column_forgotten(n, t, "x"))


def tokens_shifted(layer: Layer) -> Layer:
    return replace(layer, x=layer.x.roll(1, 0))


def parameter_of_the_neighbour(layer: Layer) -> Layer:
    return layer.mapped(lambda n, t: t.roll(1) if n in layer.parameters else t)


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
    backend: str, tokens: int, dtype: torch.dtype, level: str, fault: Callable[[Layer], Layer]
) -> None:
    layer = draw(of(replace(BIASED, learned="unit"), (33, 67, 130), tokens, dtype))
    # So far apart that bfloat16 tells one hidden unit's parameter from the next one's.
    layer = layer.mapped(lambda n, t: 4.0 * t - 2.6 if n in layer.parameters else t)
    eager, truth = by_pytorch(layer), by_pytorch(layer.to(torch.float64))
    right, wrong = (
        by_kernel(backend, each, level=level)["output"] for each in (layer, fault(layer))
    )
    assert_matches(right, truth["output"], eager["output"])
    with pytest.raises(AssertionError):
        assert_matches(wrong, truth["output"], eager["output"])


# what the kernels do not take


def assert_taken(backend: str, tokens: int, dtype: torch.dtype, reason: str | None) -> None:
    """Whether a backend takes tokens, or why not: in inference and in training."""
    layer = draw(of(KINDS["swiglu"], (7, 31, 5), tokens, dtype))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            if reason is None:
                ours(layer, backend=backend)
                continue
            with pytest.raises(BackendError, match=re.escape(reason)):
                ours(layer, backend=backend)


@dtypes
def test_few_says_what_it_does_not_take(dtype: torch.dtype) -> None:
    assert_taken("few", 1, dtype, None)
    assert_taken("few", MOST_FEW, dtype, None)
    reason = f"it takes up to {MOST_FEW} tokens, these are {MOST_FEW + 1}"
    assert_taken("few", MOST_FEW + 1, dtype, reason)


@dtypes
@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("there", [False, pytest.param(True, marks=needs_tiles)])
def test_tiles_say_what_they_do_not_take(
    tokens: int, dtype: torch.dtype, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_tiles", lambda: there)
    reason = None if there else "this processor does not multiply tiles of bfloat16"
    if dtype != torch.bfloat16:
        reason = f"it is for bfloat16, these are {dtype}"
    assert_taken("tiles", tokens, dtype, reason)


def test_there_are_tiles_where_a_level_has_them() -> None:
    assert kernels.has_tiles() == bool(WITH_TILES)
    for level in LEVELS:
        library = kernels.library(level)
        assert hasattr(library, "gatedffn_tiles") == (level in native.WITH_TILES), level
