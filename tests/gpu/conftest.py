"""The GPU kernels: in Triton's interpreter on the CPU, or on a GPU where there is one.

    TRITON_INTERPRET=1 python -m pytest tests/gpu

Triton asks for that variable once, so the interpreter has a process of its own; without it, the
tests that compile run, and those that run kernels need a GPU.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from gatedffn.ops import gpu

HERE = Path(__file__).parent


class NotRun(pytest.Item):
    def runtest(self) -> None:
        pytest.skip("Triton is not installed: pip install triton")


class WithoutTriton(pytest.Module):
    """A module that would import Triton: skipped as a whole, and said to be."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        return [NotRun.from_parent(self, name="without_triton")]


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if HERE in module_path.parents and importlib.util.find_spec("triton") is None:
        module: pytest.Module = WithoutTriton.from_parent(parent, path=module_path)
        return module
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the CPU in the interpreter, else a GPU."""
    if gpu.interpreting():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU, and the interpreter is off: set TRITON_INTERPRET=1")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def on_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the operators take the ways of a GPU: in the interpreter, tensors of the CPU too."""
    if device.type == "cpu":
        monkeypatch.setattr(gpu, "takes", lambda _: True)
    return device


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter without the faults that it has."""
    if gpu.interpreting():
        from support import interpreter

        interpreter.repair(monkeypatch)
