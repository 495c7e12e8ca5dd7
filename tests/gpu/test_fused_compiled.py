"""The fused kernels as they would run on GPUs that are not here: what they take and are made of.

Their table is in test_table_compiled.py; here is what calls make of it.
"""

from collections.abc import Callable

import pytest
import torch
from support.ahead import Launch, every_target, needs_compiler
from support.table import CHIPS, D_HIDDEN, TOKENS, branch_gradients, hidden, serialized

from gatedffn.ops.feed_forward.gpu import configs, tiles
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.variants import VARIANTS

pytestmark = needs_compiler
CPU = torch.device("cpu")
# One row of each kind, and those whose functions take the most registers.
SEVERAL = [("hidden_values", name) for name in ("gelu", "geglu", "xielu", "situ_glu", "powglu")]
SEVERAL += [("branch_gradients", name) for name in ("gelu", "geglu", "swiglu_oai")]


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_multiprocessors", lambda _: 132)


KERNELS: dict[str, Callable[..., Launch]] = {
    "hidden_values": hidden,
    "branch_gradients": branch_gradients,
}


def of_table(chip: str, kernel: str, kind: str) -> list[Config]:
    fits = [
        fit for fit in configs.TABLE if (fit.chip, fit.kernel, fit.kind) == (chip, kernel, kind)
    ]
    return list({fit.config: None for fit in fits})


def test_branches_that_are_not_joined_fit_too() -> None:
    for config in of_table("sm_90", "hidden_values", "half"):
        apart = configs.within(config, "descriptors")
        hidden(90, VARIANTS["swiglu"], apart, torch.bfloat16).assert_fits()


def test_what_is_written_may_not_be_aligned() -> None:
    for config in of_table("sm_90", "hidden_values", "half"):
        hidden(90, VARIANTS["swiglu"], config, torch.bfloat16, written_gap=1).assert_fits()


@pytest.mark.parametrize(("kernel", "name"), SEVERAL)
def test_other_variants_fit_on_hopper(kernel: str, name: str) -> None:
    config = configs.pick(kernel, "sm_90", "half", TOKENS, D_HIDDEN)  # type: ignore[arg-type]
    launch = KERNELS[kernel](90, VARIANTS[name], config, torch.bfloat16)
    launch.assert_fits()
    assert "wgmma.mma_async" in launch.ptx


@every_target
def test_sums_of_learned_parameters_fit(target: int) -> None:
    config = configs.pick("branch_gradients", CHIPS[target], "half", TOKENS, D_HIDDEN)
    launch = branch_gradients(target, VARIANTS["swiglu"], config, torch.bfloat16, learned=True)
    assert "atom" not in launch.ptx
    launch.assert_fits()


def test_warps_of_their_own_for_reading() -> None:
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
    assert not serialized(launch)
