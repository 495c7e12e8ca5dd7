"""A module that stands in for one whose weights are not here, and proofs that are made once."""

import copy
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

from gatedffn.interop.replacing.elsewhere import bare, is_elsewhere, is_engines, own_class
from gatedffn.interop.replacing.structure import NotUnderstood

Found = TypeVar("Found")
_KNOWN: dict[tuple[object, ...], tuple[object, list[object]]] = {}
_MANY = 64  # kinds of modules that a process remembers
_OF_MODULES = frozenset(vars(nn.Module()))
_OURS = "_gatedffn"  # what this library puts on a module begins so


def stand_in(module: nn.Module, *, numbers: bool = True) -> nn.Module:
    """A module of the same class and sizes on the CPU, with random numbers.

    Without `numbers` all parameters are alike and take no memory.

    Raises:
        NotUnderstood: a buffer has no numbers yet, or something in it cannot be copied.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    memo: dict[int, Any] = {}
    for p in module.parameters():
        made = torch.full((1,) * p.dim(), 0.5, device="cpu")
        if numbers:
            spread = p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0
            made = made.new_empty(p.shape).uniform_(-spread, spread, generator=generator)
        memo[id(p)] = nn.Parameter(made.to(p.dtype).expand(p.shape), p.requires_grad)
    for name, b in module.named_buffers():
        if is_elsewhere((b,)):
            raise NotUnderstood(f"{name} is a buffer whose numbers are not here: load them first")
        memo[id(b)] = b.detach().to("cpu", copy=True)
    for m in reversed([*module.modules()]):  # what is inside before what it is in
        try:
            memo[id(m)] = copy.deepcopy(bare(m), memo)
        except Exception as error:  # whatever what it holds raises
            raise NotUnderstood(f"it cannot be copied ({error})") from error
    found: nn.Module = memo[id(module)]
    return found


def found_once(
    module: nn.Module, what: Hashable, find: Callable[[], Found], *, lasting: bool
) -> Found:
    """What `find` finds out of a module, once for all that are set alike where that is `lasting`.

    Raises:
        NotUnderstood: what it raises, for all of them.
    """
    held: list[object] = []  # so that no other object gets the same id
    key = (what, *_setting(module, held))
    known = _KNOWN.get(key)
    if known is None:
        found: Found | NotUnderstood
        try:
            found = find()
        except NotUnderstood as reason:
            found = reason
        known = found, held
        if lasting:
            if len(_KNOWN) >= _MANY:
                _KNOWN.clear()
            _KNOWN[key] = known
    if isinstance(known[0], NotUnderstood):
        raise type(known[0])(*known[0].args)
    return known[0]  # type: ignore[return-value]


def _setting(module: nn.Module, held: list[object]) -> tuple[object, ...]:
    """All that the forward of a module may depend on but for the numbers that it holds."""
    parts: list[object] = []
    for path, child in module.named_modules(remove_duplicate=False):
        kind = own_class(child)
        parts.append((path, kind, kind.forward))  # which others patch
        for name, t in (*child._parameters.items(), *child._buffers.items()):
            parts.append((name, t if t is None else (t.dtype, t.device, t.shape)))
        for name, value in vars(child).items():
            if name in _OF_MODULES or name.startswith(_OURS) or is_engines(name):
                continue
            plain = value is None or isinstance(value, (bool, int, float, str))
            parts.append((name, type(value), value if plain else id(value)))
            held.append(value)
    return tuple(parts)
