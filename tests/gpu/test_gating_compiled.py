"""The gating kernels compiled ahead of time: registers, and accesses of 16 bytes."""

import re

import pytest
import torch
from support import ahead
from support.ahead import Launch, every_target, needs_compiler
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import gpu as launching
from gatedffn.ops.gating import gpu
from gatedffn.ops.gating.reference import branches
from gatedffn.variants import VARIANTS, Variant

pytestmark = needs_compiler

WIDTH = 14336
# A row without a gate, one that is rich in arithmetic, one that saturates, one that learns.
FEW = ("gelu", "geglu", "powglu", "swiglu_oai", "xielu")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def launches(
    row: Variant, packed_rows: Tensor, order: str, target: int, *, learned: bool = False
) -> list[Launch]:
    """What runs for branches in one tensor, forward and backward."""
    parameters: dict[str, Value] = dict(row.defaults)
    names = []
    if learned:
        names = [parameter.name for parameter in row.parameters if parameter.learnable]
        parameters |= {name: torch.ones(packed_rows.shape[1] // 2) for name in names}
    gate, up = branches(packed_rows, 1, order)
    d_gate, d_up = branches(torch.empty_like(packed_rows), 1, order)
    branch = (up, d_up) if row.gated else (None, None)
    hidden = torch.empty(gate.shape, dtype=gate.dtype)
    formula = launching.describe(row.name, parameters)
    with ahead.compiling(target) as made:
        gpu.run(formula, gate, branch[0], hidden)
        gpu.run_backward(formula, hidden, gate, branch[0], d_gate, branch[1], None, names)
    return made


def vectors(launch: Launch) -> tuple[int, int, int]:
    """How many instructions load 16 bytes, store 16, and access fewer bytes."""
    loads, stores = (
        [access.endswith("v4.b32") for access in re.findall(rf"{what}\.global[.:\w]*", launch.ptx)]
        for what in ("ld", "st")
    )
    return sum(loads), sum(stores), (loads + stores).count(False)


@every_target
@pytest.mark.parametrize("name", FEW)
def test_everything_stays_in_registers(name: str, target: int) -> None:
    row = VARIANTS[name]
    learned = any(parameter.learnable for parameter in row.parameters)
    for launch in launches(row, torch.empty(256, 2 * WIDTH), "gate_up", target, learned=learned):
        launch.assert_fits()


@every_target
@dtypes
@pytest.mark.parametrize("order", ["gate_up", "interleaved"])
def test_a_packed_tensor_is_accessed_16_bytes_at_a_time(
    order: str, dtype: torch.dtype, target: int
) -> None:
    rows = torch.empty(256, 2 * WIDTH, dtype=dtype)
    forward, backward = launches(VARIANTS["swiglu"], rows, order, target)
    for launch, loads, stores in ((forward, 2, 1), (backward, 3, 2)):
        launch.assert_fits()
        several = vectors(launch)[0] // loads
        assert several >= 1
        assert vectors(launch) == (loads * several, stores * several, 0), launch


def test_branches_of_their_own_are_accessed_16_bytes_at_a_time() -> None:
    gate, up, hidden = (torch.empty(1, 64 * WIDTH, dtype=torch.bfloat16) for _ in range(3))
    with ahead.compiling(90) as made:
        gpu.run(launching.describe("swiglu", {"beta": 1.0}), gate, up, hidden)
    assert vectors(made[0]) == (2, 1, 0)


@pytest.mark.parametrize("width", [8 * 1023, 8 * 1023 + 4], ids=["aligned", "not"])
def test_a_width_that_8_but_not_16_divides_is_aligned(width: int) -> None:
    rows = torch.empty(64, 2 * width, dtype=torch.bfloat16)
    forward, backward = launches(VARIANTS["swiglu"], rows, "gate_up", 90)
    for launch in (forward, backward):
        loads, stores, others = vectors(launch)
        aligned = width % 8 == 0
        assert (loads > 0, stores > 0, others == 0) == (aligned, aligned, aligned)


def test_a_number_is_compiled_in_no_kernel() -> None:
    """Another number runs the same kernel, and reaches it without a copy to the device."""
    x = torch.empty(64, WIDTH)
    with ahead.compiling(90) as made:
        for beta in (1.0, 1.702):
            gpu.run(launching.describe("swish", {"beta": beta}), x, None, torch.empty_like(x))
    first, second = made
    assert first.binary is second.binary
    numbers = [{value for value in launch.arguments if isinstance(value, float)} for launch in made]
    assert numbers == [{1.0, 0.0}, {1.702, 0.0}]
