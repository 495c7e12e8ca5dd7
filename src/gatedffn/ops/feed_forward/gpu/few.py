"""The layer for few tokens: bound by reading the weights, which are read once.

    hidden = phi(x W_gate^T + b) * psi(x W_up^T + b)       y = hidden W_down^T + b

Two launches make it: the hidden values (gate and up together, the activation at the end), and the
product with W_down, which is the same kernel with the identity for phi. Sums are float32; gate and
up are not rounded, the hidden values are, to the dtype of `x`, as PyTorch's are.

A program takes some rows of a weight. One token is multiplied and summed as the weights come in;
more are padded to 8 or 16 and meet the rows in matrix multiplications. What it takes to read at the
memory's rate is enough bytes under way, the rate times the latency: 3.4 MB on an H200. So loads are
of 16 bytes, several of them under way in each thread, and there are several programs to a
multiprocessor. Where a weight has too few rows for that, its sums are split between programs and
the parts added up in a fixed order by a kernel of its own: equal calls give equal bits.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import few_kernels as kernels
from gatedffn.ops.feed_forward.gpu.launch import Launch
from gatedffn.ops.feed_forward.reference import Weights

MOST_TOKENS = 16
WIDEST = 16  # bytes of a load
SHORTEST = 12  # pieces of a sum below which its parts cost more than they save

# The table


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut: what a program takes at a time, and how many programs there should be.

    By rule it is reckoned from bytes under way, registers and shared memory.
    """

    rows: int
    loads: int  # of 16 bytes, of each row at a time
    warps: int
    stages: int  # pieces that are on their way through shared memory; 1: straight to registers
    unroll: int  # pieces at a time where there is one stage
    programs: float  # for each multiprocessor; where there are fewer, rows or sums are divided


Use = tuple[int, bool]
"""What a cut is for: tokens (1, or padded to 8 or 16), and whether there is a gate."""

_HOPPER: Mapping[Use, Cut] = {
    (1, True): Cut(rows=2, loads=128, warps=4, stages=1, unroll=4, programs=4),
    (1, False): Cut(rows=4, loads=128, warps=4, stages=1, unroll=2, programs=4),
    (8, True): Cut(rows=32, loads=16, warps=2, stages=4, unroll=1, programs=1.5),
    (8, False): Cut(rows=64, loads=16, warps=2, stages=4, unroll=1, programs=4),
    (16, True): Cut(rows=64, loads=8, warps=2, stages=4, unroll=1, programs=1.5),
    (16, False): Cut(rows=64, loads=16, warps=2, stages=4, unroll=1, programs=3),
}
# Less shared memory, and less of it is needed.
_AMPERE = {use: replace(cut, stages=min(cut.stages, 3)) for use, cut in _HOPPER.items()}

CUTS: Mapping[str, Mapping[Use, Cut]] = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
}
"""The cuts by chip; a chip without any takes those of sm_80, which all can run. Those of its
other uses are raced with the one that is for a use.
"""
MULTIPROCESSORS: Mapping[str, int] = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
JOINED_ROWS = 256  # rows of a program that adds parts up


@functools.cache
def chip(index: int) -> str:
    """The name in the table for a device; -1 is Triton's interpreter."""
    if index < 0:
        return "sm_90"
    if torch.version.hip is not None:
        return "sm_80"
    major, _ = torch.cuda.get_device_capability(index)
    return name if (name := f"sm_{major}0") in CUTS else "sm_80"


# The layer


def feed_forward(
    x: Tensor,
    weights: Weights,
    variant: str,
    parameters: Mapping[str, Value],
    out: Tensor,
    cut: Cut | None = None,
) -> None:
    """Writes the layer of the tokens `x`, which are rows, to `out`, whose last stride is 1.

    Without W_down that is the hidden values. `cut` is taken for both products in place of the
    table's. It is for 1 to MOST_TOKENS tokens, weights by rows, and all tensors but those of the
    parameters of one dtype.
    """
    gate, up, down, gate_bias, up_bias, down_bias = weights
    first = (gate, up, gate_bias, up_bias, gpu.describe(variant, parameters))
    with gpu.on_device_of(x):
        if down is None:
            _multiply(x, *first, out, cut)
            return
        hidden = x.new_empty(x.shape[0], gate.shape[0])
        _multiply(x, *first, hidden, cut)
        _multiply(hidden, down, None, down_bias, None, _IDENTITY, out, cut)


_IDENTITY = gpu.Formula("identity", None, (), (gpu.ABSENT, gpu.ABSENT, gpu.ABSENT))


def _multiply(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    formula: gpu.Formula,
    out: Tensor,
    cut: Cut | None,
) -> None:
    """`out = phi(x gate^T + bias) * psi(x up^T + bias)`."""
    tokens, deep = x.shape
    if cut is None:
        again = partial(_multiply, x, gate, up, gate_bias, up_bias, formula, out)
        cut = _cut(x, gate.shape[0], up is not None, again)
    device, dtype = x.get_device(), x.dtype
    apart = x.stride(0) if tokens > 1 else 0
    unit = math.gcd(apart, WIDEST // dtype.itemsize)
    (p0, step0), (p1, step1), (p2, step2) = formula.places
    made = _prepared(
        device,
        dtype,
        tokens,
        gate.shape[0],
        deep,
        (gate.stride(0), None if up is None else up.stride(0)),
        (_stride(gate_bias), _stride(up_bias)),
        (formula.phi, formula.psi),
        (step0, step1, step2),
        # What Triton compiles for besides.
        (
            x.data_ptr() % WIDEST,
            gate.data_ptr() % WIDEST,
            0 if up is None else up.data_ptr() % WIDEST,
        ),
        (
            None if step0 is None else p0.dtype,  # type: ignore[union-attr]  # a step is a tensor's
            None if step1 is None else p1.dtype,  # type: ignore[union-attr]
            None if step2 is None else p2.dtype,  # type: ignore[union-attr]
        ),
        unit,
        "ieee" if dtype != torch.float32 or tokens == 1 or gpu.kind_of(dtype) != "tf32" else "tf32",
        cut,
    )
    rest = (gate_bias, up_bias, p0, p1, p2)
    units = apart // unit
    if made.join is None:
        made.sums(device, x, gate, up, *rest, out, tokens, units, out.stride(0))
        return
    parts = torch.empty(made.parts, dtype=torch.float32, device=x.device)
    made.sums(device, x, gate, up, *rest, parts, tokens, units, 0)
    made.join(device, parts, *rest, out, tokens, out.stride(0))


_cuts: dict[tuple[object, ...], Cut] = {}


def _cut(x: Tensor, rows: int, gated: bool, run: Callable[[Cut], object]) -> Cut:
    """The cut of a product, by `run` the best of the candidates."""
    tokens, deep = x.shape
    key = x.device, x.dtype, _padded(tokens), rows, deep, gated
    found = _cuts.get(key)
    if found is None:
        words = f"{_padded(tokens)} tokens, {deep} -> {rows}, {'gated' if gated else 'not gated'}"
        name = f"cuts of few, {x.dtype}, {words}"
        among = candidates(chip(x.get_device()), (_padded(tokens), gated))
        best, lasting = gpu.raced(name, among, run, x.device)
        if not lasting:
            return best
        found = _cuts[key] = best
    return found


@functools.cache
def candidates(name: str, use: Use) -> dict[str, Cut]:
    """Those of a chip for a use, by name: its own first, and others for as many tokens."""
    others = [cut for other, cut in CUTS[name].items() if (other[0] == 1) == (use[0] == 1)]
    return {
        ", ".join(f"{n} {v}" for n, v in asdict(cut).items()): cut
        for cut in dict.fromkeys((CUTS[name][use], *others))
    }


def _padded(tokens: int) -> int:
    return 1 if tokens == 1 else 8 if tokens <= 8 else 16


def _stride(bias: Tensor | None) -> int | None:
    return None if bias is None else bias.stride(0)


class Launches(NamedTuple):
    """The launches of a product: all of it, or its sums and what joins their parts."""

    sums: Launch
    join: Launch | None
    parts: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _prepared(
    device: int,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
    deep: int,
    strides: tuple[int, int | None],
    biases: tuple[int | None, int | None],
    functions: tuple[str, str | None],
    steps: tuple[int | None, int | None, int | None],
    addresses: tuple[int, int, int],
    dtypes: tuple[torch.dtype | None, ...],  # noqa: ARG001
    unit: int,
    precision: str,
    cut: Cut,
) -> Launches:
    """The launches for all calls that are alike in this, for each of which Triton compiles."""
    gated = functions[1] is not None
    padded, name = _padded(tokens), chip(device)
    vector = math.gcd(WIDEST // dtype.itemsize, deep, *(s for s in strides if s))
    if any(addresses):
        vector = 1
    shortest = vector if tokens == 1 else 16  # values that a matrix multiplication sums
    block_deep = max(shortest, min(cut.loads * vector, triton.next_power_of_2(deep)))
    wanted = int(cut.programs * MULTIPROCESSORS[name])
    block_rows = cut.rows
    while tokens == 1 and block_rows > 1 and triton.cdiv(rows, block_rows) < wanted:
        block_rows //= 2
    programs, pieces = triton.cdiv(rows, block_rows), triton.cdiv(deep, block_deep)
    splits = max(1, min(wanted // programs, pieces // SHORTEST))
    chunk = triton.cdiv(pieces, splits)
    splits = triton.cdiv(pieces, chunk)
    of_both = {
        "ROWS": rows,
        **dict(zip(("GATE_BIAS", "UP_BIAS"), biases, strict=True)),
        **dict(zip(("PHI", "PSI"), functions, strict=True)),
        **dict(zip(("STEP0", "STEP1", "STEP2"), steps, strict=True)),
        "SPLITS": splits,
    }
    of_sums = {
        **of_both,
        **dict(zip(("GATE", "UP"), strides, strict=True)),
        **{"DEEP": deep, "X_UNIT": unit, "PRECISION": precision, "TOKENS": padded},
        **{"VECTOR": vector, "BLOCK_ROWS": block_rows, "BLOCK_DEEP": block_deep},
        **{"CHUNK": chunk * block_deep, "STAGES": cut.stages, "UNROLL": cut.unroll},
    }
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    sums = Launch(kernels.product, (programs, splits, 1), of_sums, **options)
    if splits == 1:
        return Launches(sums, None, ())
    grid = (triton.cdiv(rows, JOINED_ROWS), tokens, 1)
    join = Launch(kernels.joined, grid, {**of_both, "BLOCK_ROWS": JOINED_ROWS}, num_warps=4)
    return Launches(sums, join, (splits, 1 + gated, tokens, rows))
