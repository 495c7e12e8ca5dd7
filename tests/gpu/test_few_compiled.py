"""The kernels for few tokens compiled ahead of time, by every cut of the table."""

import re
from collections.abc import Callable

import pytest
import torch
from support import ahead
from support.ahead import every_target, needs_compiler
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.feed_forward import Weights
from gatedffn.ops.feed_forward.gpu import few
from gatedffn.ops.feed_forward.gpu.launch import _watched
from gatedffn.variants import VARIANTS

pytestmark = needs_compiler

Compiling = Callable[..., list[ahead.Launch]]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    """The launches of a layer of (d_model, d_hidden, d_out) on a chip, none of them carried out."""

    def compile_for(
        target: int,
        tokens: int,
        sizes: tuple[int, int, int],
        dtype: torch.dtype = BF16,
        variant: str = "swiglu",
        bias: bool = False,
        learned: bool = False,
    ) -> list[ahead.Launch]:
        d_model, d_hidden, d_out = sizes
        row = VARIANTS[variant]

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        weights = Weights(
            empty(d_hidden, d_model),
            empty(d_hidden, d_model) if row.gated else None,
            empty(d_out, d_hidden),
            empty(d_hidden) if bias else None,
            empty(d_hidden) if bias and row.gated else None,
            empty(d_out) if bias else None,
        )
        parameters: dict[str, Value] = dict(row.defaults)
        if learned:
            parameters = {name: torch.ones(d_hidden) for name in parameters}
        monkeypatch.setattr(few, "chip", lambda _: f"sm_{target}")
        few._prepared.cache_clear()
        with ahead.compiling(target) as launches:
            few.feed_forward(
                empty(tokens, d_model), weights, variant, parameters, empty(tokens, d_out)
            )
        few._prepared.cache_clear()
        for made in launches:
            made.assert_fits()
        return launches

    return compile_for


def loads(launch: ahead.Launch) -> list[str]:
    """The instructions that load from the GPU's memory, each with the bytes of a copy behind it."""
    found = re.findall(r"(ld\.global[\w.:]*|cp\.async\.c\w\.[^;]*)", launch.ptx)
    return [re.sub(r" \[.*\], ", " ", instruction) for instruction in found]


@every_target
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("sizes", [(4096, 14336, 4096), (2048, 5632, 2048)], ids=str)
def test_weights_come_by_sixteen_bytes(
    target: int, tokens: int, sizes: tuple[int, int, int], compiled: Compiling
) -> None:
    sums = [launch for launch in compiled(target, tokens, sizes) if "product" in str(launch)]
    assert len(sums) == 2
    for launch in sums:
        assert loads(launch)
        if tokens == 1:
            assert all(load.endswith("v4.b32") for load in loads(launch)), loads(launch)
            assert any("evict_first" in load for load in loads(launch))
        else:
            assert all(" 0x10" in load for load in loads(launch)), loads(launch)
            assert "mma.sync" in launch.ptx


@every_target
@pytest.mark.parametrize("tokens", [1, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float16, FP32], ids=str)
def test_other_dtypes(target: int, tokens: int, dtype: torch.dtype, compiled: Compiling) -> None:
    compiled(target, tokens, (2048, 5632, 2048), dtype)


@every_target
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_odd_widths(target: int, tokens: int, dtype: torch.dtype, compiled: Compiling) -> None:
    compiled(target, tokens, (1023, 2049, 1023), dtype)


@pytest.mark.parametrize("variant", ["relu2", "geglu", "situ_glu", "powglu", "swiglu_oai"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_with_long_formulas(tokens: int, variant: str, compiled: Compiling) -> None:
    launches = compiled(90, tokens, (1024, 4096, 1024), variant=variant, bias=True, learned=True)
    assert len(launches) >= 2


def resident(launch: ahead.Launch) -> int:
    """The programs of a launch that run at a time on an H200."""
    kernel = launch.binary
    by_registers = ahead.REGISTERS // (kernel.registers * kernel.warps * 32)
    by_memory = ahead.SHARED[90] // (kernel.shared + 1024)  # the system has a part of each
    on_each = min(by_registers, by_memory, 64 // kernel.warps, 32)
    return min(on_each * few.MULTIPROCESSORS["sm_90"], launch.grid[0] * launch.grid[1])


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_enough_bytes_are_under_way(tokens: int, compiled: Compiling) -> None:
    """A piece of the weights of each program, and one more for each stage, hide the latency."""
    needed = 4.3e12 * 0.8e-6
    padded = {1: 1, 5: 8, 16: 16}[tokens]
    gated, down = (x for x in compiled(90, tokens, (4096, 14336, 4096)) if "product" in str(x))
    for launch, count in ((gated, 2), (down, 1)):
        cut = few.CUTS["sm_90"][padded, count == 2]
        piece = cut.rows * cut.loads * few.WIDEST * count
        under_way = resident(launch) * piece * max(1, cut.stages - 2)
        assert under_way > needed


def noted(launches: list[ahead.Launch], beta: float) -> list[object]:
    """What launches were given, without the addresses, and with a name for `beta`."""
    return [
        (
            made.binary.name,
            made.grid,
            [a.shape if isinstance(a, Tensor) else "beta" if a == beta else a for a in given],
        )
        for made in launches
        for given in [made.arguments]
    ]


@pytest.mark.parametrize("tokens", [1, 5])
def test_later_calls_are_launched_like_the_first(tokens: int) -> None:
    x, w = torch.empty(tokens, 512), torch.empty(1024, 512)
    weights = Weights(w, w, torch.empty(512, 1024), None, None, None)
    calls = []
    few._prepared.cache_clear()
    with ahead.compiling(90) as launches:
        for beta in (1.25, 1.5):
            few.feed_forward(x, weights, "swiglu", {"beta": beta}, torch.empty(tokens, 512))
            calls.append(noted(launches, beta))
            launches.clear()
    few._prepared.cache_clear()
    first, second = calls
    assert first == second
    assert "beta" in str(first)


def test_a_profiler_is_told_of_every_launch() -> None:
    from triton import knobs

    def listener(_metadata: object) -> None:
        pass

    assert not _watched()
    knobs.runtime.launch_exit_hook.add(listener)
    try:
        assert _watched()
    finally:
        knobs.runtime.launch_exit_hook.remove(listener)
    assert not _watched()
