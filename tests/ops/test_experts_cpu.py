"""The experts' own kernel at every instruction-set level: numbers, and the memory it touches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import DTYPES, dtypes
from support.compare import assert_matches, same_bits, unchanged
from support.eager import eager_gating
from support.levels import (
    LEVELS,
    Guarded,
    amid_nans,
    at,
    every_level,
    guarded_outputs,
    guarded_scratch,
    needs_kernels,
)
from torch import Tensor

from gatedffn import functional
from gatedffn.activations import Value
from gatedffn.errors import ShapeError
from gatedffn.ops import kernels
from gatedffn.ops.experts import forward
from gatedffn.ops.gating.reference import branches
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels

Sizes = tuple[int, int, int]  # d_model, d_hidden, d_out
Loads = tuple[tuple[int, ...], int]  # tokens of each expert, and slots whose expert is not here
# Around the sizes of vectors, of tiles and of blocks of rows; the last are whole tiles.
SIZES: tuple[Sizes, ...] = ((1, 1, 1), (7, 31, 5), (33, 67, 131), (320, 288, 65), (64, 96, 160))
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
# Every core in one call.
LOADS: Loads = (1, 0, 3, 5, 16, 17, 33, 40), 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How a case is drawn. `by_columns`: weights as (in, out) storage has them."""

    variant: str = "swiglu"
    bias: bool = True
    order: str | None = None
    weigh: str = "output"
    by_columns: bool = False
    learned: int = 0  # values of a learned parameter


KINDS = {
    "plain": Kind(bias=False),
    "bias-packed": Kind(variant="swiglu_oai", order="interleaved"),
    "halves-unit": Kind(order="up_gate", bias=False, learned=2),
    "not_gated-input": Kind(variant="gelu", weigh="input"),
    "columns": Kind(variant="geglu", by_columns=True, order="gate_up"),
    "columns-packed-input": Kind(by_columns=True, order="interleaved", weigh="input"),
    "not_gated-learned": Kind(variant="xielu", learned=1),
}


@dataclass(frozen=True, slots=True)
class Case:
    """The operands of a call, by name, and its options."""

    kind: Kind
    tensors: dict[str, Any]  # None where there is none
    parameters: dict[str, Value]

    def to(self, dtype: torch.dtype) -> "Case":
        made = {
            name: t.to(dtype) if t is not None and t.is_floating_point() else t
            for name, t in self.tensors.items()
        }
        return replace(self, tensors=made)

    def changed(self, **tensors: Tensor) -> "Case":
        return replace(self, tensors=self.tensors | tensors)

    def run(self, backend: str = "own") -> Tensor:
        kind = self.kind
        options = {"variant": kind.variant, "order": kind.order, "weigh": kind.weigh}
        given: dict[str, Any] = {**self.tensors, **options, **self.parameters}
        return functional.experts(**given, backend=backend)


@lru_cache(maxsize=8)
def draw(kind: Kind, size: Sizes, dtype: torch.dtype, loads: Loads = LOADS) -> Case:
    """A call in which each expert has so many tokens; some tokens name an expert twice."""
    (d_model, d_hidden, d_out), (counts, skipped) = size, loads
    generator = torch.Generator().manual_seed(sum(size))
    row = VARIANTS[kind.variant]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weight(rows: int, columns: int) -> Tensor:
        shape = (columns, rows) if kind.by_columns else (rows, columns)
        made = amid_nans((normal(len(counts) * shape[0], shape[1]) / columns**0.5).to(dtype))
        parts = made.as_strided((len(counts), *shape), (shape[0] * made.stride(0), *made.stride()))
        return parts.transpose(1, 2) if kind.by_columns else parts

    def bias(width: int) -> Tensor | None:
        return amid_nans(normal(len(counts), width).to(dtype)) if kind.bias else None

    named = [e for e, n in enumerate((*counts, skipped)) for _ in range(n)]
    slots = 2 if len(named) % 2 == 0 else 1
    order = torch.randperm(len(named), generator=generator)
    index = torch.tensor(named)[order].view(-1, slots)
    weights = torch.rand(index.shape, generator=generator) + 0.5
    wide = 2 * d_hidden if kind.order else d_hidden
    first = weight(wide, d_model)
    second = weight(d_hidden, d_model) if row.gated and not kind.order else None
    first_bias, second_bias = bias(wide), bias(d_hidden) if second is not None else None
    gate, up = (first, second) if row.gated else (None, first)
    gate_bias, up_bias = (first_bias, second_bias) if row.gated else (None, first_bias)
    x = normal(len(index), d_model) * row.defaults.get("limit", 1.0)
    parameters: dict[str, Value] = dict(row.defaults)
    if kind.learned:
        name = next(p.name for p in row.parameters if p.learnable)
        count = d_hidden if kind.learned > 1 else 1
        parameters[name] = torch.linspace(0.8, 1.0, count)
    return Case(
        kind,
        {
            **{"x": amid_nans(x.to(dtype)), "index": index, "weights": weights},
            **{"gate_weight": gate, "up_weight": up, "down_weight": weight(d_out, d_hidden)},
            **{"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": bias(d_out)},
        },
        parameters,
    )


def by_hand(case: Case) -> dict[str, Tensor]:
    """The output by a loop over tokens and slots in float64, and gate and up in the order in which
    they are kept.
    """
    kind, row = case.kind, VARIANTS[case.kind.variant]
    of = case.to(torch.float64).tensors
    gates, ups = of["gate_weight"], of["up_weight"]
    gate_biases, up_biases = of["gate_bias"], of["up_bias"]
    if kind.order:
        gates, ups = branches(gates, 1, kind.order)
        if kind.bias:
            gate_biases, up_biases = branches(gate_biases, 1, kind.order)
    if not row.gated:
        gates, ups, gate_biases, up_biases = ups, None, up_biases, None
    x, index, weights, down = (of[n] for n in ("x", "index", "weights", "down_weight"))
    if kind.weigh == "input":
        weights = case.tensors["weights"]
    y = x.new_zeros(len(x), down.shape[1])
    kept: list[tuple[int, Tensor, Tensor | None]] = []
    for s in range(len(x)):
        for k in range(index.shape[1]):
            e = int(index[s, k])
            if e >= len(down):
                continue
            given = x[s]
            if kind.weigh == "input":  # which is rounded, as what it is in the definition
                given = (x[s].float() * weights[s, k].float()).to(case.tensors["x"].dtype).double()
            one = [None if b is None else b[e] for b in (gate_biases, up_biases, of["down_bias"])]
            gate = F.linear(given, gates[e], one[0])
            up = None if ups is None else F.linear(given, ups[e], one[1])
            parameters = {
                n: v.double() if isinstance(v, Tensor) else v for n, v in case.parameters.items()
            }
            hidden = eager_gating(gate, up, row, parameters)
            made = F.linear(hidden, down[e], one[2])
            y[s] += made if kind.weigh == "input" else made * weights[s, k]
            kept.append((e, gate, up))
    kept.sort(key=lambda each: each[0])
    return {
        "output": y,
        "gate": torch.stack([gate for _, gate, _ in kept]),
        **({} if ups is None else {"up": torch.stack([up for *_, up in kept if up is not None])}),
    }


@pytest.fixture(autouse=True)
def guards() -> Iterator[list[Guarded]]:
    """Outputs lie amid NaNs and are NaN before; scratch memory lies between canaries, NaN too."""
    with guarded_outputs(forward) as places, guarded_scratch() as scratches:
        yield places
    assert bool(places) == bool(scratches), "no scratch memory was guarded"


def judge(case: Case, levels: tuple[str, ...] = LEVELS) -> None:
    """Every level against float64, as near as the definition in the dtype of the case."""
    truth = by_hand(case)["output"]
    eager = case.run("definition")
    operands = [t for t in case.tensors.values() if t is not None]
    for level in levels:
        with at(level), unchanged(*operands):
            assert_matches(case.run(), truth, eager, level)


@dtypes
@sizes
def test_every_core_at_once(size: Sizes, dtype: torch.dtype) -> None:
    place = SIZES.index(size) + 2 * list(DTYPES.values()).index(dtype)
    judge(draw(list(KINDS.values())[place % len(KINDS)], size, dtype))


@dtypes
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_kind(kind: Kind, dtype: torch.dtype) -> None:
    judge(draw(kind, (33, 67, 131), dtype))


# The longest loads are cut into parts and, with one thread more often, into groups.
MANY: Loads = (300, 5, 40, 600), 1


@dtypes
@every_level
@pytest.mark.parametrize(("size", "loads"), [((33, 67, 131), LOADS), ((24, 1100, 70), MANY)])
def test_threads_give_the_bits_of_one(
    size: Sizes, loads: Loads, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(KINDS["bias-packed"], size, dtype, loads)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(kernels, "threads", lambda *_, threads=threads: threads)
        with at(level):
            found.append(case.run())
    assert all(same_bits(found[0], other) for other in found[1:])


@dtypes
def test_many_tokens(dtype: torch.dtype) -> None:
    judge(draw(KINDS["bias-packed"], (24, 1100, 70), dtype, MANY))


@dtypes
@pytest.mark.parametrize("loads", [((0, 1), 0), ((0, 2, 0), 0), ((0, 37), 2), ((3, 0), 30)])
def test_few_pairs(loads: Loads, dtype: torch.dtype) -> None:
    judge(draw(KINDS["not_gated-input"], (300, 67, 130), dtype, loads))


@dtypes
@every_level
def test_slots_without_an_expert_give_nothing(dtype: torch.dtype, level: str) -> None:
    case = draw(KINDS["plain"], (33, 67, 131), dtype, ((0, 0), 6))
    weights = torch.full_like(case.tensors["weights"], torch.nan)
    with at(level):
        assert case.changed(weights=weights).run().eq(0.0).all()


@dtypes
@pytest.mark.parametrize("kind", ["bias-packed", "not_gated-input", "columns"])
def test_what_is_kept(kind: str, dtype: torch.dtype) -> None:
    case = draw(KINDS[kind], (33, 67, 131), dtype)
    truth = by_hand(case)
    learning = case.changed(x=case.tensors["x"].detach().requires_grad_())

    def kept(backend: str) -> dict[str, Tensor]:
        output = learning.run(backend)
        saved = output.grad_fn.saved_tensors[1 - len(truth) :]  # type: ignore[union-attr]
        return dict(zip(truth, (output, *saved), strict=True))

    eager = kept("linear")
    for level in LEVELS:
        with at(level):
            found = kept("own")
            assert same_bits(found["output"], case.run()), level
        for name, true in truth.items():
            rows = slice(len(true))
            assert_matches(found[name][rows], true, eager[name][rows], f"{name} {level}")
            assert found[name][len(true) :].isnan().all(), "a slot without an expert was written"


@dtypes
def test_known_mistakes_are_rejected(dtype: torch.dtype) -> None:
    case = draw(KINDS["bias-packed"], (33, 67, 131), dtype)
    truth, eager = by_hand(case)["output"], case.run("definition")
    index, weights = (case.tensors[name] for name in ("index", "weights"))
    last = torch.arange(len(index)).unsqueeze(1) == len(index) - 1
    swapped = torch.where(index < 8, index ^ 1, index)
    for name, mutant in {
        "experts swapped": case.changed(index=swapped),
        "weighed twice": case.changed(weights=weights.square()),
        "the last token dropped": case.changed(weights=weights.where(~last, 0.0)),
        "not weighed": case.changed(weights=torch.ones_like(weights)),
    }.items():
        with pytest.raises(AssertionError):
            assert_matches(mutant.run(), truth, eager, name)
    assert_matches(case.run(), truth, eager)


def test_a_negative_expert_raises() -> None:
    case = draw(KINDS["plain"], (7, 31, 5), torch.float32)
    with pytest.raises(ShapeError, match="index holds -1: experts count from 0"):
        case.changed(index=case.tensors["index"].clone().fill_(-1)).run()
    case.run()


def test_other_dtypes_of_routing_and_rows_that_lie_apart() -> None:
    case = draw(KINDS["plain"], (33, 67, 131), torch.float32)
    index, weights, x = (case.tensors[name] for name in ("index", "weights", "x"))
    wide = torch.stack((index, index), -1).to(torch.int32)[..., 0]
    apart = x.new_full((len(x), 2, 33), torch.nan)
    apart[:, 0] = x
    other = case.changed(index=wide, weights=weights.double(), x=apart[:, 0])
    assert same_bits(other.run(), case.run())
