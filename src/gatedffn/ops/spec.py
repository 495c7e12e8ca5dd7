"""What a call is, as data: the facts that decide how it is computed, and nothing else.

No tensor and no identity is in a `Spec`, so that equal calls have equal ones. What may change
under a tensor while its facts stay (address and storage) is looked at in every run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gatedffn.activations import Value
from gatedffn.ops import gpu
from gatedffn.variants import VARIANTS

Tensors = Sequence[Tensor | None]
Parameters = Mapping[str, Value]
PLAIN = (Tensor, torch.nn.Parameter)
"""The classes of tensors whose numbers lie where their address says."""


class Matrix(NamedTuple):
    """An operand. `device` is True for the processor, since devices are slow to compare; `negated`
    is PyTorch's lazy sign; `plain` says that it is a tensor of PyTorch's own.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: bool | torch.device
    negated: bool
    plain: bool

    @property
    def by_rows(self) -> bool:
        """Whether the numbers of a row lie beside each other."""
        return self.strides[-1] == 1 or self.shape[-1] == 1

    @property
    def row_stride(self) -> int | None:
        """The numbers from one row to the next, all leading dimensions taken as one; None where
        rows lie unevenly apart.
        """
        if not self.shape:
            return 1
        if not self.by_rows:
            return None
        step, rows = self.shape[-1], 1
        for size, stride in zip(self.shape[-2::-1], self.strides[-2::-1], strict=True):
            if size == 1:
                continue
            if rows == 1:
                step = stride
            elif stride != step * rows:
                return None
            rows *= size
        return step

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The bytes from its first number to behind its last."""
        if not self.numbers:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


Facts = tuple[Any, ...]


def facts(tensors: Sequence[Tensor | None]) -> Facts:
    """The facts of operands: the fields of a `Matrix` for each."""
    # The fields in their order, and no Matrix: this is done at every call.
    return tuple([
        None
        if t is None
        else (t.shape, t.stride(), t.dtype, t.is_cpu or t.device, t.is_neg(), type(t) in PLAIN)
        for t in tensors
    ])  # fmt: skip


def matrices(of: Facts) -> tuple[Matrix | None, ...]:
    """Facts with their names."""
    return tuple(None if one is None else Matrix._make(one) for one in of)


class Spec(NamedTuple):
    """The facts of a call.

    `stage` is "inference", "forward" (of a training step) or "backward"; `hardware` is "cpu",
    "gpu", or a kind of device that there are no ways for. `operands` are in the order of the
    operator; in backward `given` are the gradient that comes in and what was saved.
    `parameters` are those of the row in its order. `settings` are the operator's own.
    """

    variant: str
    stage: str
    device: torch.device
    hardware: str
    operands: tuple[Matrix | None, ...]
    parameters: tuple[float | Matrix, ...]
    settings: tuple[Any, ...] = ()
    wanted: tuple[str, ...] = ()
    given: tuple[Matrix, ...] = ()
    threads: int = 1

    @property
    def x(self) -> Matrix:
        """The first operand."""
        first = self.operands[0]
        assert first is not None
        return first

    @property
    def matrices(self) -> list[Matrix]:
        """The operands that there are."""
        return [matrix for matrix in self.operands if matrix is not None]

    @property
    def own_functions(self) -> str | None:
        """Why no kernel can compute the row: a user wrote its functions. None when kernels can."""
        return own_functions(self.variant)

    def unsuited_parameter(self, width: int) -> str | None:
        """Why kernels cannot take the parameters; None when they can."""
        for value in self.parameters:
            if not isinstance(value, Matrix) or value.numbers == 1:
                continue
            if value.numbers != width or value.shape[-1] != width:
                return "a parameter is neither one number nor one for each hidden unit"
        return None


def own_functions(variant: str) -> str | None:
    """Why no kernel can compute a row: a user wrote its functions. None when kernels can."""
    row = VARIANTS[variant]
    # By the names alone: a compiler would guard a table, and compile anew when it grows.
    if "." not in f"{row.phi}{row.psi}":
        return None
    return f"a function of {row.name} is one's own, of PyTorch's operators"


def value_facts(values: Iterable[Value]) -> tuple[Any, ...]:
    """Parameters as they enter a spec: numbers as they are, and the facts of tensors."""
    return tuple([facts((v,))[0] if isinstance(v, Tensor) else v for v in values])


def surroundings(x: Tensor) -> Facts:
    """What plans depend on beside the call: its device, the threads, PyTorch's settings."""
    device = x.device
    return (
        device,
        torch.get_num_threads(),
        torch._C._get_deterministic_algorithms(),
        x.is_cuda and gpu.kind_of(x.dtype),
    )


def named_values(values: Sequence[Any]) -> tuple[float | Matrix, ...]:
    """The same with names for the facts."""
    return tuple(Matrix._make(v) if isinstance(v, tuple) else v for v in values)


# What observes a call


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    Neither sees through an operator: the one refuses, the other drops the tangents without a
    word. Both can differentiate the definition.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def dispatched() -> bool:
    """Whether torch.func has come to an operator and waits for it: autograd's functions, which it
    would have to be told of before, do not work there.
    """
    front = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    return torch._C._dispatch_tls_is_dispatch_key_excluded(front)


def batched(grad: Tensor) -> bool:
    """Whether it is a gradient of `torch.autograd.grad(..., is_grads_batched=True)`."""
    if torch.compiler.is_compiling():  # which follows neither the question nor such a gradient
        return False
    return transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast on a tensor's device; not all kinds have it, as the meta device."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def watched() -> bool:
    """Whether something must see the operator itself: a compiler, a mode, a profiler, a tracer."""
    return traced() or torch._C._autograd._profiler_enabled()


def traced() -> bool:
    """Whether something follows every tensor from operator to operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        # A tracer above autograd has a stack of its own; it comes with a mode of functions.
        or (torch._C._len_torch_function_stack() > 0 and _INCLUDED(_ABOVE_AUTOGRAD))
    )


_INCLUDED = torch._C._dispatch_tls_is_dispatch_key_included
_ABOVE_AUTOGRAD = torch._C.DispatchKey.PreDispatch
