"""What holds for every test: fixed seeds, and unwritten memory that shows."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils import _device

import gatedffn
from gatedffn.ops.operator import forget_plans

# The same examples in every run; time on a shared machine says nothing about the code.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a worker for every core

# Under `with torch.device(...)` PyTorch looks its constructors up once: let it find its own.
_device._device_constructors()

PACKAGE = str(Path(gatedffn.__file__).parent)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def planned_anew() -> Iterator[None]:
    """No plan of one test, which may have changed what plans depend on, is another's."""
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what the package gets from torch.empty and its relatives with NaN.

    An output that a kernel leaves unwritten then fails every comparison, whatever the memory
    held before.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = function(*args, **kwargs)
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(PACKAGE) and tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return poisoned
