"""The hidden values as one kernel: every variant, dtype, layout and configuration."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import FEW, cases, dtypes
from support.fused import (
    ALIGNED,
    ODD,
    Hidden,
    Placing,
    Results,
    Sizes,
    by_hidden_kernel,
    configurations,
    draw_hidden,
    dtypes_of,
    judge_hidden,
    label,
    set_for,
)
from torch import Tensor

from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs, fused, tiles
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.variants import VARIANTS, Variant

SWIGLU, GELU = VARIANTS["swiglu"], VARIANTS["gelu"]
RAGGED: Sizes = (37, 72, 104)
SMALL = Config(tokens=16, units=16, deep=16, warps=4, stages=2, group=2, operands="joined")
DESCRIPTORS = [
    config
    for kind, config in configurations("hidden_values")
    if kind == "half" and config.operands != "pointers"
]
few_cases = pytest.mark.parametrize(
    ("row", "learned"), FEW, ids=[f"{row.name}{'-learned' * learned}" for row, learned in FEW]
)


@dtypes
@cases
def test_every_variant(
    row: Variant, learned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    bias = VARIANTS[row.name].gated == learned  # with and without, over all of the rows
    call = draw_hidden(row, RAGGED, dtype, device, bias=bias, learned=learned)
    judge_hidden(call, by_hidden_kernel(call))


# One tile and less; several, ragged in every dimension, so that a program takes more than one.
@pytest.mark.parametrize("sizes", [(3, 8, 16), (150, 72, 280)], ids=["less", "several"])
@pytest.mark.parametrize(("kind", "config"), configurations("hidden_values"), ids=label)
def test_every_configuration(
    kind: gpu.Kind, config: Config, sizes: Sizes, device: torch.device
) -> None:
    with set_for("hidden_values", kind, config, device):
        for dtype, row in zip(dtypes_of(kind), (SWIGLU, GELU), strict=False):
            call = draw_hidden(row, sizes, dtype, device, bias=True)
            judge_hidden(call, by_hidden_kernel(call, config))


@pytest.mark.parametrize("config", DESCRIPTORS, ids=label)
def test_what_is_written_may_not_be_aligned(config: Config, device: torch.device) -> None:
    with set_for("hidden_values", "half", config, device):
        for row in (SWIGLU, GELU):
            call = draw_hidden(row, (70, 40, 139), torch.bfloat16, device, bias=True)
            judge_hidden(call, by_hidden_kernel(call, config, save=True))


@few_cases
@dtypes
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("placing", [ALIGNED, ODD, Placing(0, 64)], ids=["gap", "odd", "dense"])
def test_every_layout(
    row: Variant,
    learned: bool,
    dtype: torch.dtype,
    save: bool,
    bias: bool,
    placing: Placing,
    device: torch.device,
) -> None:
    call = draw_hidden(row, RAGGED, dtype, device, bias=bias, learned=learned)
    made = by_hidden_kernel(call, placing=placing, save=save)
    assert ("gate" in made) == save
    judge_hidden(call, made)


@pytest.mark.parametrize(
    "sizes",
    [(1, 8, 8), (16, 16, 16), (17, 40, 24), (50, 7, 19), (40, 24, 72), (1, 1, 1), (33, 128, 8)],
    ids=str,
)
@pytest.mark.parametrize("operands", configs.RANKS)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_sizes_around_those_of_tiles(
    sizes: Sizes, operands: configs.Operands, turned: bool, device: torch.device
) -> None:
    if operands != "pointers" and any(size % 8 for size in sizes[1:]):
        pytest.skip("such rows are not aligned, so there are no descriptors of them")
    config = configs.within(SMALL, operands)
    call = draw_hidden(SWIGLU, sizes, torch.float32, device, bias=True)
    judge_hidden(call, by_hidden_kernel(call, config, turned=turned))


def test_rows_that_are_one_row(device: torch.device) -> None:
    call = draw_hidden(SWIGLU, RAGGED, torch.float32, device)
    x = call.x[:1].expand_as(call.x)
    out = torch.full((37, 104), torch.nan, device=device)
    assert call.up is not None
    assert fused.operands(x, call.gate, call.up) == "pointers"
    fused.hidden_values(x, call.gate, None, call.up, None, "swiglu", {"beta": 1.0}, out)
    judge_hidden(replace(call, x=x), {"hidden": out})


def test_offsets_are_64_bits(device: torch.device) -> None:
    stride = (1 << 30) + 8
    memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((3, 64), (stride, 1))  # the last row starts beyond 2^31
    call = draw_hidden(SWIGLU, (3, 64, 16), torch.bfloat16, device)
    x.copy_(call.x)
    out = torch.full((3, 16), torch.nan, dtype=torch.bfloat16, device=device)
    for operands in configs.RANKS:
        out.fill_(torch.nan)
        fused.hidden_values(
            x,
            call.gate,
            None,
            call.up,
            None,
            "swiglu",
            {"beta": 1.0},
            out,
            config=configs.within(SMALL, operands),
        )
        judge_hidden(call, {"hidden": out})


def test_an_output_beyond_2_to_the_31(device: torch.device) -> None:
    if gpu.interpreting():
        pytest.skip("the interpreter would need an hour for so many elements")
    tokens, d_hidden = (1 << 31) // 16384 + 200, 16384
    if torch.cuda.mem_get_info(device)[0] < 3 * 2 * tokens * d_hidden:
        pytest.skip("it needs 13 GB of GPU memory")
    call = draw_hidden(SWIGLU, (tokens, 64, d_hidden), torch.bfloat16, device)
    out = torch.full((tokens, d_hidden), torch.nan, dtype=torch.bfloat16, device=device)
    fused.hidden_values(call.x, call.gate, None, call.up, None, "swiglu", {"beta": 1.0}, out)
    assert not out.isnan().any()
    judge_hidden(replace(call, x=call.x[-200:]), {"hidden": out[-200:]})


def test_a_single_value_of_a_parameter_may_be_a_tensor(device: torch.device) -> None:
    beta = torch.tensor([1.3], device=device)
    call = draw_hidden(SWIGLU, RAGGED, torch.float32, device)
    call = replace(call, parameters={"beta": beta})
    judge_hidden(call, by_hidden_kernel(call))


# known-wrong kernels


def _swapped(call: Hidden) -> Results:
    assert call.up is not None
    return by_hidden_kernel(replace(call, gate=call.up, up=call.gate))


def _of_another(name: str) -> Callable[[Hidden], Results]:
    return lambda call: by_hidden_kernel(replace(call, row=VARIANTS[name], parameters={}))


def _short(call: Hidden) -> Results:
    """The last of what is summed is skipped."""
    x = call.x.clone()
    x[:, -1] = 0.0
    return by_hidden_kernel(replace(call, x=x))


def _stale(call: Hidden) -> Results:
    """The last tile of units keeps what was there."""
    made = by_hidden_kernel(call)
    made["hidden"][:, -1] = torch.nan
    return made


def _shifted(call: Hidden) -> Results:
    return {name: result.roll(1, 0) for name, result in by_hidden_kernel(call).items()}


MUTANTS: dict[str, tuple[str, Callable[[Hidden], Results]]] = {
    "gate and up swapped": ("swiglu", _swapped),
    "gate's bias forgotten": (
        "swiglu",
        lambda call: by_hidden_kernel(replace(call, gate_bias=None)),
    ),
    "up's bias forgotten": (
        "swiglu",
        lambda call: by_hidden_kernel(replace(call, up_bias=None)),
    ),
    "tanh for erf": ("geglu", _of_another("geglu_tanh")),
    "erf for tanh": ("geglu_tanh", _of_another("geglu")),
    "skipped tail": ("swiglu", _short),
    "stale buffer": ("swiglu", _stale),
    "rows shifted": ("swiglu", _shifted),
    "parameters ignored": (
        "swiglu",
        lambda call: by_hidden_kernel(replace(call, parameters=SWIGLU.defaults)),
    ),
}


@pytest.mark.parametrize(("name", "wrong"), MUTANTS.values(), ids=list(MUTANTS))
def test_mutants_are_rejected(
    name: str, wrong: Callable[[Hidden], Results], device: torch.device
) -> None:
    learned = any(parameter.learnable for parameter in VARIANTS[name].parameters)
    call = draw_hidden(VARIANTS[name], RAGGED, torch.float32, device, bias=True, learned=learned)
    judge_hidden(call, by_hidden_kernel(call))
    with pytest.raises(AssertionError):
        judge_hidden(call, wrong(call))


def test_a_joined_pair_that_is_taken_in_the_wrong_order_is_rejected(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = draw_hidden(SWIGLU, RAGGED, torch.float32, device)
    right = tiles.joined
    monkeypatch.setattr(tiles, "joined", lambda a, b, *block: _turned(right, a, b, *block))
    with pytest.raises(AssertionError):
        judge_hidden(call, by_hidden_kernel(call, SMALL))


def _turned(right: Callable[..., Any], a: Tensor, b: Tensor, *block: int) -> Any:
    """Reads the higher of the two for the lower, and beyond it what stands for the other."""
    both = torch.stack([max(a, b, key=Tensor.data_ptr), min(a, b, key=Tensor.data_ptr)])
    return right(both[0], both[1], *block)


# what it does not take


def call_with(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(3, 8),
        "gate_weight": torch.ones(16, 8),
        "gate_bias": None,
        "up_weight": torch.ones(16, 8),
        "up_bias": None,
        "variant": "swiglu",
        "parameters": {"beta": 1.0},
        "out_hidden": torch.ones(3, 16),
    }
    fused.hidden_values(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_weight": torch.ones(16, 9)}, "up branch is .16, 9., the other"),
        ({"up_weight": torch.ones(16, 8).half()}, "up branch is torch.float16"),
        ({"up_weight": None}, "'swiglu' is given the branches of another kind"),
        ({"variant": "gelu", "parameters": {}}, "'gelu' is given the branches of another kind"),
        ({"gate_bias": torch.ones(15)}, "bias of the gate is"),
        ({"out_hidden": torch.ones(3, 15)}, "place of the hidden values is"),
        ({"out_hidden": torch.ones(16, 3).t()}, "strides .1, 3., the last must be 1"),
        ({"out_gate": torch.ones(4, 16)}, "place of the gate is"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call_with(**changes)


def test_a_configuration_that_wants_more_than_the_tensors_allow() -> None:
    with pytest.raises(BackendError, match="reads joined, these tensors can be read as pointers"):
        call_with(x=torch.ones(3, 9)[:, 1:], config=SMALL)


def test_how_operands_can_be_read() -> None:
    both = torch.ones(2, 16, 8, dtype=torch.bfloat16)
    x, odd = torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(3, 9, dtype=torch.bfloat16)[:, :8]
    wide = torch.ones(16, 16, dtype=torch.bfloat16)
    assert fused.operands(x, both[0], both[1]) == "joined"
    assert fused.operands(x, both[1], both[0]) == "joined"
    assert fused.operands(x, both[0], None) == "joined"
    assert fused.operands(odd, both[0], both[1]) == "pointers"
    # One matrix for both branches, the halves of each row, or rows of another stride.
    assert fused.operands(x, both[0], both[0]) == "descriptors"
    assert fused.operands(x, wide[:, :8], wide[:, 8:]) == "descriptors"
    assert fused.operands(x, both[0], wide[:, :8]) == "descriptors"


# the table


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "other"])
@pytest.mark.parametrize("kind", ["half", "tf32", "float32"])
@pytest.mark.parametrize("kernel", ["hidden_values", "branch_gradients"])
def test_the_table_has_a_row_for_every_call(
    kernel: configs.Kernel, kind: gpu.Kind, chip: configs.Chip
) -> None:
    for tokens in (1, 64, 65, 257, 1 << 20):
        for units in (1, 2048, 2049, 28672):
            assert configs.pick(kernel, chip, kind, tokens, units).stages > 1


def test_the_classes_of_the_table() -> None:
    few, some, narrow, wide = (
        configs.pick("hidden_values", "sm_90", "half", *shape)
        for shape in ((64, 14336), (256, 14336), (8192, 2048), (8192, 14336))
    )
    assert few.tokens == 64
    assert some == narrow
    assert (wide.tokens, wide.units, wide.operands) == (128, 128, "joined")


def test_rows_that_are_not_aligned_take_smaller_steps_and_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "interpreting", lambda: True)
    for dtype, kind, deep in ((torch.bfloat16, "half", 32), (torch.float32, "float32", 16)):
        x = torch.empty(8192, 9, dtype=dtype)[:, 1:]
        table = configs.pick("branch_gradients", "other", kind, 8192, 14336)  # type: ignore[arg-type]
        config = configs.chosen(
            "branch_gradients", None, "pointers", x, (8192, 14336), lambda _: None
        )
        assert (config.tokens, config.units) == (table.tokens, table.units)
        assert (config.operands, config.deep) == ("pointers", deep)
        assert config.subtiles == 2 * table.subtiles


def test_float32_is_multiplied_as_pytorch_is_set() -> None:
    assert gpu.kind_of(torch.bfloat16) == "half"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, kind in (("highest", "float32"), ("high", "tf32"), ("highest", "float32")):
            torch.set_float32_matmul_precision(setting)
            assert gpu.kind_of(torch.float32) == kind
    finally:
        torch.set_float32_matmul_precision(before)
