"""The definition of experts, in plain PyTorch; its autograd defines the gradients."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward import reference as feed_forward
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.gating.reference import branches, widened_dtype
from gatedffn.ops.spec import traced, transformed


class Stack(NamedTuple):
    """The experts' weights, as `Weights` has those of one, each with a first dimension for them.

    In an `order`, `gate` holds both branches, packed along its second dimension, and so does
    `gate_bias`; then there are no `up` and `up_bias`.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    def one(self, expert: int, order: str) -> Weights:
        """The weights of an expert: views."""
        mine = Weights(*(None if t is None else t[expert] for t in self))  # type: ignore[arg-type]
        if not order:
            return mine
        (gate, up), (gate_bias, up_bias) = (
            (None, None) if t is None else branches(t, 0, order)
            for t in (mine.gate, mine.gate_bias)
        )
        return Weights(gate, up, mine.down, gate_bias, up_bias, mine.down_bias)  # type: ignore[arg-type]


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    stack: Stack,
    variant: str,
    parameters: dict[str, Value],
    order: str,
    weigh: str,
) -> Tensor:
    """`y[s] = sum_k weights[s, k] FFN_index[s, k](x[s])`; before its expert if `weigh` is "input".

    What experts give is weighed and added up in float32 at least.
    """
    count = len(stack.gate)
    wide = widened_dtype(x.dtype)
    # What stands in the slot of another place's expert is no number that this sum knows.
    weights = weights.to(wide).where(index < count, 0.0).unsqueeze(-1)
    rows = x.unsqueeze(-2)
    if weigh == "input":
        rows = (rows * weights).to(x.dtype)
    unknown = traced() or transformed() or index.is_meta or gpu.capturing()
    all_of = _by_masks if unknown else _by_tokens
    made = all_of(rows, index, stack, variant, parameters, order).to(wide)
    return (made if weigh == "input" else made * weights).sum(-2).to(x.dtype)


def _by_tokens(
    rows: Tensor,
    index: Tensor,
    stack: Stack,
    variant: str,
    parameters: dict[str, Value],
    order: str,
) -> Tensor:
    """What each slot's expert makes of its row, each expert given the rows of its slots."""
    pairs = Pairs(index, len(stack.gate))
    of_pairs = rows.expand(*index.shape, rows.shape[-1]).reshape(-1, rows.shape[-1])[pairs.sorted]
    # Without pairs too it is a function of the weights, which autograd can ask for gradients.
    given = [*pairs] or [(0, slice(0))][: len(stack.gate)]
    made = [
        feed_forward.feed_forward(of_pairs[part], stack.one(expert, order), variant, parameters)
        for expert, part in given
    ]
    skipped = index.numel() - pairs.count
    made.append(rows.new_zeros(skipped, stack.down.shape[1]))
    return torch.cat(made)[pairs.sorted.argsort()].view(*index.shape, stack.down.shape[1])


def _by_masks(
    rows: Tensor,
    index: Tensor,
    stack: Stack,
    variant: str,
    parameters: dict[str, Value],
    order: str,
) -> Tensor:
    """The same where no size may depend on numbers: each expert is given all rows."""
    check_index(index)
    # What is below 0 where nothing can raise, in a graph of torch.func's, shows.
    made = rows.new_zeros(()).where(index.unsqueeze(-1) >= 0, torch.nan)
    for expert in range(len(stack.gate)):
        y = feed_forward.feed_forward(rows, stack.one(expert, order), variant, parameters)
        made = y.where((index == expert).unsqueeze(-1), made)
    return made


class Pairs:
    """The slots of all tokens, sorted by expert and then by token: `sorted` are their places.

    Those that name no expert here are the last, behind `count` others.

    Raises:
        ShapeError: an expert below 0.
        BackendError: a CUDA graph is captured, within which no number can be waited for.
    """

    def __init__(self, index: Tensor, experts: int) -> None:
        if gpu.capturing():
            raise BackendError(
                "a CUDA graph is captured, and this way of experts waits to hear how many slots "
                "each has: take the backend 'grouped' or 'definition'"
            )
        check_index(index)
        flat = index.reshape(-1).clamp(max=experts)
        self.sorted = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=experts + 1).tolist()
        self.count = flat.numel() - sizes.pop()
        self._sizes: list[int] = sizes

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has any, and where its pairs are among the sorted ones."""
        start = 0
        for expert, size in enumerate(self._sizes):
            if size:
                yield expert, slice(start, start + size)
            start += size


def check_index(index: Tensor) -> None:
    """Raises unless all experts are 0 or above; a number that none has is one of another place.

    Raises:
        ShapeError: an expert below 0. In a graph it is a RuntimeError when the graph runs.
    """
    if traced():
        if not transformed():  # for which there is no assertion
            torch._assert_async((index >= 0).all(), "index holds an expert below 0")
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(index):
        index = torch._C._functorch.get_unwrapped(index)
    if index.numel() and not index.is_meta and (least := int(index.min())) < 0:
        raise ShapeError(
            f"index holds {least}: experts count from 0; a slot without an expert here has the "
            "number of experts or more"
        )
