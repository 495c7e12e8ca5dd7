"""The border between Python and C++: a kernel takes one struct, of the same size on both sides."""

import ctypes

import pytest
import torch
from support.levels import LEVELS, every_level, needs_kernels

from gatedffn import native
from gatedffn.errors import BuildError, ShapeError
from gatedffn.ops import kernels
from gatedffn.ops.spec import facts, matrices

FACTS = {
    **{"gate_stride": 4, "up_stride": 4, "hidden_stride": 4},
    **{"rows": 2, "columns": 3, "dtype": 0, "threads": 1},
}


@needs_kernels
@every_level
def test_every_kernel_has_a_struct_of_its_size(level: str) -> None:
    library = kernels.library(level)
    for kernel in kernels.KERNELS:
        there = kernel is not kernels.TILES or level in native.WITH_TILES
        assert hasattr(library, f"gatedffn_{kernel.name}") == there
        size = 8 * (len(kernel.addresses) + len(kernel.facts)) if there else -1
        assert library.gatedffn_size(kernel.name.encode()) == size, kernel.name
    assert library.gatedffn_size(b"nothing") == library.gatedffn_size(b"") == -1


def test_a_library_without_the_kernels_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "load", lambda *_: ctypes.CDLL(None))
    with pytest.raises(BuildError, match="has no gatedffn_function: delete it"):
        kernels.library.__wrapped__()
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)
    found = kernels.missing.__wrapped__()
    # Every refusal is told in one line.
    assert caplog.messages == [f"there are no kernels: {found}"]


@needs_kernels
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gating = kernels.GATING
    short = kernels.Kernel(gating.name, " ".join(gating.addresses), " ".join(gating.facts[:-1]))
    monkeypatch.setattr(kernels, "KERNELS", (short,))
    kernels.library.cache_clear()
    kernels.missing.cache_clear()
    try:
        with pytest.raises(BuildError, match=r"88 bytes for what gating takes, kernels.py 80"):
            kernels.library(LEVELS[0])
        assert "install gatedffn again" in str(kernels.missing())
    finally:
        kernels.library.cache_clear()
        kernels.missing.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({k: v for k, v in FACTS.items() if k != "rows"}, "missing rows, unknown none"),
        (FACTS | {"tile": 1}, "missing none, unknown tile"),
        (
            {("depth" if k == "rows" else k): v for k, v in FACTS.items()},
            "missing rows, unknown depth",
        ),
    ],
    ids=["missing", "unknown", "both"],
)
def test_facts_that_a_kernel_does_not_take(facts: dict[str, int], named: str) -> None:
    with pytest.raises(TypeError, match=f"gating takes other facts: {named}"):
        kernels.GATING.bind(None, **facts)
    few = dict.fromkeys(kernels.FEW.facts[:-1], 1)
    with pytest.raises(TypeError, match="few takes other facts: missing threads, unknown none"):
        kernels.FEW.scratch(None, **few)


@needs_kernels
@every_level
def test_a_bound_kernel_serves_other_addresses(level: str) -> None:
    formula = kernels.describe("bilinear", {})
    run = kernels.GATING.bind(level, **FACTS)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        gate, up = torch.randn(2, 2, 4, generator=generator).unbind()
        hidden = torch.full((2, 4), torch.nan)
        run(formula.pointer, *map(kernels.address, (gate, up, hidden)))
        assert torch.equal(hidden[:, :3], (gate * up)[:, :3])
        assert hidden[:, 3].isnan().all()


def test_a_tensor_whose_storage_does_not_hold_it_has_no_address() -> None:
    matrix = torch.ones(4, 3)[1:]
    laid = kernels.Laid(matrices(facts([matrix, None])))
    assert laid.addresses([matrix, None])[0] == [matrix.data_ptr(), 0]
    for size in (44, 0):
        matrix.untyped_storage().resize_(size)
        with pytest.raises(ShapeError, match=f"has {size} bytes of 48"):
            laid.addresses([matrix, None])
        with pytest.raises(ShapeError, match=f"has {size} bytes of 48"):
            kernels.address(matrix, matrix.nbytes)
