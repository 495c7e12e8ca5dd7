"""Parameters that hold the matrices of several experts, a twin of the module with others, and how
such a module is called.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.interop.replacing.elsewhere import own_class
from gatedffn.interop.replacing.structure import NotUnderstood
from gatedffn.interop.replacing.taking import as_before
from gatedffn.roles import Path, Projection

WRAPPER = "parametrizations"  # where PyTorch keeps the parameters that it computes


@dataclass(frozen=True, slots=True)
class Stacks:
    """Which parameter could be which: the matrices of both halves, and the biases by matrix.

    `numbers` are what a twin has in place of the sizes that the module keeps as attributes.
    """

    count: int  # of the experts
    first: tuple[Projection, ...]
    down: Projection
    biases: Mapping[Path, str]
    numbers: Mapping[int, int] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Projection, ...]:
        return *self.first, self.down

    def sized(self, d_model: int, d_hidden: int, *, numbers: bool = False) -> "Stacks":
        """The same with other sizes; `numbers` where its attributes tell them apart."""
        times = self.first[0].d_out // self.down.d_in
        own = self.down.d_out, self.down.d_in, 2 * self.down.d_in
        known = numbers and len({*own, self.count}) == len(own) + 1
        made = zip(own, (d_model, d_hidden, 2 * d_hidden), strict=True) if known else ()
        first = [replace(p, d_in=d_model, d_out=times * d_hidden) for p in self.first]
        down = replace(self.down, d_in=d_hidden, d_out=d_model)
        return replace(self, first=tuple(first), down=down, numbers=dict(made))


def stacked(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a module holds itself, as its forward reads them.

    >>> [*stacked(nn.Linear(2, 3, bias=False))]
    ['weight']
    """
    made = module._modules.get(WRAPPER)
    names = [*module._parameters, *([] if made is None else made._modules)]
    found = ((name, getattr(module, name)) for name in names)
    return {name: tensor for name, tensor in found if tensor is not None}


def readings(tensors: Mapping[str, Tensor]) -> Iterator[Stacks]:
    """Every way to take some parameters for the matrices and biases of experts.

    Raises:
        NotUnderstood: one of them can be neither.
    """
    matrices = [name for name, t in tensors.items() if t.dim() == 3]
    counts = [len(tensors[name]) for name in matrices]
    if len({*counts}) > 1:
        each = ", ".join(f"{n} {name}" for n, name in zip(counts, matrices, strict=True))
        raise NotUnderstood(f"its stacks hold different numbers of experts: {each}")
    biases = [name for name, t in tensors.items() if t.dim() == 2]
    more = [name for name in tensors if name not in (*matrices, *biases)]
    if more or len(matrices) not in (2, 3):
        raise NotUnderstood(f"it has a parameter of its own, {(more or matrices)[-1]}")
    for last in reversed(matrices):
        names = [*(name for name in matrices if name != last), last]
        for turned in itertools.product((False, True), repeat=len(names)):
            *first, down = (
                _projection(n, tensors[n], t) for n, t in zip(names, turned, strict=True)
            )
            widths = {p.d_out for p in first}
            one = first[0]
            fits = one.d_out == down.d_in or (len(first) == 1 and one.d_out == 2 * down.d_in)
            if len(widths) > 1 or not fits or any(p.d_in != down.d_out for p in first):
                continue
            for chosen in itertools.permutations((*first, down), len(biases)):
                pairs = [*zip(chosen, biases, strict=True)]
                if all(tensors[name].shape[1] == p.d_out for p, name in pairs):
                    given = {p.path: name for p, name in pairs}
                    yield Stacks(tensors[last].shape[0], tuple(first), down, given)


def _projection(name: str, tensor: Tensor, transposed: bool) -> Projection:
    d_in, d_out = tensor.shape[1:] if transposed else tensor.shape[:0:-1]
    return Projection((name,), nn.Module, d_in, d_out, transposed)


def parameters(stacks: Stacks, matrices: Mapping[Path, Tensor], bias: Any) -> dict[str, Tensor]:
    """The parameters of a twin: matrices (experts, out, in), and `bias(shape)` for each bias."""
    made = {}
    for p in stacks.all:
        matrix = matrices[p.path]
        made[p.path[0]] = matrix.transpose(1, 2) if p.transposed else matrix
        if p.path in stacks.biases:
            made[stacks.biases[p.path]] = bias((stacks.count, p.d_out))
    return made


class _Eager:
    """A configuration by which transformers runs the forward that a class was written with."""

    _experts_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def twin(
    module: nn.Module,
    held: Mapping[str, Tensor],
    dtype: torch.dtype,
    numbers: Mapping[int, int] = MappingProxyType({}),
) -> nn.Module:
    """An object of a module's class with other parameters, and copies of what it may change.

    Whole numbers among its attributes are those that `numbers` has for them.
    """
    made = as_before(module, own_class(module), ())
    state = vars(made)
    state.update({n: copy.copy(v) for n, v in state.items() if isinstance(v, (list, dict, set))})
    state.update({n: numbers.get(v, v) for n, v in state.items() if type(v) is int})
    state["_parameters"] = {**held}
    state["_buffers"] = {
        n: None if b is None else b.to(dtype, copy=True) for n, b in module._buffers.items()
    }
    children = {n: m for n, m in module._modules.items() if n != WRAPPER}
    state["_modules"] = {n: m and copy.deepcopy(m).to(dtype) for n, m in children.items()}
    for child in made.children():
        child.requires_grad_(True)
    if "config" in state:
        state["config"] = _Eager(state["config"])
    return made


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the input, the index and the routing weights in the forward of experts, or that
    of the input alone.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [*inspect.signature(type(module).forward).parameters.values()][1:]
    names = tuple(p.name for p in found[:3] if p.kind in positional)
    more = [p for p in found[3:] if p.default is p.empty and p.kind in positional]
    if len(names) not in (1, 3) or len(names) < len(found[:3]) or more:
        raise NotUnderstood("its forward does not take an input, an index and routing weights")
    return names


def called(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> object:
    forward = type(module).forward
    if len(arguments_of(module)) == 3:
        return forward(module, x, index, weights)
    return _by_parts(lambda given: forward(module, given), module, x, index, weights)


def _by_parts(
    forward: Callable[[Tensor], Tensor],
    module: nn.Module,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """What experts give that are called with a part for each: 0 where it is not named."""
    numbers = torch.arange(len(next(iter(stacked(module).values()))), device=x.device)
    named = (index.t() == numbers[:, None, None])[..., None]  # (experts, slots, tokens, 1)
    made = forward(torch.where(named, x, 0.0).flatten(0, 2))
    by_slot = made.view(len(numbers), *index.t().shape, -1).sum(0)
    return (weights.t()[..., None] * by_slot).sum(0)
