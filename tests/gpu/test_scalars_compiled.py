"""The scalar functions compiled ahead of time."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from support import ahead
from support.ahead import every_target, needs_compiler

from gatedffn.activations import SCALARS
from gatedffn.activations import gpu as functions

pytestmark = needs_compiler


@triton.jit
def _both(x, value, slope, p0, p1, NAME: tl.constexpr):
    at = tl.program_id(0) * 512 + tl.arange(0, 512)
    made, derivative = functions.both(tl.load(x + at), p0, p1, NAME)
    tl.store(value + at, made)
    tl.store(slope + at, derivative)


@pytest.mark.parametrize("name", list(SCALARS))
@every_target
def test_every_function_stays_in_registers(name: str, target: int) -> None:
    x, value, slope = (torch.empty(512) for _ in range(3))
    with ahead.compiling(target) as launches:
        _both[(1,)](x, value, slope, 1.5, 2.5, name)
    (launch,) = launches
    launch.assert_fits()
    assert f"sm_{target}" in launch.ptx


def test_a_launch_is_noted_whenever_its_kernel_was_compiled() -> None:
    for count in (1, 2):
        with ahead.compiling(90) as launches:
            for _ in range(count):
                _both[(3,)](*(torch.empty(512) for _ in range(3)), 1.5, 2.5, "relu")
        assert [launch.grid for launch in launches] == [(3, 1, 1)] * count


def test_what_does_not_fit_is_rejected() -> None:
    with ahead.compiling(90) as launches:
        _both[(1,)](*(torch.empty(512) for _ in range(3)), 1.5, 2.5, "relu")
    binary = launches[0].binary
    for fault in (
        replace(binary, stack=8),
        replace(binary, shared=1 << 20),
        replace(binary, registers=255, warps=16),
    ):
        with pytest.raises(AssertionError, match=r"_both sm_90: \d+ registers"):
            fault.assert_fits()
