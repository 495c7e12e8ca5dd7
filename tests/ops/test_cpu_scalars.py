"""The compiled gating at every instruction-set level: numbers, special values and memory."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from support.cases import Inputs, cases, draw, dtypes, rows
from support.compare import (
    assert_matches,
    assert_same_special_values,
    at_least_a_unit,
    same_bits,
    unchanged,
    with_what_vanishes,
)
from support.gating import (
    Results,
    by_hand,
    by_reference,
    first_for_all,
    judge,
    learned_names,
    parameters_swapped,
    scaled,
    special_values,
)
from support.levels import LEVELS, amid_nans, every_level, guarded, needs_kernels
from support.mutants import MUTANTS, PARAMETER_IGNORED, of_shape
from torch import Tensor

from gatedffn.activations import SCALARS, Value
from gatedffn.ops import kernels
from gatedffn.ops.gating import cpu, parameter_gradient
from gatedffn.variants import VARIANTS, Variant

pytestmark = needs_kernels

SHAPE = (3, 1031)  # three blocks a row, the last of which ends within a vector
# One row of each kind: no gate, gate, learned parameters, two branches that saturate.
FEW = (("gelu", False), ("geglu_tanh", False), ("xielu", True), ("swiglu_oai", True))
few_rows = pytest.mark.parametrize(("name", "learned"), FEW, ids=[name for name, _ in FEW])

WITH_PARAMETERS = [row for row in VARIANTS.values() if row.parameters]
rows_with_parameters = pytest.mark.parametrize(
    "row", WITH_PARAMETERS, ids=[row.name for row in WITH_PARAMETERS]
)


def by_kernels(
    inputs: Inputs, level: str, *, gap: int = 0, described: kernels.Formula | None = None
) -> Results:
    """All that the two kernels write. Inputs and outputs lie amid NaNs; only outputs may change.

    "again" are the hidden values as the backward computes them.
    """
    if described is None:
        described = kernels.describe(inputs.row.name, dict(inputs.parameters))
    grad, gate = amid_nans(inputs.grad, gap), amid_nans(inputs.gate, gap)
    up = None if inputs.up is None else amid_nans(inputs.up, gap)
    rows, columns = gate.shape
    names = ["output", "again", "gate", *([] if up is None else ["up"])]
    places = {name: guarded(rows, columns, gate.dtype, gap) for name in names}
    made = {name: place.view for name, place in places.items()}
    with unchanged(*(t for t in (grad, gate, up) if t is not None)):
        cpu.run(described, gate, up, made["output"], level)
        sums = cpu.run_backward(
            described,
            grad,
            gate,
            up,
            made["gate"],
            made.get("up"),
            made["again"],
            learned_names(inputs),
            level,
        )
    for name, place in places.items():
        place.assert_intact(name)
    return made | {
        name: parameter_gradient(found, inputs.parameters[name]) for name, found in sums.items()
    }


# the table


def test_the_functions_of_the_table_are_those_of_the_kernels_at_every_level() -> None:
    for level in LEVELS:
        find = kernels.library(level).gatedffn_function
        assert [find(name.encode()) for name in SCALARS] == list(range(len(SCALARS))), level
        assert find(b"nothing") == find(b"") == find(b"swis") == find(b"swishh") == -1


@rows
def test_the_kernels_take_the_parameters_in_the_order_of_the_table(row: Variant) -> None:
    # The kernels differentiate by a parameter's place; this one says which place is whose.
    described = kernels.describe(row.name, dict(row.defaults))
    assert described.of_phi == SCALARS[row.phi].parameters
    assert len(described.of_phi) <= 2
    assert row.psi is None or len(SCALARS[row.psi].parameters) <= 1


# numbers


@cases
@dtypes
def test_values_slopes_and_parameter_gradients(
    row: Variant, learned: bool, dtype: torch.dtype
) -> None:
    inputs = draw(row, SHAPE, dtype, learned=learned)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    for level in LEVELS:
        judge(by_kernels(inputs, level, gap=5), truth, eager, level)


@pytest.mark.parametrize(
    "row", [row for row in VARIANTS.values() if row.parameters], ids=lambda row: row.name
)
def test_every_parameter_may_be_one_number_a_hidden_unit(row: Variant) -> None:
    inputs = draw(row, SHAPE, torch.float32)
    spread = torch.linspace(0.5, 1.5, SHAPE[1], dtype=torch.float64)
    parameters: dict[str, Value] = {name: spread * v for name, v in row.defaults.items()}
    inputs = replace(inputs, parameters=parameters).to(torch.float32)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    for level in LEVELS:
        judge(by_kernels(inputs, level), truth, eager, level)


@pytest.mark.parametrize(
    "row", [row for row in VARIANTS.values() if row.parameters], ids=lambda row: row.name
)
def test_a_number_and_as_many_equal_ones_give_the_same_bits(row: Variant) -> None:
    inputs = draw(row, SHAPE, torch.float32)
    expanded: dict[str, Value] = {n: torch.full(SHAPE[1:], v) for n, v in row.defaults.items()}
    single: dict[str, Value] = {n: torch.tensor([v]) for n, v in row.defaults.items()}
    for level in LEVELS:
        expected = by_kernels(inputs, level)
        for parameters in (expanded, single):
            found = by_kernels(replace(inputs, parameters=parameters), level)
            assert all(same_bits(found[name], value) for name, value in expected.items()), level


@rows
@dtypes
def test_branches_of_any_size(row: Variant, dtype: torch.dtype) -> None:
    """From subnormal numbers to the largest whose square is one, each row held to its own scale."""
    lowest, highest = (-22, 6) if dtype == torch.float16 else (-140, 60)
    scales = 2.0 ** torch.linspace(lowest, highest, 15, dtype=torch.float64)
    inputs = scaled(draw(row, (15, 257), dtype), scales)
    truth, eager = by_reference(inputs.to(torch.float64)), by_reference(inputs)
    for level in LEVELS:
        for name, result in by_kernels(inputs, level).items():
            assert_matches(result, truth[name], eager[name], f"{level} {name}", per_row=True)


# special values

# Where exponentials vanish, and polynomials and clamps begin.
EDGES = [0.34, 0.65, 1.0, 7.0, 10.0, 10.03, 10.1, 13.26, 13.3, 14.5, 25.0, 30.0]
EDGES += [87.2, 87.34, 88.0, 88.8, 89.0, 103.0, 104.0, 104.5]


def dense() -> Tensor:
    """A row of numbers of one sign for every power of 2, and one around each edge."""
    steps = torch.linspace(0.0, 1.0, 256, dtype=torch.float64)
    powers = 2.0 ** torch.arange(-8, 60).double()[:, None] * (1.0 + steps)
    edges = torch.tensor(EDGES, dtype=torch.float64)[:, None] * (0.5 + steps)
    rows = torch.cat([powers, edges]).float()
    return torch.cat([rows, -rows])


def judge_special_values(inputs: Inputs) -> None:
    # What overflows float32 would be finite in float64, so the definition computes in float32.
    expected = by_reference(inputs)
    for level in LEVELS:
        results = by_kernels(inputs, level)
        for name in set(results) - set(learned_names(inputs)):
            assert_same_special_values(results[name], expected[name].double(), f"{level} {name}")


@cases
@dtypes
def test_infinities_and_nans_are_where_the_definition_has_them(
    row: Variant, learned: bool, dtype: torch.dtype
) -> None:
    special = special_values(dtype)
    count = len(special)
    pairs = special[:, None].expand(count, count)
    parameters = draw(row, (count, count), torch.float32, learned=learned).parameters
    up = pairs.t() if row.gated else None
    grad = torch.ones(count, count, dtype=dtype)
    judge_special_values(Inputs(row, pairs, up, parameters, grad))


@rows
@dtypes
def test_where_exponentials_vanish_and_overflow(row: Variant, dtype: torch.dtype) -> None:
    # By itself: there an infinite other branch meets a number that may be 0 or the smallest.
    gate = torch.tensor([EDGES, [-edge for edge in EDGES]], dtype=dtype)
    ones = torch.ones_like(gate)
    inputs = Inputs(row, gate, ones if row.gated else None, row.defaults, ones)
    judge_special_values(inputs)
    if row.gated:
        judge_special_values(replace(inputs, gate=ones, up=gate))


@cases
def test_densely_and_on_both_sides_of_every_edge(row: Variant, learned: bool) -> None:
    """Rows of one sign, each held to its own scale: a tail is told from no tail."""
    x = dense()
    ones = torch.ones_like(x)
    # One hidden unit a number, so that a parameter's gradient is the derivative there.
    drawn = draw(row, (1, x.numel()), torch.float32, learned=learned)
    branches = [(x, ones), (ones, x)] if row.gated else [(x, None)]
    for gate, up in branches:
        inputs = replace(
            drawn,
            gate=gate.view(1, -1),
            up=None if up is None else up.view(1, -1),
            grad=ones.view(1, -1),
        )
        truth, eager = by_reference(inputs.to(torch.float64)), by_reference(inputs)
        names = learned_names(inputs) or list(truth)
        for level in LEVELS:
            results = by_kernels(inputs, level)
            for name in names:
                seen, true, near = (t.view_as(x) for t in (results[name], truth[name], eager[name]))
                near, seen = at_least_a_unit(near, true), with_what_vanishes(seen, true)
                assert_matches(seen, true, near, f"{level} {name}", per_row=True)


@rows
def test_a_nan_stays_one_through_value_and_slope(row: Variant) -> None:
    nan = torch.full((1, 17), torch.nan)
    inputs = Inputs(row, nan, nan if row.gated else None, row.defaults, torch.ones(1, 17))
    constant_slope = {"identity"}
    for level in LEVELS:
        results = by_kernels(inputs, level)
        assert results["output"].isnan().all()
        assert results["again"].isnan().all()
        assert row.phi in constant_slope or results["gate"].isnan().all()


# memory


def of_columns(parameters: Mapping[str, Value], columns: slice) -> dict[str, Value]:
    return {n: v[columns] if isinstance(v, Tensor) else v for n, v in parameters.items()}


WIDTHS = (1, 15, 16, 17, 511, 513, 1031)


@few_rows
@dtypes
@every_level
def test_any_width_and_row_stride_gives_the_bits_of_whole_rows(
    name: str, learned: bool, dtype: torch.dtype, level: str
) -> None:
    whole = draw(VARIANTS[name], (3, 2 * WIDTHS[-1]), dtype, learned=learned)
    expected = by_kernels(whole, level)
    for width in WIDTHS:
        for columns in (slice(0, width), slice(width, 2 * width)):
            part = Inputs(
                whole.row,
                whole.gate[:, columns],
                None if whole.up is None else whole.up[:, columns],
                of_columns(whole.parameters, columns),
                whole.grad[:, columns],
            )
            for key, result in by_kernels(part, level, gap=width).items():
                wide = expected[key][..., columns]
                assert same_bits(result, wide), (width, columns, key)


@few_rows
@every_level
def test_a_gradient_may_take_the_place_of_the_incoming_one(
    name: str, learned: bool, level: str
) -> None:
    inputs = draw(VARIANTS[name], (2, 513), torch.bfloat16, learned=learned)
    expected = by_kernels(inputs, level)
    described = kernels.describe(name, dict(inputs.parameters))
    gate = inputs.gate.detach()
    up = None if inputs.up is None else inputs.up.detach()
    for place in set(expected) - {"output", *learned_names(inputs)}:
        grad = inputs.grad.clone()
        into = {"gate": None, "up": None, "again": None} | {place: grad}
        cpu.run_backward(
            described, grad, gate, up, into["gate"], into["up"], into["again"],
            [], level,
        )  # fmt: skip
        assert same_bits(grad, expected[place]), place


@few_rows
@every_level
@pytest.mark.parametrize("shape", [(5, 1031), (1, 17)], ids=["uneven_shares", "idle_threads"])
def test_several_threads_give_the_bits_of_one(
    name: str, learned: bool, level: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(VARIANTS[name], shape, torch.float32, learned=learned)
    monkeypatch.setattr(kernels, "threads", lambda *_: 1)
    by_one = by_kernels(inputs, level)
    monkeypatch.setattr(kernels, "threads", lambda *_: 4)
    for key, result in by_kernels(inputs, level).items():
        if key in learned_names(inputs):
            # Float64 sums in another order, which float32 tells apart at most in the last place.
            eps = torch.finfo(torch.float32).eps
            torch.testing.assert_close(result, by_one[key], rtol=eps, atol=0.0)
        else:
            assert same_bits(result, by_one[key]), key


# faults that this comparison must see


@dtypes
def test_known_faults_are_rejected(dtype: torch.dtype) -> None:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for mutant in of_shape([*MUTANTS, PARAMETER_IGNORED], SHAPE, name):
        learned = mutant is PARAMETER_IGNORED
        inputs = draw(VARIANTS[mutant.rows[-1]], SHAPE, dtype, learned=learned)
        truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
        wrong = {key: value for key, value in mutant.wrong(inputs).items() if key in truth}
        with pytest.raises(AssertionError):
            judge(dict(wrong), truth, eager, mutant.name)


@every_level
def test_faults_in_what_a_kernel_is_told_are_rejected(level: str) -> None:
    inputs = draw(VARIANTS["xielu"], SHAPE, torch.float32, learned=True)
    uneven: dict[str, Value] = {**inputs.parameters, "alpha_n": inputs.parameters["alpha_n"] * 0.5}
    inputs = replace(inputs, parameters=uneven)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    judge(by_kernels(inputs, level), truth, eager, level)
    for fault in (first_for_all, parameters_swapped):
        told = kernels.describe("xielu", dict(fault(inputs).parameters))
        results = by_kernels(inputs, level, described=told)
        for key in ("output", "again", "gate"):
            with pytest.raises(AssertionError):
                judge({key: results[key]}, truth, eager, fault.__name__)
