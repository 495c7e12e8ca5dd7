"""The kernels by other compilers: Clang's, and one for another processor, whose code an emulator
runs. The suite has those of the compiler that is found first.
"""

import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import emulated, experts
from support.cases import dtypes
from support.layers import Case, check
from support.levels import WHY_NO_KERNELS, needs_kernels

from gatedffn import native
from gatedffn.native import compiler
from gatedffn.ops import kernels
from gatedffn.ops.operator import forget_plans
from gatedffn.variants import VARIANTS

pytestmark = needs_kernels
KINDS = {
    "gelu": Case(row=VARIANTS["gelu"], bias=False),
    "swiglu_oai": Case(row=VARIANTS["swiglu_oai"]),
    "xielu": Case(row=VARIANTS["xielu"], learned="unit"),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
needs_an_emulator = pytest.mark.skipif(
    bool(emulated.MISSING), reason=f"there is no {' and no '.join(emulated.MISSING)}"
)
needs_clang = pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
BUILT = (
    pytest.param("aarch64", marks=needs_an_emulator),
    pytest.param("clang, portable", marks=needs_clang),
    pytest.param("clang, best", marks=needs_clang),
)


def by_clang(level: str, folder: Path) -> ctypes.CDLL:
    flags = compiler.flags(level, threads=False)
    made = compiler.build(["clang++"], flags, kernels.SOURCE, folder, f"{level}.so")
    return kernels.declared(ctypes.CDLL(str(made)), level in native.WITH_TILES)


@pytest.fixture(scope="module", params=BUILT)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("built")
    if request.param == "aarch64":
        with emulated.library(folder) as loaded:
            yield loaded
    else:
        best = WHY_NO_KERNELS is None and request.param.endswith("best")
        yield by_clang(kernels.level() if best else "portable", folder)


@pytest.fixture(autouse=True)
def there(built: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels.has_tiles()  # asked of this processor's own
    if isinstance(built, emulated.Library):
        built.called.clear()
    monkeypatch.setattr(kernels, "library", lambda _=None: built)
    kernels._functions.cache_clear()
    kernels._fixed.cache_clear()
    forget_plans()
    yield
    kernels._functions.cache_clear()
    kernels._fixed.cache_clear()
    forget_plans()


def assert_called(built: Any, *names: str) -> None:
    """In the emulator; a library in this process has no record of its calls."""
    if isinstance(built, emulated.Library):
        assert {f"gatedffn_{name}" for name in names} <= built.called


@dtypes
@kinds
@pytest.mark.parametrize(("backend", "tokens"), [("few", 3), ("few", 21), ("blocks", 37)])
def test_the_layer_and_its_gradients(
    built: Any, backend: str, tokens: int, kind: Case, dtype: torch.dtype
) -> None:
    case = replace(kind, batch=(tokens,), dtype=dtype, sizes=(33, 67, 35))
    check(case, backend=backend)
    assert_called(built, backend, f"{backend}_backward")


@dtypes
def test_experts(built: Any, dtype: torch.dtype) -> None:
    case = experts.Case(tokens=40, sizes=(24, 40, 16), dtype=dtype)
    experts.check(experts.draw(case), ["own"])
    assert_called(built, "experts", "experts_backward")


def test_tiles(built: Any) -> None:
    if not hasattr(built, "gatedffn_tiles") or isinstance(built, emulated.Library):
        pytest.skip("these kernels multiply no tiles")
    case = Case(row=VARIANTS["swiglu"], dtype=torch.bfloat16, batch=(70,), sizes=(64, 96, 40))
    check(case, backend="tiles")


@dtypes
@kinds
def test_gating_between_products_of_a_library(built: Any, kind: Case, dtype: torch.dtype) -> None:
    check(replace(kind, dtype=dtype), backend="linear")
    assert_called(built, "gating", "gating_backward")
