"""Which variant of the table computes what a block was seen to do between its projections."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatedffn.activations import Value
from gatedffn.errors import ParameterError
from gatedffn.interop.replacing.structure import NotUnderstood
from gatedffn.ops.checks import complete
from gatedffn.ops.gating import reference
from gatedffn.roles import Path, values_of
from gatedffn.variants import VARIANTS, Variant

ROUNDING = 4.0  # units of rounding that two ways of computing one formula may differ by
OFTEN = 32.0  # the same where every step is rounded to few digits
MARGIN = 10.0  # how much further off than that every other formula must be


@dataclass(frozen=True, slots=True)
class Formula:
    """A row of the table with its parameters, and what the gate is multiplied by before."""

    row: Variant
    parameters: dict[str, float]
    learned: dict[str, Path] = field(default_factory=dict)
    gate_scale: float = 1.0


def formulas(module: nn.Module, activation: Path, *, gated: bool) -> Iterator[list[Formula]]:
    """What a block could compute, the plainest first; `activation` is a module in it, or ().

    An activation with parameters computes with them, however they are set now. Otherwise it is
    the rows as they are, or with numbers that the block holds. Rows that users made come last.
    """
    own = [VARIANTS[name] for name in VARIANTS.made() if ":" not in name]
    rows = [row for row in (*VARIANTS.values(), *own) if row.gated is gated]
    held = own_parameters(module.get_submodule(".".join(activation))) if activation else []
    if held:
        yield [formula for row in rows for formula in _learned(row, activation, held)]
        return
    yield [Formula(row, row.defaults) for row in rows]
    found = numbers(module)
    changed = []
    for row in rows:
        for chosen in itertools.product(*([d, *found] for d in row.defaults.values())):
            given: dict[str, Value] = dict(zip(row.defaults, chosen, strict=True))
            try:
                complete(row, given)
            except ParameterError:
                continue
            changed.append(Formula(row, dict(zip(row.defaults, chosen, strict=True))))
    yield changed
    if gated:
        scales = [number for number in found if number != 1.0]
        pairs = itertools.product(rows, scales)
        yield [Formula(row, row.defaults, gate_scale=scale) for row, scale in pairs]


def compute(formula: Formula, module: nn.Module, gate: Tensor | None, up: Tensor) -> Tensor:
    """The hidden values that a formula gives, in at least float32."""
    parameters = values_of(formula.row.name, formula.parameters, formula.learned, module)
    if gate is None:
        return reference.gating(up, None, formula.row.name, parameters)
    gate = gate * formula.gate_scale if formula.gate_scale != 1.0 else gate
    return reference.gating(gate, up, formula.row.name, parameters)


def matching(
    candidates: Sequence[Formula],
    function: Callable[[Formula], Tensor],
    seen: Tensor,
    branches: Sequence[Tensor],
) -> Formula | None:
    """The first of some formulas that gives what was seen; None when none does.

    Raises:
        NotUnderstood: another one, which is another function, is too near to be told from it.
    """
    size = _size(branches)
    found: Formula | None = None
    near: str | None = None
    for formula in candidates:
        ratio = _off(function(formula).detach(), seen.detach(), size)
        if ratio <= 1.0 and found is None:
            found = formula
        elif ratio <= 1.0 and found is not None:
            if _off(function(formula).detach(), function(found).detach(), size) > 1.0:
                near = formula.row.name
        elif ratio < MARGIN:
            near = formula.row.name
    if found is not None and near is not None:
        raise NotUnderstood(f"{found.row.name} and {near} cannot be told apart here")
    return found


def roughly(ours: Tensor, seen: Tensor, branches: Sequence[Tensor]) -> bool:
    """Whether a result is a formula's but for rounding on the way, in a dtype of few digits."""
    size = _size(branches)
    ours, seen = ours.double(), seen.double()
    kind = torch.finfo(branches[0].dtype)
    allowed = OFTEN * kind.eps * (ours.abs() + size) + kind.tiny
    near = (ours - seen).abs() <= allowed
    return bool((near | (ours.abs() > kind.max / 8)).all())


def _size(branches: Sequence[Tensor]) -> Tensor:
    size = branches[0].detach().abs().double()
    for branch in branches[1:]:
        size = size * branch.detach().abs().double().clamp(min=1.0)
    return size


def _off(ours: Tensor, theirs: Tensor, size: Tensor) -> float:
    """The largest difference in units of what rounding explains; infinite for another shape."""
    if ours.shape != theirs.shape:
        return math.inf
    unit = torch.finfo(ours.dtype).eps
    rounded = ours.to(theirs.dtype)
    allowed = ROUNDING * unit * (rounded.abs().double() + size)
    if theirs.dtype != ours.dtype:
        allowed = allowed + 2 * torch.finfo(theirs.dtype).eps * rounded.abs().double()
        allowed = allowed + torch.finfo(theirs.dtype).tiny
    off = (rounded.double() - theirs.double()).abs() / allowed
    off = torch.where((rounded == theirs) | (rounded.isnan() & theirs.isnan()), 0.0, off)
    return math.inf if off.isnan().any() else float(off.max())


def numbers(module: nn.Module) -> list[float]:
    """The numbers that a block and the modules in it have as attributes."""
    found = set[float]()
    for child in module.modules():
        for name, value in vars(child).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and not name.startswith("_") and 0 < abs(value) < 1000:
                found.add(float(value))
    return sorted(found)


def own_parameters(module: nn.Module) -> list[str]:
    """The names of the parameters that a module itself holds."""
    return [name for name, value in module._parameters.items() if value is not None]


def _learned(row: Variant, path: Path, own: Sequence[str]) -> Iterator[Formula]:
    """A row whose parameters are all those of the module at a path, by name or the only one."""
    names = [parameter.name for parameter in row.parameters if parameter.learnable]
    if names and set(names) == set(own):
        yield Formula(row, row.defaults, {name: (*path, name) for name in names})
    elif len(names) == len(own) == 1:
        yield Formula(row, row.defaults, {names[0]: (*path, own[0])})
