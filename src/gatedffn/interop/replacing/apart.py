"""Experts whose weights are no stacks of one module: they are reported, with what they are."""

from itertools import combinations

import torch
from torch import nn

from gatedffn.interop.replacing.recording import arguments, run
from gatedffn.interop.replacing.structure import NotUnderstood, matched
from gatedffn.interop.replacing.trial import undisturbed


def why_apart(module: nn.Module) -> str | None:
    """Why the experts of a module are left as they are; None of a module that has none such."""
    return _flattened(module) or _in_children(module)


def _flattened(module: nn.Module) -> str | None:
    """Matrices of one shape whose rows are those of as many experts as the module says."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    shapes = {p.shape for p in held.values()}
    if len(held) not in (2, 3) or len(shapes) != 1 or any(p.dim() != 2 for p in held.values()):
        return None
    ((rows, d_model),) = shapes
    numbers = [n for n in vars(module).values() if type(n) is int and n > 1]
    if d_model not in numbers or not any(a * b == rows for a, b in combinations(numbers, 2)):
        return None
    return f"its experts are flattened, {' and '.join(held)} each {rows} x {d_model}"


def _in_children(module: nn.Module) -> str | None:
    """Children that hold a stack each, and a forward that goes through them."""
    stacks = {
        name: child._parameters["weight"]
        for name, child in module.named_children()
        if {n for n, p in child._parameters.items() if p is not None} == {"weight"}
    }
    held = {name: p for name, p in stacks.items() if p is not None and p.dim() == 3}
    weights = [*held.values()]
    if len(held) not in (2, 3) or len({len(p) for p in weights}) != 1 or not matched(weights):
        return None
    d_in = weights[0].shape[2]
    if any(p.is_meta for p in module.parameters()) or not _maps(module, d_in):
        return None
    return f"the stacks of its experts are in modules of their own, {' and '.join(held)}"


def _maps(module: nn.Module, d_model: int) -> bool:
    """Whether a forward makes of an input one like it: experts of attention have none."""
    weight = next(module.parameters())
    x = torch.zeros(1, 2, d_model, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng([]), undisturbed(module, False):
            made = run(module, x, len(arguments(module)) - 1)
    except NotUnderstood:
        return False
    made = made[0] if isinstance(made, tuple) else made
    return isinstance(made, torch.Tensor) and made.shape == x.shape
