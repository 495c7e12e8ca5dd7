"""The path of a call: how many files of the package it goes through before the first product."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.layers import OWN, Case, draw, fit, ours
from support.levels import needs_kernels

import gatedffn
from gatedffn.functional import gating
from gatedffn.variants import VARIANTS

PACKAGE = Path(gatedffn.__file__).parent
MOST = 7
# PyTorch's products, and what packs a kernel's struct right before it is called.
PRODUCTS = {"linear", "mm", "addmm", "_linear_pointwise", "pack"}


def files(call: Callable[[], object]) -> list[str]:
    """The files whose functions a call enters, in order, where its plan is kept already."""
    call()
    found: dict[str, None] = {}

    def entered(frame: FrameType, event: str, what: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            found[str(file.relative_to(PACKAGE))] = None
        elif event == "c_call" and what.__name__ in PRODUCTS:
            sys.setprofile(None)

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        call()
        assert sys.getprofile() is None, "it came to no product"
    finally:
        sys.setprofile(before)
    return list(found)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", [*OWN, "linear"])
def test_the_path_of_the_layer(backend: str, trained: bool) -> None:
    case, options = fit(backend, Case(row=VARIANTS["swiglu"]))
    layer = draw(case)
    with torch.set_grad_enabled(trained):
        found = files(lambda: ours(layer, **options))
    assert {"functional.py", "ops/operator.py", "ops/feed_forward/forward.py"} <= set(found)
    assert len(found) <= MOST, found


@needs_kernels
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_the_path_of_gating(trained: bool) -> None:
    gate, up = torch.randn(2, 3, 40, requires_grad=trained)
    found = files(lambda: gating(gate, up))
    assert {"functional.py", "ops/operator.py", "ops/gating/ways.py"} <= set(found)
    assert len(found) <= MOST, found
