"""The layer for few tokens against the definition in float64: each row, dtype and cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.cases import CASES, DTYPES
from support.compare import assert_matches, same_bits, unchanged
from support.layers import Case, Layer, by_hand, draw, stacked
from support.levels import Guarded, guarded
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward import Weights
from gatedffn.ops.feed_forward.gpu import few, few_kernels
from gatedffn.ops.feed_forward.gpu.launch import Launch
from gatedffn.variants import VARIANTS

TOKENS = (1, 2, 3, 7, 16)
SWIGLU = VARIANTS["swiglu"]
GAP = 5  # elements between rows: with it, no row but the first is aligned
# Few programs, which take the interpreter the least time.
WIDE = few.Cut(rows=32, loads=8, warps=4, stages=1, unroll=1, programs=0.1)


def cuts(alone: bool) -> list[few.Cut]:
    """Every way to cut a product that the table has, for one token or for several."""
    found = [c for chip in few.CUTS.values() for (t, _), c in chip.items() if (t == 1) == alone]
    # How a piece gets to a program, and by how many warps it is shared, is hidden from it.
    return list({(c.rows, c.loads) if gpu.interpreting() else c: c for c in found}.values())


ALONE, TOGETHER = cuts(True), cuts(False)


def in_turns(found: list[few.Cut]) -> list[tuple[few.Cut, torch.dtype]]:
    """Every cut with 16 bits or float32, whose pieces differ, where kernels run in Python; else
    with every dtype.
    """
    every = list(DTYPES.values())
    if not gpu.interpreting():
        return [(cut, dtype) for cut in found for dtype in every]
    return [(cut, every[(index + turn) % 3]) for index, cut in enumerate(found) for turn in (0, 1)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips of one multiprocessor, and short sums: what is small is divided where a test asks."""
    monkeypatch.setattr(few, "MULTIPROCESSORS", dict.fromkeys(few.MULTIPROCESSORS, 1))
    monkeypatch.setattr(few, "SHORTEST", 1)
    few._prepared.cache_clear()


def placed(x: Tensor, device: torch.device, gap: int) -> Guarded:
    """The matrix (or vector) on the device, amid NaNs."""
    x = x.detach()
    rows, columns = (1, x.numel()) if x.dim() == 1 else x.shape
    made = guarded(rows, columns, x.dtype, gap)
    memory = made.memory.to(device)
    view = memory.as_strided(made.view.shape, made.view.stride(), made.view.storage_offset())
    view.copy_(x.view(rows, columns))
    return Guarded(view, memory)


def run(
    layer: Layer,
    device: torch.device,
    cut: few.Cut | None = None,
    gap: int | None = GAP,
    out_gap: int = 3,
) -> Tensor:
    """The output by the kernels, on inputs amid NaNs; without a gap they lie as PyTorch does it."""

    def place(x: Tensor) -> Tensor:
        if gap is None:
            return x.detach().to(device)
        view = placed(x, device, gap).view
        return view[0] if x.dim() == 1 else view

    given = layer.mapped(lambda _, t: place(t))
    w = given.weights
    width = w.gate.shape[0] if w.down is None else w.down.shape[0]
    out = placed(torch.full((len(given.x), width), torch.nan, dtype=given.x.dtype), device, out_gap)
    with unchanged(*given.tensors().values()):
        few.feed_forward(given.x, w, layer.row.name, given.parameters, out.view, cut)
    out.assert_intact("the output")
    return out.view.cpu()


def layers_of(case: Case, numbers: int = 640) -> list[Layer]:
    """Draws that are judged together: the largest error of a few numbers is one of luck."""
    _, d_hidden, d_out = case.sizes
    outputs = torch.Size(case.batch).numel() * min(d_hidden, d_out)
    return [draw(case, seed) for seed in range(max(2, min(24, -(-numbers // outputs))))]


def judge(found: Sequence[Tensor], layers: Sequence[Layer], name: str = "output") -> None:
    with torch.no_grad():
        truth = stacked([{name: by_hand(layer.to(torch.float64))} for layer in layers])
        eager = stacked([{name: by_hand(layer)} for layer in layers])
    assert_matches(torch.stack(list(found)), truth[name], eager[name], name)


def check(case: Case, device: torch.device, **options: Any) -> None:
    layers = layers_of(case, options.pop("numbers", 640))
    judge([run(layer, device, **options) for layer in layers], layers)


def case_of(tokens: int, sizes: tuple[int, int, int], **rest: Any) -> Case:
    return Case(**{"row": SWIGLU, "batch": (tokens,), "sizes": sizes, **rest})


# numbers


# Learned parameters reach one token and several in other shapes; numbers are the same for both.
EVERY = [
    (row, learned, index, alone)
    for index, (row, learned) in enumerate(CASES)
    for alone in (True, False)
    if learned or alone == bool(index % 2)
]


@pytest.mark.parametrize(
    ("row", "learned", "index", "alone"),
    EVERY,
    ids=[f"{row.name}{'-learned' * learned}{'-one' * alone}" for row, learned, _, alone in EVERY],
)
def test_every_row(row: Any, learned: bool, index: int, alone: bool, device: torch.device) -> None:
    """Tokens, dtypes, biases and sorts of parameters in turns, so that all meet all."""
    tokens = 1 if alone else TOKENS[1:][index % 4]
    dtype = list(DTYPES.values())[(index + alone) % 3]
    sort = ("unit", "layer")[index % 2] if learned else ""
    sizes = (40, 23, 12) if alone else (40, 70, 36)
    case = case_of(tokens, sizes, row=row, dtype=dtype, learned=sort, bias=index % 4 > 0)
    check(case, device, numbers=200, cut=WIDE if alone else None)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (130, 33, 17), (64, 48, 32)], ids=str)
def test_every_number_of_tokens(
    tokens: int, sizes: tuple[int, int, int], device: torch.device
) -> None:
    dtype = list(DTYPES.values())[(tokens + sizes[0]) % 3]
    check(case_of(tokens, sizes, dtype=dtype), device, numbers=60 if tokens == 1 else 150)


@pytest.mark.parametrize("programs", [0.1, 6], ids=["whole", "divided"])
@pytest.mark.parametrize(("cut", "dtype"), in_turns(ALONE), ids=str)
def test_every_cut_of_one_token(
    cut: few.Cut, programs: float, dtype: torch.dtype, device: torch.device
) -> None:
    # Sums of several pieces, the last one not whole.
    d_model = 2 * 16 * cut.loads // dtype.itemsize + 72
    case = case_of(1, (d_model, 9, 6), dtype=dtype, down=programs > 1)
    check(case, device, cut=replace(cut, programs=programs), gap=None, numbers=30)


@pytest.mark.parametrize("programs", [0.1, 12], ids=["whole", "divided"])
@pytest.mark.parametrize("tokens", [5, 16])
@pytest.mark.parametrize(("cut", "dtype"), in_turns(TOGETHER), ids=str)
def test_every_cut_of_several_tokens(
    cut: few.Cut, tokens: int, programs: float, dtype: torch.dtype, device: torch.device
) -> None:
    piece = 16 * cut.loads // dtype.itemsize
    case = case_of(tokens, (2 * piece + 24, piece + 19, 70), dtype=dtype)
    gap = None if tokens == 5 else GAP
    check(case, device, cut=replace(cut, programs=programs), gap=gap, numbers=300)


@pytest.mark.parametrize("tokens", [1, 6, 16])
@pytest.mark.parametrize("gap", [None, 0, 8, 5], ids=["aligned", "packed", "rows aligned", "odd"])
def test_strides(tokens: int, gap: int | None, device: torch.device) -> None:
    check(case_of(tokens, (72, 24, 40), dtype=torch.bfloat16), device, gap=gap, numbers=60)


def test_a_bias_may_have_any_stride(device: torch.device) -> None:
    layer = draw(case_of(3, (16, 24, 32)))

    def spread(name: str, t: Tensor) -> Tensor:
        return torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0] if "bias" in name else t

    out = torch.full((3, 32), torch.nan, device=device)
    given = layer.mapped(lambda name, t: spread(name, t.detach().to(device)))
    few.feed_forward(given.x, given.weights, "swiglu", given.parameters, out)
    judge([out.cpu()], [layer])


@pytest.mark.parametrize("tokens", [1, 9])
def test_equal_calls_give_equal_bits(tokens: int, device: torch.device) -> None:
    layer = draw(case_of(tokens, (264, 8, 6)))
    cut = replace(WIDE, programs=20)
    assert same_bits(run(layer, device, cut), run(layer, device, cut))


# what is rejected

Constants = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """A kernel that is compiled for something wrong."""

    name: str
    kernel: Any
    wrong: Callable[[Constants], Constants]
    row: str = "swiglu"
    dtype: torch.dtype = torch.bfloat16


SUMS, JOIN = few_kernels.product, few_kernels.joined
FAULTS = (
    Fault("tanh for erf", SUMS, lambda _: {"PHI": "gelu_tanh"}, "geglu", torch.float32),
    Fault("no activation", SUMS, lambda _: {"PHI": "identity"}),
    Fault("a clamp dropped", SUMS, lambda _: {"PSI": "identity"}, "swiglu_clamp"),
    Fault("a bias dropped", SUMS, lambda _: {"GATE_BIAS": None}),
    Fault("the end of a sum skipped", SUMS, lambda c: {"DEEP": c["DEEP"] - 8}),
    Fault("the wrong row stride", SUMS, lambda c: {"UP": c["UP"] - 1}),
    Fault("rows skipped", SUMS, lambda c: {"ROWS": c["ROWS"] - 1}),
    Fault("a piece skipped", SUMS, lambda c: {"CHUNK": c["CHUNK"] - c["BLOCK_DEEP"]}),
    Fault("a part left out", JOIN, lambda c: {"SPLITS": c["SPLITS"] - 1}),
    Fault("a bias dropped at the end", JOIN, lambda _: {"UP_BIAS": None}),
)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_rejected(
    fault: Fault, tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = replace(WIDE, programs=60 if fault.kernel is JOIN else 0.1)
    case = case_of(tokens, (264, 24, 16), row=VARIANTS[fault.row], dtype=fault.dtype, down=False)
    layers = layers_of(case, 30 if fault.kernel is JOIN else 96)
    right, planted = Launch.__init__, []

    def faulty(self: Launch, kernel: Any, grid: Any, constants: Constants, **options: int) -> None:
        if kernel is fault.kernel:
            planted.append(fault.name)
            constants = constants | fault.wrong(constants)
        right(self, kernel, grid, constants, **options)

    judge([run(layer, device, cut, gap=None) for layer in layers], layers)
    few._prepared.cache_clear()
    monkeypatch.setattr(Launch, "__init__", faulty)
    found = [run(layer, device, cut, gap=None) for layer in layers]
    few._prepared.cache_clear()
    assert planted
    with pytest.raises(AssertionError, match=r"output(: the (largest|RMS) error| is nan)"):
        judge(found, layers)


def test_gate_and_up_swapped_are_rejected(device: torch.device) -> None:
    layers = layers_of(case_of(2, (40, 24, 16)), 100)

    def swapped(layer: Layer) -> Layer:
        w = layer.weights
        assert w.up is not None
        return replace(layer, weights=w._replace(gate=w.up, up=w.gate))

    with pytest.raises(AssertionError, match=r"output: the (largest|RMS) error"):
        judge([run(swapped(layer), device) for layer in layers], layers)


# calls


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80")],
    ids=str,
)
def test_a_chip_has_the_cuts_of_its_kind(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert few.chip.__wrapped__(0) == name
    for made in few.CUTS.values():
        assert set(made) == {(tokens, gate) for tokens in (1, 8, 16) for gate in (True, False)}
    assert set(few.CUTS) == set(few.MULTIPROCESSORS)


def test_float32_is_multiplied_as_pytorch_is_told(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Constants] = []
    right = Launch.__init__

    def noted(self: Launch, kernel: Any, grid: Any, constants: Constants, **options: int) -> None:
        made.append(constants)
        right(self, kernel, grid, constants, **options)

    monkeypatch.setattr(Launch, "__init__", noted)
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            settings.fp32_precision = precision
            for tokens in (1, 2):
                run(draw(case_of(tokens, (16, 4, 32), down=False)), device, WIDE)
    finally:
        settings.fp32_precision = before
    # One token is not multiplied as matrices are.
    assert [constants["PRECISION"] for constants in made] == ["ieee", "ieee", "tf32"]


needs_gpu = pytest.mark.skipif(
    gpu.interpreting() or not torch.cuda.is_available(), reason="there is no GPU"
)


def on_gpu(tokens: int, sizes: tuple[int, int, int]) -> tuple[Layer, Tensor]:
    layer = draw(case_of(tokens, sizes, dtype=torch.bfloat16))
    given = layer.mapped(lambda _, t: t.detach().to("cuda"))
    return given, torch.full((tokens, sizes[2]), torch.nan, dtype=torch.bfloat16, device="cuda")


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_cuda_graph_holds_the_launches(tokens: int) -> None:
    given, out = on_gpu(tokens, (512, 1408, 512))
    parameters: dict[str, Value] = dict(given.parameters)
    few.feed_forward(given.x, given.weights, "swiglu", parameters, out)
    graph, first = torch.cuda.CUDAGraph(), out.clone()
    with torch.cuda.graph(graph):
        few.feed_forward(given.x, given.weights, "swiglu", parameters, out)
    out.fill_(torch.nan)
    graph.replay()
    assert same_bits(first, out)


@needs_gpu
def test_a_weight_of_more_than_two_to_the_31_elements() -> None:
    rows, d_model = (1 << 19) + 3, 4096
    weight = torch.zeros(rows, d_model, dtype=torch.bfloat16, device="cuda")
    weight[-1], weight[0] = 1.0, 2.0
    x = torch.full((2, d_model), 2.0**-12, dtype=torch.bfloat16, device="cuda")
    for tokens in (1, 2):
        out = torch.full((tokens, rows), torch.nan, dtype=torch.bfloat16, device="cuda")
        weights = Weights(weight, None, None, None, None, None)
        few.feed_forward(x[:tokens], weights, "relu", {}, out)
        assert out[:, -1].eq(1.0).all()
        assert out[:, 0].eq(2.0).all()
        assert out[:, 1:-1].eq(0.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_it_runs_on_the_device_of_the_tensors() -> None:
    given, out = on_gpu(1, (64, 128, 64))
    few.feed_forward(given.x, given.weights, "swiglu", given.parameters, out)
    other = given.mapped(lambda _, t: t.to("cuda:1"))
    there = torch.full_like(out, torch.nan, device="cuda:1")
    few.feed_forward(other.x, other.weights, "swiglu", other.parameters, there)
    assert same_bits(out.cpu(), there.cpu())
