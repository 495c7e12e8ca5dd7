"""The comparator itself: it accepts the truth and rejects every known fault."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import DTYPES, SHAPES, Inputs, draw, dtypes, rows, shapes, with_gradients
from support.compare import assert_matches, same_bits, unchanged
from support.mutants import MUTANTS, PARAMETER_IGNORED, Fault, Mutant, Results, linear, of_shape
from torch import Tensor

import gatedffn
from gatedffn.variants import VARIANTS, Variant

Shape = tuple[int, ...]


def judge(results: Results, inputs: Inputs) -> None:
    truth = dict(with_gradients(inputs.to(torch.float64), by_hand=True))
    by_hand = dict(with_gradients(inputs, by_hand=True))
    for name, result in results.items():
        assert_matches(result, truth[name], by_hand[name], name)


def mutant_cases(*mutants: Mutant) -> list[object]:
    return list(_mutant_cases(mutants))


def _mutant_cases(mutants: Iterable[Mutant]) -> Iterator[object]:
    # Not at the shape of one element: there a wrong formula can happen to be right.
    for shape_name, shape in SHAPES.items():
        for dtype in DTYPES if shape_name != "single" else ():
            for mutant in of_shape(mutants, shape, dtype):
                for row in mutant.rows:
                    label = f"{mutant.name.replace(' ', '_')}-{row}-{dtype}-{shape_name}"
                    yield pytest.param(mutant, VARIANTS[row], DTYPES[dtype], shape, id=label)


@rows
@dtypes
@shapes
def test_the_rounded_truth_is_accepted(row: Variant, dtype: torch.dtype, shape: Shape) -> None:
    inputs = draw(row, shape, dtype)
    truth = with_gradients(inputs.to(torch.float64), by_hand=True)
    judge({name: value.to(dtype) for name, value in truth}, inputs)


@pytest.mark.parametrize(("mutant", "row", "dtype", "shape"), mutant_cases(*MUTANTS))
def test_mutant_is_rejected(mutant: Mutant, row: Variant, dtype: torch.dtype, shape: Shape) -> None:
    inputs = draw(row, shape, dtype)
    with pytest.raises(AssertionError):
        judge(mutant.wrong(inputs), inputs)


@pytest.mark.parametrize(("mutant", "row", "dtype", "shape"), mutant_cases(PARAMETER_IGNORED))
def test_ignored_parameters_are_rejected(
    mutant: Mutant, row: Variant, dtype: torch.dtype, shape: Shape
) -> None:
    inputs = draw(row, shape, dtype)
    doubled: dict[str, float] = {name: 2.0 * v + 0.1 for name, v in row.defaults.items()}
    changed = replace(inputs, parameters=doubled)
    with pytest.raises(AssertionError):
        judge(mutant.wrong(changed), changed)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        pytest.param("bias forgotten", dtype, id=f"bias_forgotten-{name}")
        for name, dtype in DTYPES.items()
    ]
    + [pytest.param("bf16 sum", torch.bfloat16, id="bf16_sum-bf16")],
)
def test_faulty_projection_is_rejected(fault: Fault, dtype: torch.dtype) -> None:
    features = 256
    x, weight = torch.randn(5, features), torch.randn(63, features) / features**0.5
    x, weight, bias = x.to(dtype), weight.to(dtype), torch.randn(63).to(dtype)
    truth = linear(x.double(), weight.double(), bias.double(), "none")
    right = linear(x, weight, bias, "none")
    assert_matches(right, truth, right)
    with pytest.raises(AssertionError):
        assert_matches(linear(x, weight, bias, fault), truth, right)


def test_an_overwritten_tensor_is_noticed() -> None:
    saved = torch.tensor([1.0, torch.nan, 0.0])
    with unchanged(saved):
        saved.add(1.0)
    with pytest.raises(AssertionError, match="overwritten"), unchanged(saved):
        saved[2] = -0.0


def truth_and_rounded() -> tuple[Tensor, Tensor]:
    truth = torch.randn(4, 8, dtype=torch.float64)
    return truth, truth.float()


def test_message_names_the_worst_place_and_both_values() -> None:
    truth, actual = truth_and_rounded()
    eager = actual.clone()
    actual[2, 3] = 7.0
    message = rf"flat index 19: 7\.0 in place of {truth[2, 3].item()}"
    with pytest.raises(AssertionError, match=message):
        assert_matches(actual, truth, eager)


def test_one_unit_of_a_small_row_is_seen_only_per_row() -> None:
    truth, _ = truth_and_rounded()
    truth[1] *= 1e-6
    eager = truth.float()
    actual = eager.clone()
    actual[1] *= 1.001
    assert_matches(actual, truth, eager)
    with pytest.raises(AssertionError, match="row 1"):
        assert_matches(actual, truth, eager, per_row=True)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("right", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_special_values_must_be_in_their_places(right: float, wrong: float) -> None:
    truth, actual = truth_and_rounded()
    truth[0, 0], actual[0, 0] = right, right
    assert_matches(actual, truth, actual)
    if repr(right) != repr(wrong):
        actual[0, 0] = wrong
        with pytest.raises(AssertionError, match="wrong places"):
            assert_matches(actual, truth, actual)


def test_all_zero_truth_allows_nothing_else() -> None:
    truth, zero = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    assert_matches(zero, truth, zero)
    with pytest.raises(AssertionError):
        assert_matches(zero + 1e-30, truth, zero)


def test_shapes_and_dtypes_must_agree() -> None:
    truth, actual = truth_and_rounded()
    with pytest.raises(AssertionError, match="not float64"):
        assert_matches(actual, truth.float(), actual)
    with pytest.raises(AssertionError, match="eager PyTorch"):
        assert_matches(actual, truth, actual.half())
    with pytest.raises(AssertionError, match=r"\(1, 8\)"):
        assert_matches(actual[:1], truth, actual)


def test_same_bits_tells_zeros_apart_and_takes_nans() -> None:
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2).double())


@pytest.mark.parametrize(
    "call",
    [
        "torch.empty(3)",
        "torch.empty_like(torch.ones(3))",
        "torch.empty_strided((3,), (1,))",
        "torch.ones(3).new_empty(3)",
        "torch.ones(3).new_empty_strided((3,), (1,))",
    ],
)
def test_memory_that_the_package_leaves_unwritten_is_nan(call: str) -> None:
    in_package = compile(call, str(Path(gatedffn.__file__).parent / "kernel.py"), "eval")
    assert eval(in_package, {"torch": torch}).isnan().all()
