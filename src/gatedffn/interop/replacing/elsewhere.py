"""Modules whose weights are not here, and modules without what an engine has put on them."""

import sys
from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from gatedffn.interop.replacing.taking import as_before
from gatedffn.ops.sharded import is_sharded

_HOOKS = frozenset(name for name, v in vars(nn.Module()).items() if type(v) is OrderedDict)


def is_elsewhere(tensors: Iterable[Tensor]) -> bool:
    """Whether the numbers of some tensors are not here: not loaded yet, or sharded.

    >>> linear = nn.Linear(2, 3)
    >>> is_elsewhere(linear.parameters()), is_elsewhere(linear.to("meta").parameters())
    (False, True)
    """
    return any(t.is_meta or is_sharded(t) for t in tensors)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, below one that `fully_shard` or `parametrize` has put over it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it nobody has
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        return type(module).__mro__[2]  # (this one, FSDPModule, the class, ...)
    return type_before_parametrizations(module)


def is_engines(name: str) -> bool:
    """Whether an attribute is what an engine put on a module: a forward around its own, a state."""
    return name == "forward" or name.startswith("__")


def bare(module: nn.Module) -> nn.Module:
    """An object that holds what a module holds, without what engines put on it."""
    names = (*_HOOKS, *(name for name in vars(module) if is_engines(name)))
    made = as_before(module, own_class(module), names)
    vars(made).update({name: OrderedDict() for name in _HOOKS})
    return made
