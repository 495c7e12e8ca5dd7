"""What all GPU kernels share on the side of Python: whether there are any, launching them on the
device of their tensors, and how a row of the table and its parameters travel to one.

It imports no Triton, so that it can say that there is none; the modules with kernels do.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gatedffn.activations import SCALARS, Value
from gatedffn.ops import measure
from gatedffn.variants import VARIANTS

Kind = Literal["half", "float32", "tf32"]

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the kernels, whose arithmetic is float32."""
NO_TRITON = (
    None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"
)
"""Why there is no GPU kernel on this machine at all, if so."""
OLDEST = (8, 0)  # the compute capability from which on Triton compiles for NVIDIA's chips


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU: TRITON_INTERPRET=1.

    Triton asks once for every kernel, when its module is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def kind_of(dtype: torch.dtype) -> Kind:
    """What a dtype is multiplied as; float32 as PyTorch's own setting for products on CUDA says."""
    if dtype != torch.float32:
        return "half"
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "float32"


def takes(x: Tensor) -> bool:
    """Whether the kernels for GPUs are those of a tensor's device."""
    return x.is_cuda


@functools.cache
def level(device: torch.device) -> str:
    """What the speed of the kernels depends on: the chip, and the compiler."""
    import triton  # whose package has other names for other makers' GPUs

    name = "interpreted" if interpreting() else torch.cuda.get_device_name(device)
    return f"{name}, triton {triton.__version__}"


def finish(device: torch.device) -> None:
    """Waits until all that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capturing() -> bool:
    """Whether what is launched goes into a CUDA graph, for which nothing may wait."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return begun and torch.cuda.is_current_stream_capturing()


def missing(device: torch.device) -> str | None:
    """Why no GPU kernel can run on tensors of this device; None when they can."""
    if NO_TRITON is not None:
        return NO_TRITON
    if interpreting():
        return None if device.type == "cpu" else "Triton's interpreter takes tensors of the CPU"
    if device.type != "cuda":
        return f"the GPU kernels do not run on {device.type}: move the tensors to a GPU"
    return _unfit(device.index)


@functools.cache
def _unfit(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU here"  # a tensor without memory may still name one
    major, minor = torch.cuda.get_device_capability(index)
    nvidia = getattr(torch.version, "hip", None) is None
    if nvidia and (major, minor) < OLDEST:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and "
            f"Triton compiles for {OLDEST[0]}.{OLDEST[1]} and newer"
        )
    return _unready()


@functools.cache
def _unready() -> str | None:
    """Why Triton cannot launch anything: it builds what it launches with by a C compiler."""
    try:
        from triton.runtime import driver

        driver.active.get_current_device()
    except Exception as error:
        reason = f"Triton cannot launch kernels here: {error}"
        log.warning("layers on the GPU take PyTorch's own operators: %s", reason)
        return reason
    return None


Candidate = TypeVar("Candidate")


def raced(
    key: str,
    among: Mapping[str, Candidate],
    run: Callable[[Candidate], object],
    device: torch.device,
) -> tuple[Candidate, bool]:
    """The best of several ways to cut a kernel, and whether that holds for the next call.

    They are compiled at once and raced by `run`, once for a key and a chip, and the choice is kept
    as that among the ways of an operator is. By rule it is the first that runs; while nothing may
    run, and in the interpreter, the first.
    """
    first, *others = among.values()
    if interpreting() or not others:
        return first, True
    key = f"{key}, {level(device)}"
    known = measure.known(key)
    if known is not None and known.chosen in among:
        return among[known.chosen], True
    if capturing():
        return first, False

    def trials() -> dict[str, Callable[[], object]]:
        return {name: partial(run, candidate) for name, candidate in among.items()}

    done = partial(finish, device)
    if measure.tuning():
        return among[measure.choose(key, list(among), trials, done, compiled=True).chosen], True
    return among[measure.first(key, trials, done)], True


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Within it kernels are launched on the device of `x`; Triton takes the current one."""
    index = x.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)


Place = tuple[float | Tensor, int | None]
"""A parameter as a kernel takes it, with its STEP: a number (None), one value (0), or one a hidden
unit (1); `activations.gpu.parameter` loads it."""
ABSENT: Place = (0.0, None)


@dataclass(frozen=True, slots=True)
class Formula:
    """A row of the table with its parameters, in the form that the kernels take.

    `psi` is None without a gate. `places` are two of phi and one of psi; `of_phi` names the first.
    """

    phi: str
    psi: str | None
    of_phi: tuple[str, ...]
    places: tuple[Place, Place, Place]

    @property
    def per_unit(self) -> bool:
        """Whether a hidden unit has a parameter of its own, so that columns differ."""
        return any(step == 1 for _, step in self.places)

    def values(self) -> tuple[float | Tensor, ...]:
        """What is passed for the parameters p0 and p1 of phi and p2 of psi."""
        return tuple(value for value, _ in self.places)

    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for: PHI, PSI and the steps STEP0, STEP1 and STEP2."""
        steps = {f"STEP{place}": step for place, (_, step) in enumerate(self.places)}
        return {"PHI": self.phi, "PSI": self.psi, **steps}


def describe(variant: str, parameters: Mapping[str, Value]) -> Formula:
    """The row as the kernels take it, made once for every set of fixed numbers.

    `parameters` are numbers, or tensors of one value, or of one value a hidden unit; numbers reach
    a kernel without a copy to the device.
    """
    values = tuple(parameters.values())
    if any(isinstance(value, Tensor) for value in values):
        return _described(variant, values)
    return _fixed(variant, values)


def _described(variant: str, values: tuple[Value, ...]) -> Formula:
    row = VARIANTS[variant]
    parameters = dict(zip(row.defaults, values, strict=True))
    of_phi = SCALARS[row.phi].parameters
    of_psi = () if row.psi is None else SCALARS[row.psi].parameters
    first, second, *_ = [*(_place(parameters[name]) for name in of_phi), ABSENT, ABSENT]
    third, *_ = [*(_place(parameters[name]) for name in of_psi), ABSENT]
    return Formula(row.phi, row.psi, of_phi, (first, second, third))


_fixed = functools.lru_cache(maxsize=1024)(_described)


def _place(value: Value) -> Place:
    if not isinstance(value, Tensor):
        return float(value), None
    return value.detach().reshape(-1).contiguous(), int(value.numel() > 1)
