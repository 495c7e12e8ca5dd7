"""The gating kernels: numbers, special values and memory, in every size class."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from support.cases import Inputs, cases, draw, dtypes
from support.compare import assert_matches, assert_same_special_values, same_bits, unchanged
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
from support.levels import amid_nans, guarded
from support.mutants import MUTANTS, PARAMETER_IGNORED, of_shape
from torch import Tensor
from triton.runtime import driver

from gatedffn.activations import Value
from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import gpu as launching
from gatedffn.ops.gating import gpu, parameter_gradient, reference
from gatedffn.ops.gating.op import gating, packed_gating
from gatedffn.ops.operator import Call
from gatedffn.variants import VARIANTS, Variant

SHAPE = (2, 1031)  # two tiles a row or more, the last of which ends within a vector
# One row of each kind: no gate, gate, learned parameters, two branches that saturate.
FEW = (("gelu", False), ("geglu_tanh", False), ("xielu", True), ("swiglu_oai", True))
few_rows = pytest.mark.parametrize(("name", "learned"), FEW, ids=[name for name, _ in FEW])
with_parameters = pytest.mark.parametrize(
    "row", [row for row in VARIANTS.values() if row.parameters], ids=lambda row: row.name
)
ORDERS = ("gate_up", "up_gate", "interleaved")
orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(autouse=True)
def fresh_tiles() -> Iterator[None]:
    yield
    gpu.tile_of.cache_clear()


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of large matrices, and programs that walk down several, where all is small."""
    gpu.tile_of.cache_clear()
    monkeypatch.setattr(gpu, "LARGE", 1)
    monkeypatch.setattr(gpu, "PROGRAMS", 3)  # so that the last has fewer tiles, and not all rows


def formula_of(inputs: Inputs, device: torch.device) -> launching.Formula:
    parameters: dict[str, Value] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.parameters.items()
    }
    return launching.describe(inputs.row.name, parameters)


def by_kernels(
    inputs: Inputs,
    device: torch.device,
    *,
    gap: int = 0,
    formula: launching.Formula | None = None,
) -> Results:
    """All that the two kernels write. Inputs and outputs lie amid NaNs; only outputs may change.

    "again" are the hidden values as the backward computes them.
    """
    formula = formula or formula_of(inputs, device)
    grad, gate = (
        amid_nans(inputs.grad.to(device), gap),
        amid_nans(inputs.gate.to(device), gap),
    )
    up = None if inputs.up is None else amid_nans(inputs.up.to(device), gap)
    count, columns = gate.shape
    names = ["output", "again", "gate", *([] if up is None else ["up"])]
    places = {name: guarded(count, columns, gate.dtype, gap, device) for name in names}
    made = {name: place.view for name, place in places.items()}
    with unchanged(*(t for t in (grad, gate, up) if t is not None)):
        gpu.run(formula, gate, up, made["output"])
        sums = gpu.run_backward(
            formula,
            grad,
            gate,
            up,
            made["gate"],
            made.get("up"),
            made["again"],
            learned_names(inputs),
        )
    for name, place in places.items():
        place.assert_intact(name)
    made |= {n: parameter_gradient(found, inputs.parameters[n]) for n, found in sums.items()}
    return {name: value.cpu() for name, value in made.items()}


# numbers


@cases
@dtypes
def test_values_slopes_and_parameter_gradients(
    row: Variant, learned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = draw(row, SHAPE, dtype, learned=learned)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    judge(by_kernels(inputs, device, gap=5), truth, eager, row.name)


@cases
@pytest.mark.usefixtures("small_is_large")
def test_the_tiles_of_large_matrices(row: Variant, learned: bool, device: torch.device) -> None:
    inputs = draw(row, (37, 264), torch.bfloat16, learned=learned)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    judge(by_kernels(inputs, device), truth, eager, row.name)


@with_parameters
def test_every_parameter_may_be_one_number_a_hidden_unit(
    row: Variant, device: torch.device
) -> None:
    inputs = draw(row, SHAPE, torch.float32)
    spread = torch.linspace(0.5, 1.5, SHAPE[1], dtype=torch.float64)
    parameters: dict[str, Value] = {name: spread * v for name, v in row.defaults.items()}
    inputs = replace(inputs, parameters=parameters).to(torch.float32)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    judge(by_kernels(inputs, device), truth, eager, row.name)


@with_parameters
def test_a_number_and_as_many_equal_ones_give_the_same_bits(
    row: Variant, device: torch.device
) -> None:
    inputs = draw(row, (5, 24), torch.float32)
    expected = by_kernels(inputs, device)
    expanded: dict[str, Value] = {n: torch.full((24,), v) for n, v in row.defaults.items()}
    single: dict[str, Value] = {n: torch.tensor([v]) for n, v in row.defaults.items()}
    for parameters in (expanded, single):
        found = by_kernels(replace(inputs, parameters=parameters), device)
        assert all(same_bits(found[name], value) for name, value in expected.items())


@few_rows
@dtypes
def test_branches_of_any_size(
    name: str, learned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """From subnormal numbers to the largest whose square is one, each row held to its own scale."""
    lowest, highest = (-22, 6) if dtype == torch.float16 else (-140, 60)
    scales = 2.0 ** torch.linspace(lowest, highest, 15, dtype=torch.float64)
    inputs = scaled(draw(VARIANTS[name], (15, 257), dtype, learned=learned), scales)
    truth, eager = by_reference(inputs.to(torch.float64)), by_reference(inputs)
    results = by_kernels(inputs, device)
    for what in set(results) - set(learned_names(inputs)):
        assert_matches(results[what], truth[what], eager[what], f"{name} {what}", per_row=True)


@cases
@dtypes
def test_infinities_and_nans_are_where_the_definition_has_them(
    row: Variant, learned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    special = special_values(dtype)
    count = len(special)
    pairs = special[:, None].expand(count, count).contiguous()
    parameters = draw(row, (count, count), torch.float32, learned=learned).parameters
    up = pairs.t().contiguous() if row.gated else None
    inputs = Inputs(row, pairs, up, parameters, torch.ones(count, count, dtype=dtype))
    results, expected = by_kernels(inputs, device), by_reference(inputs)
    for name in set(results) - set(learned_names(inputs)):
        assert_same_special_values(results[name], expected[name].double(), name)


# memory


@few_rows
@dtypes
def test_any_width_and_row_stride_gives_the_bits_of_whole_rows(
    name: str, learned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    whole = draw(VARIANTS[name], (3, 2080), dtype, learned=learned)
    expected = by_kernels(whole, device)
    for width in (1, 8, 15, 17, 513, 1040):
        columns = slice(width, 2 * width)
        part = Inputs(
            whole.row,
            whole.gate[:, columns],
            None if whole.up is None else whole.up[:, columns],
            {n: v[columns] if isinstance(v, Tensor) else v for n, v in whole.parameters.items()},
            whole.grad[:, columns],
        )
        found = by_kernels(part, device, gap=width)
        for key in set(found) - set(learned_names(part)):  # which are summed in another order
            assert same_bits(found[key], expected[key][..., columns]), (width, key)


@few_rows
def test_a_gradient_may_take_the_place_of_the_incoming_one(
    name: str, learned: bool, device: torch.device
) -> None:
    inputs = draw(VARIANTS[name], (2, 513), torch.bfloat16, learned=learned)
    expected = by_kernels(inputs, device)
    gate = inputs.gate.detach().to(device)
    up = None if inputs.up is None else inputs.up.detach().to(device)
    for place in set(expected) - {"output", *learned_names(inputs)}:
        grad = inputs.grad.to(device, copy=True)
        into = {"gate": None, "up": None, "again": None} | {place: grad}
        gpu.run_backward(
            formula_of(inputs, device), grad, gate, up,
            into["gate"], into["up"], into["again"], [],
        )  # fmt: skip
        assert same_bits(grad.cpu(), expected[place]), place


def halves(x: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """The gate and the up branch: in an order that has a name, or taking turns, up first."""
    if order == "up first":
        return x[..., 1::2], x[..., 0::2]
    return reference.branches(x, -1, order)


@pytest.mark.parametrize("order", [*ORDERS, "up first"])
@dtypes
@pytest.mark.parametrize("width", [1, 24, 519])
def test_packed_branches_and_gradients_are_read_and_written_in_place(
    order: str, dtype: torch.dtype, width: int, device: torch.device
) -> None:
    inputs = draw(VARIANTS["swiglu"], (3, width), dtype, learned=True)
    assert inputs.up is not None
    expected = by_kernels(inputs, device)
    both, gradients = (guarded(3, 2 * width, dtype, 6, device) for _ in range(2))
    gate, up = halves(both.view, order)
    gate.copy_(inputs.gate.detach())
    up.copy_(inputs.up.detach())
    d_gate, d_up = halves(gradients.view, order)
    formula, hidden = formula_of(inputs, device), torch.full((3, width), torch.nan, dtype=dtype)
    hidden, grad = hidden.to(device), inputs.grad.to(device)
    assert gpu.pair_of(gate, up) == {"interleaved": 0, "up first": 1}.get(order)
    with unchanged(both.memory):
        gpu.run(formula, gate, up, hidden)
        sums = gpu.run_backward(formula, grad, gate, up, d_gate, d_up, None, ["beta"])
    gradients.assert_intact("the gradient")
    assert same_bits(hidden.cpu(), expected["output"])
    assert same_bits(d_gate.cpu(), expected["gate"])
    assert same_bits(d_up.cpu(), expected["up"])
    d_beta = parameter_gradient(sums["beta"], inputs.parameters["beta"])
    assert same_bits(d_beta.cpu(), expected["beta"])


@few_rows
@pytest.mark.usefixtures("small_is_large")
def test_twice_gives_the_same_bits(name: str, learned: bool, device: torch.device) -> None:
    inputs = draw(VARIANTS[name], (67, 33), torch.float32, learned=learned)
    first, second = by_kernels(inputs, device), by_kernels(inputs, device)
    assert all(same_bits(first[key], second[key]) for key in first)


# as operators

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "half_of_packed": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
    "every_other": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded_row": lambda t: t[:1].expand_as(t),
    "expanded_number": lambda t: t[0, 0].expand_as(t),
    "batch": lambda t: t.reshape(7, 1, -1).transpose(0, 1),
    "vector": lambda t: t[0],
    "number": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
}


def leaf(x: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on the device, as it lies, to take a gradient."""
    return None if x is None else x.detach().to(device).requires_grad_()


def operator_agrees(inputs: Inputs, device: torch.device) -> None:
    """The operator's kernels give what the definition gives, contiguous."""
    gate, up = (leaf(t, device) for t in (inputs.gate, inputs.up))
    parameters: dict[str, Value] = {
        n: v.detach().to(device).requires_grad_() if isinstance(v, Tensor) else v
        for n, v in inputs.parameters.items()
    }
    asked = {"gate": gate, "up": up, **parameters}
    leaves = {name: t for name, t in asked.items() if isinstance(t, Tensor)}
    backend = "kernels" if inputs.gate.numel() else "auto"
    hidden = gating((gate, up), Call(inputs.row, parameters, (), backend))
    found = torch.autograd.grad(hidden, list(leaves.values()), inputs.grad.to(device))
    results = {"output": hidden.detach(), **dict(zip(leaves, found, strict=True))}
    assert all(result.is_contiguous() for result in results.values())
    exact, same = by_reference(inputs.to(torch.float64)), by_reference(inputs)
    for key, result in results.items():
        eager = same[key].detach() * (1.0 + 2.0 * torch.finfo(result.dtype).eps)
        assert_matches(result.cpu(), exact[key], eager, key)


@few_rows
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_any_strides(
    name: str, learned: bool, layout: Callable[[Tensor], Tensor], on_gpu: torch.device
) -> None:
    inputs = draw(VARIANTS[name], (7, 127), torch.float32, learned=learned)
    if layout is LAYOUTS["number"]:
        parameters: dict[str, Value] = {
            n: v[:1] if isinstance(v, Tensor) else v for n, v in inputs.parameters.items()
        }
        inputs = replace(inputs, parameters=parameters if not learned else inputs.row.defaults)
    up = None if inputs.up is None else layout(inputs.up.detach())
    gate, grad = layout(inputs.gate.detach()), layout(inputs.grad)
    operator_agrees(replace(inputs, gate=gate, up=up, grad=grad), on_gpu)


@pytest.mark.parametrize("dim", [0, 1, 2])
@orders
def test_packed_along_any_dimension(order: str, dim: int, on_gpu: torch.device) -> None:
    row, parameters = VARIANTS["swiglu"], {"beta": 1.3}
    x = torch.randn(4, 6, 8, device=on_gpu, requires_grad=True)
    hidden = packed_gating((x,), Call(row, parameters, (dim, order), "kernels"))
    grad = torch.randn(hidden.shape, device=on_gpu)
    (d_x,) = torch.autograd.grad(hidden, x, grad)
    assert d_x.is_contiguous()
    parts = [leaf(part, on_gpu) for part in reference.branches(x, dim, order)]
    expected = gating(parts, Call(row, parameters, (), "kernels"))
    assert same_bits(hidden, expected)
    made = torch.autograd.grad(expected, parts, grad)  # type: ignore[arg-type]
    for part, gradient in zip(reference.branches(d_x, dim, order), made, strict=True):
        assert same_bits(part.contiguous(), gradient)


def test_what_the_kernels_do_not_take_is_computed_by_the_definition(on_gpu: torch.device) -> None:
    row, gate = VARIANTS["swiglu"], torch.randn(3, 4, device=on_gpu)
    table: dict[str, tuple[Tensor, Tensor, dict[str, Value]]] = {
        "there is no kernel for torch.float64": (gate.double(), gate.double(), {"beta": 1.0}),
        "of different dtypes": (gate, gate.bfloat16(), {"beta": 1.0}),
        "neither one number": (gate, gate, {"beta": torch.ones(3, 1, device=on_gpu)}),
    }
    for reason, (gate, up, parameters) in table.items():
        plans = gating.plans((gate, up), Call(row, parameters), ["gate"])
        assert {plan.chosen for plan in plans.values()} == {"definition"}
        assert all(reason in plan.reason for plan in plans.values())
        hidden = gating((gate, up), Call(row, parameters))
        assert same_bits(hidden, reference.gating(gate, up, row.name, parameters))
        with pytest.raises(BackendError, match=f"'kernels' cannot compute this call: .*{reason}"):
            gating((gate, up), Call(row, parameters, (), "kernels"))
    with pytest.raises(ShapeError, match="another kind of variant"):
        gating((gate, None), Call(row, {"beta": 1.0}))


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(launching, "interpreting", lambda: True)
    assert launching.missing(here) is None
    assert "takes tensors of the CPU" in str(launching.missing(there))
    monkeypatch.setattr(launching, "interpreting", lambda: False)
    assert "do not run on cpu: move the tensors" in str(launching.missing(here))
    launching._unfit.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launching.missing(there) == "PyTorch sees no GPU here"
    launching._unfit.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launching, "_unready", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A chip")
    for capability, reason in (((7, 5), "A chip has compute capability 7.5"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found = launching.missing(there)
        assert found is None if reason is None else reason in str(found)
        launching._unfit.cache_clear()
    monkeypatch.setattr(launching, "NO_TRITON", "Triton is not installed: pip install triton")
    assert launching.missing(there) == "Triton is not installed: pip install triton"


def test_where_triton_cannot_build_its_launcher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=fails))
    launching._unready.cache_clear()
    said = launching._unready()
    launching._unready.cache_clear()
    assert said == "Triton cannot launch kernels here: Failed to find C compiler"
    assert said in caplog.text


def test_a_triton_whose_package_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A chip")
    launching.level.cache_clear()
    assert "triton 3" in launching.level(torch.device("cuda", 0))
    launching.level.cache_clear()


def test_a_gradient_that_takes_turns_with_a_branch(on_gpu: torch.device) -> None:
    grad, gate = (t.detach() for t in torch.randn(5, 7, 2, device=on_gpu).unbind(-1))
    up = torch.randn(5, 7, device=on_gpu, requires_grad=True)
    gate.requires_grad_()
    hidden = gating((gate, up), Call(VARIANTS["swiglu"], {"beta": 1.0}, (), "kernels"))
    found = torch.autograd.grad(hidden, [gate, up], grad)
    with torch.no_grad():
        expected = reference.gating_backward(
            grad, gate, up, "swiglu", {"beta": 1.0}, ["gate", "up"]
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# faults that these comparisons must see


def test_known_faults_are_rejected() -> None:
    for mutant in of_shape([*MUTANTS, PARAMETER_IGNORED], SHAPE, "fp32"):
        learned = mutant is PARAMETER_IGNORED
        inputs = draw(VARIANTS[mutant.rows[-1]], SHAPE, torch.float32, learned=learned)
        truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
        wrong = {key: value for key, value in mutant.wrong(inputs).items() if key in truth}
        with pytest.raises(AssertionError):
            judge(dict(wrong), truth, eager, mutant.name)


def test_faults_in_what_a_kernel_is_told_are_rejected(device: torch.device) -> None:
    inputs = draw(VARIANTS["xielu"], SHAPE, torch.float32, learned=True)
    uneven: dict[str, Value] = {**inputs.parameters, "alpha_n": inputs.parameters["alpha_n"] * 0.5}
    inputs = replace(inputs, parameters=uneven)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    judge(by_kernels(inputs, device), truth, eager, "xielu")
    for fault in (first_for_all, parameters_swapped):
        results = by_kernels(inputs, device, formula=formula_of(fault(inputs), device))
        for key in ("output", "again", "gate"):
            with pytest.raises(AssertionError):
                judge({key: results[key]}, truth, eager, fault.__name__)


def test_a_wrong_tile_is_rejected(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A grid with a tile too few leaves memory unwritten, which holds NaNs."""
    inputs = draw(VARIANTS["swiglu"], SHAPE, torch.float32)
    truth, eager = by_reference(inputs.to(torch.float64)), by_hand(inputs)
    monkeypatch.setattr(gpu.Tile, "across", lambda tile, columns: columns // tile.columns)
    with pytest.raises(AssertionError):
        judge(by_kernels(inputs, device), truth, eager, "swiglu")
