"""Which of PyTorch's transformations are at work on a call."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    Neither sees through an operator: the one refuses, the other drops the tangents without a
    word. Both can differentiate the definition.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(grad: Tensor) -> bool:
    """Whether it is a gradient of `torch.autograd.grad(..., is_grads_batched=True)`."""
    if torch.compiler.is_compiling():  # which follows neither the question nor such a gradient
        return False
    return transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def watched() -> bool:
    """Whether something must see the operator itself: a compiler, a mode, a profiler, a tracer."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )
