"""`replace`: the feed-forward blocks of a model, found, checked by numbers and taken over."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import nn

from gatedffn.errors import SettingError
from gatedffn.experts import Experts
from gatedffn.functional import Save
from gatedffn.interop.replacing.apart import why_apart
from gatedffn.interop.replacing.block import TAKEN, take_block
from gatedffn.interop.replacing.elsewhere import is_elsewhere
from gatedffn.interop.replacing.expert_block import TAKEN as TAKEN_BY_EXPERTS
from gatedffn.interop.replacing.expert_block import ReplacedExperts
from gatedffn.interop.replacing.experts import check_own, roles_of_experts
from gatedffn.interop.replacing.probe import part_of
from gatedffn.interop.replacing.proof import proven
from gatedffn.interop.replacing.recording import arguments
from gatedffn.interop.replacing.report import Block, Report, describe
from gatedffn.interop.replacing.roles import BlockRoles, Rounding, Settings
from gatedffn.interop.replacing.standing import found_once, stand_in
from gatedffn.interop.replacing.structure import (
    Candidate,
    NotUnderstood,
    Stacked,
    Touched,
    candidates,
    experts,
    scripted,
)
from gatedffn.interop.replacing.taking import Replaced, fixed_of, give_back, take_over
from gatedffn.interop.replacing.together import left_by_others
from gatedffn.layers import FeedForward
from gatedffn.ops.feed_forward import check_options
from gatedffn.roles import Projection, at, hooked, is_untouched

OWN = (FeedForward, Experts, Replaced)  # what is computed here already
OTHERS = "another process leaves it, and all that share a model replace the same blocks"
Names = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def replace(
    model: nn.Module,
    *,
    strict: bool = False,
    rounding: Rounding = "float32",
    include: Names = None,
    exclude: Names = None,
    backend: str = "auto",
    save: Save = "gate_up",
) -> Report:
    """Has the feed-forward blocks of a model computed by `FeedForward`, with the same parameters.

    A block is found by its projections and taken only when a run on chosen numbers shows which
    variant it computes, and a run on random input gives its own outputs and gradients. Everything
    else is left, with a reason. The blocks stay where they are: names, parameters, hooks and
    references do not change, and `report.undo()` makes them what they were.

    Args:
        model: any module, or a block itself. Its mode, its weights and the state of the random
            numbers are not changed.
        strict: raise when a block is left, and change nothing.
        rounding: in half precision, "float32" keeps `phi(gate) * psi(up)` in float32 until it is
            rounded once; "model" rounds where the model's own code does, bit for bit, by running
            that code. In float32 and float64 there is no difference.
        include, exclude: which blocks to look at: a pattern or several for their names, as
            "*.mlp", or a function of name and module.
        backend, save: as in `FeedForward`.

    Returns: a `Report`; print it.

    Raises:
        SettingError: a wrong argument; with `strict`, a block that was left, or none was found.

    >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> print(replace(mlp))
    1 of 1 feed-forward blocks replaced
      (the model)  Sequential  gelu: up 0, down 2
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"model is {type(model).__name__}: it must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise SettingError(
            "model is scripted, and cannot be changed: replace the module that it was made from, "
            "and use torch.compile or torch.export on that"
        )
    if rounding not in get_args(Rounding):
        raise SettingError(
            f"rounding is {rounding!r}: it must be one of {', '.join(get_args(Rounding))}"
        )
    check_options(save, None, backend)
    for name, words in (("include", include), ("exclude", exclude)):
        if words is not None and not callable(words) and not isinstance(words, (str, Sequence)):
            raise SettingError(f"{name} is {words!r}: give a pattern, several, or a function")
    settings = Settings(rounding=rounding, backend=backend, save=save)
    with torch.inference_mode(False), torch.enable_grad():
        return _replace(model, strict, settings, include, exclude)


def _replace(
    model: nn.Module, strict: bool, settings: Settings, include: Names, exclude: Names
) -> Report:
    replaced: list[tuple[Block, nn.Module]] = []
    reasons: dict[str, Block] = {}  # of the last that a module was taken for
    kept: list[Block] = []
    try:
        for name, module, found in _candidates(model, include, exclude):
            kind = type(module).__name__
            if isinstance(module, OWN):
                kept.append(Block(name, kind))
                continue
            if isinstance(found, str):
                reasons[name] = Block(name, kind, reason=found)
                continue
            if any(_within(name, block.name) or _within(block.name, name) for block, _ in replaced):
                continue
            try:
                roles = _take(found, settings)
            except NotUnderstood as reason:
                if _is_one(found, reason):
                    reasons[name] = Block(name, kind, reason=str(reason))
                continue
            replaced.append((describe(name, kind, roles), module))
        others = left_by_others(model, [block.name for block, _ in replaced])
        for block, module in [pair for pair in replaced if pair[0].name in others]:
            give_back(module)
            replaced.remove((block, module))
            reasons[block.name] = Block(block.name, block.kind, reason=OTHERS)
        all_left = list(reasons.values())
        left = [
            block
            for place, block in enumerate(all_left)
            if not any(_within(other.name, block.name) for other, _ in replaced)
            and not any(_within(block.name, other.name) for other in all_left[:place])
            and not any(_within(other.name, block.name) for other in all_left[:place])
        ]
        if strict:
            _check_strict(model, left, len(replaced) + len(kept))
    except BaseException:
        for _, module in replaced:
            give_back(module)
        raise
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    replaced.sort(key=lambda pair: places[pair[0].name])
    left.sort(key=lambda block: places[block.name])
    kept.sort(key=lambda block: places[block.name])
    return Report(replaced, left, kept)


def _check_strict(model: nn.Module, left: list[Block], found: int) -> None:
    if left:
        reasons = "".join(f"\n  {block}: {block.reason}" for block in left)
        raise SettingError(f"strict=True, and these blocks cannot be replaced:{reasons}")
    if not found:
        raise SettingError(
            f"strict=True, and {type(model).__name__} holds no feed-forward block that was found"
        )


def _is_one(found: Candidate | Stacked, reason: NotUnderstood) -> bool:
    """Whether what was left is a feed-forward all the same."""
    if isinstance(found, Stacked):
        return True
    sure = found.sure and (len(found.projections) != 1 or isinstance(reason, Touched))
    return sure or part_of(found) is not None


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.") or outer == ""


def _candidates(
    model: nn.Module, include: Names, exclude: Names
) -> Iterator[tuple[str, nn.Module, Candidate | Stacked | str]]:
    """Every module that looks like a block, the inner ones first, whole blocks before others."""
    named = list(model.named_modules())[::-1]
    inside = [name for name, module in named if isinstance(module, OWN)]
    later: list[tuple[str, nn.Module, Candidate | Stacked | str]] = []
    for name, module in named:
        if not _chosen(name, module, include, default=True):
            continue
        if _chosen(name, module, exclude, default=False):
            continue
        if isinstance(module, OWN):
            yield name, module, ""
            continue
        if any(_within(name, outer) for outer in inside):
            continue
        if experts(module):
            yield name, module, Stacked(module)
            continue
        if (apart := why_apart(module)) is not None:
            yield name, module, apart
            continue
        if scripted(module):
            yield name, module, "it is scripted: replace the module that it was made from"
            continue
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        whole: set[Projection] = set()
        for found in candidates(module, parent):
            if found.around and len(found.projections) > 2:
                part = part_of(found)
                if part is None or whole == {*part}:
                    continue
                found = dataclasses.replace(found, projections=part, sure=True)
            whole = {*found.projections}
            if found.around or len(found.projections) == 1:
                later.append((name, module, found))
            else:
                yield name, module, found
    yield from later


def _chosen(name: str, module: nn.Module, names: Names, *, default: bool) -> bool:
    if names is None:
        return default
    if callable(names):
        return bool(names(name, module))
    patterns = [names] if isinstance(names, str) else names
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _take(found: Candidate | Stacked, settings: Settings) -> BlockRoles:
    """Takes a candidate over, if it is understood and proves to compute the same.

    Raises:
        NotUnderstood: it is not or does not; it is then what it was.
    """
    if isinstance(found, Stacked):
        return _take_experts(found.module, settings)
    module = found.module
    elsewhere = is_elsewhere(module.parameters())
    # What an engine has put on these is called as before: on a block around it, on a projection
    # in its place.
    called = [module, *(at(module, p.path) for p in found.projections)] if elsewhere else []
    _check_untouched([module] if found.around else [*module.modules()], TAKEN, called)
    argument = arguments(module)[0]
    if elsewhere:

        def find() -> BlockRoles:
            return proven(dataclasses.replace(found, module=stand_in(module)))

        what = (found.projections, found.around)
        roles = found_once(module, what, find, lasting=not any(True for _ in module.buffers()))
    else:
        roles = proven(found)
    roles = dataclasses.replace(roles, fixed=fixed_of(module, roles))
    take_block(module, argument, roles, settings)
    return roles


def _take_experts(module: nn.Module, settings: Settings) -> BlockRoles:
    elsewhere = is_elsewhere(module.parameters())
    if elsewhere and "forward" in vars(module):
        raise Touched(
            "a plan has put a forward around its own: load the model with "
            'experts_implementation="gatedffn" instead'
        )
    _check_untouched([*module.modules()], TAKEN_BY_EXPERTS, [module] if elsewhere else [])
    roles = roles_of_experts(module)
    check_own(module, roles)
    try:
        take_over(ReplacedExperts, module, roles.arguments, roles, settings)
    except TypeError as error:
        raise NotUnderstood(f"its class cannot be changed: {error}") from error
    return roles


def _check_untouched(
    modules: Sequence[nn.Module], taken: frozenset[str], called: Sequence[nn.Module] = ()
) -> None:
    """Raises when the first of some modules cannot be taken over, or one of them is not itself.

    Those that are `called` as before may have hooks, and beneath the first a forward of their own.
    """
    module = modules[0]
    if isinstance(module, torch.fx.GraphModule):
        raise Touched("it is a compiled graph: replace the model before")
    if module._compiled_call_impl is not None:
        raise Touched("it was compiled by itself: replace the model before")
    for child in modules:
        kept = any(child is other for other in called) and (
            child is not module or "forward" not in vars(module)
        )
        if hooked() or not (kept or is_untouched(child, type(child))):
            raise Touched("it, or a module in it, has a hook or a forward of its own")
    # What a class of this library calls its own would hide what the block calls so.
    names = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        names |= set(vars(kind))
    clash = sorted(names & taken)
    if clash:
        raise Touched(f"it has {', '.join(clash)} of its own, which FeedForward's would hide")
