"""The gradients of gate and up beside the product with W_down, as one kernel."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import FEW, cases, dtypes
from support.compare import same_bits
from support.fused import (
    ALIGNED,
    ODD,
    Gradients,
    Placing,
    Results,
    Sizes,
    by_gradients_kernel,
    configurations,
    draw_gradients,
    dtypes_of,
    judge_gradients,
    label,
    set_for,
)

from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs, fused_backward
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.variants import VARIANTS, Variant

SWIGLU, XIELU = VARIANTS["swiglu"], VARIANTS["xielu"]
RAGGED: Sizes = (37, 72, 104)
SMALL = Config(
    tokens=16, units=32, deep=16, warps=4, stages=2, group=2, subtiles=2, operands="descriptors"
)
few_cases = pytest.mark.parametrize(
    ("row", "learned"), FEW, ids=[f"{row.name}{'-learned' * learned}" for row, learned in FEW]
)


@dtypes
@cases
def test_every_variant(
    row: Variant, learned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    call = draw_gradients(row, RAGGED, dtype, device, learned=learned)
    made = by_gradients_kernel(call)
    assert set(made) == set(call.truth())
    judge_gradients(call, made)


@pytest.mark.parametrize("sizes", [(3, 8, 16), (150, 72, 280)], ids=["less", "several"])
@pytest.mark.parametrize(("kind", "config"), configurations("branch_gradients"), ids=label)
def test_every_configuration(
    kind: gpu.Kind, config: Config, sizes: Sizes, device: torch.device
) -> None:
    with set_for("branch_gradients", kind, config, device):
        for dtype, row in zip(dtypes_of(kind), (SWIGLU, XIELU), strict=False):
            call = draw_gradients(row, sizes, dtype, device, learned=True)
            judge_gradients(call, by_gradients_kernel(call, config))


@few_cases
@dtypes
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in_place"])
@pytest.mark.parametrize("placing", [ALIGNED, ODD, Placing(0, 64)], ids=["gap", "odd", "dense"])
def test_every_layout(
    row: Variant,
    learned: bool,
    dtype: torch.dtype,
    in_place: bool,
    placing: Placing,
    device: torch.device,
) -> None:
    call = draw_gradients(row, RAGGED, dtype, device, learned=learned)
    judge_gradients(call, by_gradients_kernel(call, placing=placing, in_place=in_place))


@pytest.mark.parametrize(
    "sizes",
    [(1, 8, 8), (16, 16, 32), (17, 40, 40), (50, 7, 19), (40, 24, 72), (1, 1, 1), (33, 8, 128)],
    ids=str,
)
@pytest.mark.parametrize("operands", ["pointers", "descriptors"])
def test_sizes_around_those_of_tiles(
    sizes: Sizes, operands: configs.Operands, device: torch.device
) -> None:
    if operands != "pointers" and any(size % 8 for size in sizes[1:]):
        pytest.skip("such rows are not aligned, so there are no descriptors of them")
    call = draw_gradients(SWIGLU, sizes, torch.float32, device, learned=True)
    judge_gradients(call, by_gradients_kernel(call, configs.within(SMALL, operands)))


@pytest.mark.parametrize("units", [slice(0, 40), slice(40, 104), slice(3, 72)], ids=str)
def test_a_part_of_the_hidden_units(units: slice, device: torch.device) -> None:
    call = draw_gradients(SWIGLU, RAGGED, torch.bfloat16, device, learned=True)
    assert call.up is not None
    beta = call.parameters["beta"]
    assert isinstance(beta, torch.Tensor)
    part = replace(
        call,
        down=call.down[:, units],
        gate=call.gate[:, units],
        up=call.up[:, units],
        parameters={"beta": beta[units]},
    )
    made = {n: torch.full((37, 104), torch.nan, dtype=torch.bfloat16) for n in ("a", "l", "h")}
    made = {name: tensor.to(device) for name, tensor in made.items()}
    a, b, h = (tensor[:, units] for tensor in made.values())
    sums = fused_backward.branch_gradients(
        part.grad,
        part.down,
        part.gate,
        part.up,
        "swiglu",
        part.parameters,
        a,
        b,
        h,
        ["beta"],
    )
    results = {"gate": a, "up": b, "hidden": h, "beta": sums["beta"].float()}
    judge_gradients(part, results)
    written = torch.zeros(104, dtype=torch.bool, device=device)
    written[units] = True
    for tensor in made.values():
        assert tensor[:, ~written].isnan().all()


def test_what_has_no_place_is_not_written(device: torch.device) -> None:
    call = draw_gradients(SWIGLU, RAGGED, torch.float32, device)
    whole = by_gradients_kernel(call)
    for name in ("gate", "up", "hidden"):
        out = torch.full((37, 104), torch.nan, device=device)
        sums = fused_backward.branch_gradients(
            call.grad,
            call.down,
            call.gate,
            call.up,
            "swiglu",
            call.parameters,
            out if name == "gate" else None,
            out if name == "up" else None,
            out if name == "hidden" else None,
        )
        assert sums == {}
        assert same_bits(out, whole[name])


def test_one_of_two_parameters(device: torch.device) -> None:
    call = draw_gradients(XIELU, RAGGED, torch.float32, device, learned=True)
    whole = by_gradients_kernel(call)
    for name in ("alpha_p", "alpha_n"):
        out = torch.empty(37, 104, device=device)
        sums = fused_backward.branch_gradients(
            call.grad,
            call.down,
            call.gate,
            None,
            "xielu",
            call.parameters,
            out,
            None,
            None,
            [name],
        )
        assert list(sums) == [name]
        assert same_bits(sums[name].float(), whole[name])


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    call = draw_gradients(SWIGLU, (150, 72, 104), torch.float32, device, learned=True)
    first, second = by_gradients_kernel(call, SMALL), by_gradients_kernel(call, SMALL)
    assert all(same_bits(first[name], second[name]) for name in first)


# known-wrong kernels


def _swapped(call: Gradients) -> Results:
    assert call.up is not None
    made = by_gradients_kernel(replace(call, gate=call.up, up=call.gate))
    return made | {"gate": made["up"], "up": made["gate"]}


def _gradients_swapped(call: Gradients) -> Results:
    made = by_gradients_kernel(call)
    return made | {"gate": made["up"], "up": made["gate"]}


def _of_another(name: str) -> Callable[[Gradients], Results]:
    return lambda call: by_gradients_kernel(replace(call, row=VARIANTS[name], parameters={}))


def _short(call: Gradients) -> Results:
    grad = call.grad.clone()
    grad[:, -1] = 0.0
    return by_gradients_kernel(replace(call, grad=grad))


def _last_tokens_not_summed(call: Gradients) -> Results:
    grad = call.grad.clone()
    grad[-1] = 0.0
    made = by_gradients_kernel(replace(call, grad=grad))
    return by_gradients_kernel(call) | {"beta": made["beta"]}


def _second_term_dropped(call: Gradients) -> Results:
    """silu' as the sigmoid alone."""
    made = by_gradients_kernel(call)
    assert call.up is not None
    sigmoid = made["up"] / call.gate
    return made | {"gate": (sigmoid * call.up).to(call.grad.dtype)}


def _stale(call: Gradients) -> Results:
    made = by_gradients_kernel(call)
    made["hidden"][-1, -1] += 1.0
    return made


MUTANTS: dict[str, tuple[str, Callable[[Gradients], Results]]] = {
    "gate and up swapped": ("swiglu", _swapped),
    "gradients swapped": ("swiglu", _gradients_swapped),
    "tanh for erf": ("geglu", _of_another("geglu_tanh")),
    "skipped tail": ("swiglu", _short),
    "last tokens not summed": ("swiglu", _last_tokens_not_summed),
    "second term of silu' dropped": ("swiglu", _second_term_dropped),
    "stale buffer": ("swiglu", _stale),
    "parameters ignored": (
        "swiglu",
        lambda call: by_gradients_kernel(replace(call, parameters=SWIGLU.defaults)),
    ),
}


@pytest.mark.parametrize(("name", "wrong"), MUTANTS.values(), ids=list(MUTANTS))
def test_mutants_are_rejected(
    name: str, wrong: Callable[[Gradients], Results], device: torch.device
) -> None:
    learned = any(parameter.learnable for parameter in VARIANTS[name].parameters)
    call = draw_gradients(VARIANTS[name], RAGGED, torch.float32, device, learned=learned)
    judge_gradients(call, by_gradients_kernel(call))
    with pytest.raises(AssertionError):
        judge_gradients(call, wrong(call))


# what it does not take


def call_with(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "grad": torch.ones(3, 8),
        "down_weight": torch.ones(8, 16),
        "saved_gate": torch.ones(3, 16),
        "saved_up": torch.ones(3, 16),
        "variant": "swiglu",
        "parameters": {"beta": 1.0},
        "d_gate": torch.ones(3, 16),
        "d_up": torch.ones(3, 16),
        "hidden": torch.ones(3, 16),
    }
    fused_backward.branch_gradients(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_weight": torch.ones(9, 16)}, "weight is .9, 16., the other"),
        ({"saved_up": torch.ones(3, 16).half()}, "up branch is torch.float16"),
        ({"saved_up": None}, "'swiglu' is given the branches of another kind"),
        ({"variant": "gelu", "parameters": {}}, "'gelu' is given the branches of another kind"),
        ({"hidden": torch.ones(16, 3).t()}, "strides .1, 3., the last must be 1"),
        ({"d_gate": torch.ones(4, 16)}, "place of the gate's gradient is"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call_with(**changes)


def test_a_configuration_that_wants_more_than_the_tensors_allow() -> None:
    with pytest.raises(BackendError, match="reads descriptors, these tensors can be read as poin"):
        call_with(grad=torch.ones(3, 9)[:, 1:], config=SMALL)
