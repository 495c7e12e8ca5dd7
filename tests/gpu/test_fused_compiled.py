"""The fused kernels as they would run on GPUs that are not here: what they take and are made of."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import ahead
from support.ahead import Launch, every_target, needs_compiler
from support.fused import drawn_parameters

from gatedffn.ops.feed_forward.gpu import configs, fused, fused_backward, tiles
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.variants import VARIANTS, Variant

pytestmark = needs_compiler
CPU = torch.device("cpu")
TOKENS, D_MODEL, D_HIDDEN = 8192, 4096, 14336
# One row of each kind, and those whose functions take the most registers.
SEVERAL = [("hidden_values", name) for name in ("gelu", "geglu", "xielu", "situ_glu", "powglu")]
SEVERAL += [("branch_gradients", name) for name in ("gelu", "geglu", "swiglu_oai")]
chips = {80: "sm_80", 90: "sm_90", 100: "sm_100"}


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_multiprocessors", lambda _: 132)


@pytest.fixture(autouse=True)
def same_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, gap: int = 0) -> torch.Tensor:
    """With `gap` elements between the rows. Memory that is never touched takes no room."""
    *rows, columns = shape
    return torch.empty(*rows, columns + gap, dtype=dtype)[..., :columns]


def hidden(
    target: int,
    row: Variant,
    config: Config,
    dtype: torch.dtype,
    save: bool = True,
    gap: int = 0,
    written_gap: int = 0,
) -> Launch:
    weights = empty(2, D_HIDDEN, D_MODEL, dtype=dtype, gap=gap)
    bias = empty(D_HIDDEN, dtype=dtype)
    up = weights[1] if row.gated else None
    of_linear = bias if row.gated else None
    places = [empty(TOKENS, D_HIDDEN, dtype=dtype, gap=gap or written_gap) for _ in range(3)]
    with ahead.compiling(target) as launches:
        fused.hidden_values(
            empty(TOKENS, D_MODEL, dtype=dtype, gap=gap),
            weights[0],
            bias,
            up,
            of_linear,
            row.name,
            row.defaults,
            places[0],
            places[1] if save else None,
            places[2] if save and row.gated else None,
            config,
        )
    return launches[0]


def branch_gradients(
    target: int,
    row: Variant,
    config: Config,
    dtype: torch.dtype,
    learned: bool = False,
    gap: int = 0,
) -> Launch:
    branches = [empty(TOKENS, D_HIDDEN, dtype=dtype, gap=gap) for _ in range(5)]
    parameters = drawn_parameters(row, D_HIDDEN, learned, CPU)
    with ahead.compiling(target) as launches:
        fused_backward.branch_gradients(
            empty(TOKENS, D_MODEL, dtype=dtype, gap=gap),
            empty(D_MODEL, D_HIDDEN, dtype=dtype, gap=gap),
            branches[0],
            branches[1] if row.gated else None,
            row.name,
            parameters,
            branches[2],
            branches[3] if row.gated else None,
            branches[4],
            [name for name, value in parameters.items() if isinstance(value, torch.Tensor)],
            config,
        )
    return launches[0]


KERNELS: dict[str, Callable[..., Launch]] = {
    "hidden_values": hidden,
    "branch_gradients": branch_gradients,
}


def of_table(chip: str, kernel: str, kind: str) -> list[Config]:
    fits = [
        fit for fit in configs.TABLE if (fit.chip, fit.kernel, fit.kind) == (chip, kernel, kind)
    ]
    return list({fit.config: None for fit in fits})


def serialized(launch: Launch, tmp_path: Path) -> bool:
    """Whether the assembler had to let products wait for each other, as it then remarks."""
    from triton.backends import nvidia

    source = tmp_path / "kernel.ptx"
    source.write_text(launch.ptx)
    assert nvidia.__file__ is not None
    tool = Path(nvidia.__file__).parent / "bin" / "ptxas"
    command = [str(tool), "-v", "--gpu-name=sm_90a", str(source), "-o", str(tmp_path / "kernel")]
    return (
        "serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr
    )


@every_target
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_of_the_table_fits(kernel: str, target: int, tmp_path: Path) -> None:
    swiglu = VARIANTS["swiglu"]
    for config in of_table(chips[target], kernel, "half"):
        launch = KERNELS[kernel](target, swiglu, config, torch.bfloat16)
        launch.assert_fits()
        held = config.for_each * launch.binary.shared
        assert held <= ahead.SHARED[target], f"{config.for_each} times: {launch}"
        registers = config.for_each * launch.binary.registers * 32 * launch.binary.warps
        assert registers <= ahead.REGISTERS, f"{config.for_each} times: {launch}"
        ptx = launch.ptx
        if target == 80:
            assert "mma.sync" in ptx
            assert "cp.async.cg" in ptx
        else:
            assert ("wgmma.mma_async" if target == 90 else "tcgen05.mma") in ptx
            assert "mma.sync" not in ptx
            loads, stores = (
                re.findall(rf"cp\.async\.bulk\.tensor\.\dd\.{space}", ptx)
                for space in ("shared", "global")
            )
            assert loads
            assert stores
            assert "ld.global" not in ptx or kernel == "hidden_values"  # the biases
        if target == 90:
            assert not serialized(launch, tmp_path), str(launch)


def test_branches_that_are_not_joined_fit_too() -> None:
    for config in of_table("sm_90", "hidden_values", "half"):
        apart = configs.within(config, "descriptors")
        hidden(90, VARIANTS["swiglu"], apart, torch.bfloat16).assert_fits()


@every_target
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_are_not_aligned_fit_too(kernel: str, target: int) -> None:
    for config in of_table("other", kernel, "half"):
        askew = configs.askew(config, "half")
        KERNELS[kernel](target, VARIANTS["swiglu"], askew, torch.bfloat16, gap=1).assert_fits()


def test_what_is_written_may_not_be_aligned() -> None:
    for config in of_table("sm_90", "hidden_values", "half"):
        hidden(90, VARIANTS["swiglu"], config, torch.bfloat16, written_gap=1).assert_fits()


@every_target
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["float32", "tf32"])
def test_float32_fits(kernel: str, kind: str, target: int) -> None:
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    for config in of_table(chips[target], kernel, kind):
        launch = KERNELS[kernel](target, VARIANTS["swiglu"], config, torch.float32)
        launch.assert_fits()
        products = re.findall(r"wgmma\.mma_async|tcgen05\.mma\.|mma\.sync", launch.ptx)
        assert bool(products) == (kind == "tf32")


@pytest.mark.parametrize(("kernel", "name"), SEVERAL)
def test_other_variants_fit_on_hopper(kernel: str, name: str) -> None:
    config = configs.pick(kernel, "sm_90", "half", TOKENS, D_HIDDEN)  # type: ignore[arg-type]
    launch = KERNELS[kernel](90, VARIANTS[name], config, torch.bfloat16)
    launch.assert_fits()
    assert "wgmma.mma_async" in launch.ptx


@every_target
def test_sums_of_learned_parameters_fit(target: int) -> None:
    config = configs.pick("branch_gradients", chips[target], "half", TOKENS, D_HIDDEN)  # type: ignore[arg-type]
    launch = branch_gradients(target, VARIANTS["swiglu"], config, torch.bfloat16, learned=True)
    assert "atom" not in launch.ptx
    launch.assert_fits()


def test_warps_of_their_own_for_reading(tmp_path: Path) -> None:
    config = Config(
        tokens=128,
        units=128,
        deep=64,
        warps=4,
        stages=3,
        operands="descriptors",
        specialize=True,
    )
    launch = hidden(90, VARIANTS["swiglu"], config, torch.bfloat16, save=False)
    launch.assert_fits()
    assert "setmaxnreg" in launch.ptx
    assert not serialized(launch, tmp_path)
