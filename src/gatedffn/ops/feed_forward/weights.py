"""What is known of the weights of a layer: looked at once, and not again at every call.

A layer of 64 by 172 takes ten microseconds, and looking at its weights took thirty.
"""

from typing import Any

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward.reference import Weights


class Known:
    """Sizes, whether the kernels of the whole layer can read the weights, and where these are."""

    __slots__ = ("d_hidden", "d_model", "d_out", "device", "dtype", "not_by_rows", "projections")

    def __init__(self, weights: Weights) -> None:
        gate, up, down, *biases = weights
        self.dtype, self.device = gate.dtype, gate.device
        self.d_hidden, self.d_model = gate.shape
        self.d_out = self.d_hidden if down is None else down.shape[0]
        # A copy of a weight would cost more than the kernels of the whole layer gain.
        self.not_by_rows = None
        for w in (gate, up, down):
            if w is not None and w.stride(1) != 1 and w.shape[1] != 1:
                self.not_by_rows = "a weight is not stored row by row, as nn.Linear stores it"
        self.projections = projections(weights) if all(map(_contiguous, biases)) else None

    def takes(self, x: Tensor) -> bool:
        """Whether a layer with these weights takes an input without another look."""
        return (
            type(x) is Tensor
            and x.dtype is self.dtype
            and x.device == self.device
            and x.layout is torch.strided
            and not x.is_nested
            and x.dim() > 0
            and x.shape[-1] == self.d_model
            and in_memory(x)
        )


def _contiguous(bias: Tensor | None) -> bool:
    return bias is None or bias.stride(0) == 1


def projections(weights: Weights) -> tuple[int, ...]:
    """The three projections as a kernel takes them, biases contiguous."""
    return (
        *kernels.weight(weights.gate, weights.gate_bias),
        *kernels.weight(weights.up, weights.up_bias),
        *kernels.weight(weights.down, weights.down_bias),
    )


def in_memory(x: Tensor) -> bool:
    """Whether a tensor of PyTorch's own has its numbers where its address says."""
    return not x.is_neg() and not x._is_zerotensor()


_PLAIN = (Tensor, torch.nn.Parameter)


def readable(value: Value | None) -> bool:
    """Whether it is no tensor, or one whose numbers a kernel finds at its address."""
    if not isinstance(value, Tensor):
        return True
    return type(value) in _PLAIN and in_memory(value)


KEPT = 1 << 14  # layers, each of which takes a kilobyte or two
# By the identities of the six. They may be those of others by now, and that does no harm: all that
# is known follows from what `find` compares. A weak reference to a weight would tell when it ends,
# but nn.Module.to refuses to exchange tensors that have some (torch.__future__).
_known: dict[tuple[int, ...], tuple[Known, tuple[Any, ...]]] = {}


def find(weights: Weights) -> Known | None:
    """What was found when these tensors were looked at, if they are as they were."""
    found = _known.get(tuple(map(id, weights)))
    if found is None:
        return None
    known, looks = found
    try:
        for w, (at, shape, strides) in zip(weights, looks, strict=True):
            # Whoever assigns to `w.data` puts other memory, of another shape, under a tensor.
            if w is not None and not (
                type(w) in _PLAIN
                and w.data_ptr() == at
                and w.shape == shape
                and w.stride() == strides
                and w.dtype is known.dtype
                and not w.is_neg()
            ):
                return None
    except RuntimeError:  # sparse and nested tensors have no address
        return None
    return known


def remember(weights: Weights) -> Known:
    """Keeps what is found, and none of these tensors alive."""
    known = Known(weights)
    looks = tuple((0, 0, 0) if w is None else (w.data_ptr(), w.shape, w.stride()) for w in weights)
    if len(_known) >= KEPT:
        _known.clear()
    _known[tuple(map(id, weights))] = known, looks
    return known
