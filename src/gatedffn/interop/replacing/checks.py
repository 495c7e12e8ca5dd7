"""What must hold beside the formula: gradients, parameters, and what happens in training."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gatedffn.functional import split_packed
from gatedffn.interop.replacing.hypotheses import Formula, compute, matching, roughly
from gatedffn.interop.replacing.recording import Recording, record, same
from gatedffn.interop.replacing.roles import BlockRoles
from gatedffn.interop.replacing.structure import NotUnderstood, close
from gatedffn.roles import Path, Projection, at
from gatedffn.variants import VARIANTS

Branches = tuple[Tensor | None, Tensor]
Split = Callable[[Recording], Branches]


def check_parameters(module: nn.Module, roles: BlockRoles) -> None:
    """Raises unless every parameter of a block has its place in the roles."""
    paths = [p.path for p in roles.projections]
    paths += [*roles.before, *roles.hidden, *roles.after, *roles.learned.values()]
    for name, _ in module.named_parameters():
        path = tuple(name.split("."))
        if not any(path[: len(known)] == known for known in paths):
            raise NotUnderstood(f"it has a parameter of its own, {name}")


def mixes(run: Recording, split: Split, seen: Tensor) -> bool:
    """Whether a value was made of the gate and the up of other places, as attention makes it.

    No formula of the table does, and to try them all takes long.

    Raises:
        NotUnderstood: it was made of neither, as the keys of attention are.
    """
    if not seen.requires_grad:
        raise NotUnderstood("its hidden values have no gradient")
    generator = torch.Generator("cpu").manual_seed(0)
    there = torch.rand(seen.shape, generator=generator, device="cpu").to(seen.device) < 0.5
    try:
        found = torch.autograd.grad(
            seen,
            [*run.answered.values()],
            there.to(seen.dtype),
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
    except Exception as error:  # whatever a stranger's backward raises
        raise NotUnderstood(f"its hidden values have no gradient ({error})") from error
    branches = split(Recording(run.x, answered=dict(zip(run.answered, found, strict=True))))
    # Where it is infinite, 0 times it is no number.
    return any(bool((t.nan_to_num(0.0) * ~there).any()) for t in branches if t is not None)


def check_gradients(
    module: nn.Module, run: Recording, split: Split, formula: Formula, seen: Tensor
) -> None:
    """Raises unless the block's own gradients of the hidden values are those of the formula."""
    leaves = [*run.answered.values()]
    learned = [at(module, place[:-1])._parameters[place[-1]] for place in formula.learned.values()]
    leaves += [p for p in learned if p is not None and p.requires_grad]
    gate, up = split(run)
    ours = compute(formula, module, gate, up).to(seen.dtype)
    made, of_learned = [], []
    for value in (seen, ours):
        weights = torch.ones_like(value)
        found = torch.autograd.grad(
            value,
            leaves,
            weights,
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        of_answers = Recording(run.x, answered=dict(zip(run.answered, found, strict=False)))
        made.append([t for t in split(of_answers) if t is not None])
        of_learned.append(found[len(run.answered) :])
    unit = torch.finfo(seen.dtype).eps
    size = up.abs() + 1.0 if gate is None else (up.abs() + 1.0) * (gate.abs() + 1.0)
    for theirs, own in zip(*made, strict=True):
        if not ((theirs - own).abs() <= 64 * unit * (size + own.abs())).all():
            raise NotUnderstood("its gradients are not those of its formula")
    pairs = [[t.nan_to_num() for t in pair] for pair in zip(*of_learned, strict=True)]
    if not all(close(one, other) for one, other in pairs):  # infinite in float16, at most
        raise NotUnderstood("what its activation learned has another gradient than in its formula")


def differs(
    module: nn.Module,
    projections: tuple[Projection, ...],
    roles: BlockRoles,
    dtype: torch.dtype,
    *,
    training: bool,
) -> bool:
    """Whether in a mode and dtype anything happens that the roles do not explain."""
    run = record(module, projections, dtype, training)
    down = roles.down
    if run.result is None:
        return True
    gate: Tensor | None = None
    up = run.answered[roles.up.path]
    if roles.gate is not None:
        gate = run.answered[roles.gate.path]
    elif roles.order is not None:
        gate, up = split_packed(up, -1, roles.order)
    formula = Formula(
        VARIANTS[roles.variant], dict(roles.parameters), dict(roles.learned), roles.gate_scale
    )
    first = [p for p in projections if p is not down]
    if any(run.through(run.given[p.path], partial(same, run.x)) != roles.before for p in first):
        return True
    end = run.result if down is None else run.given[down.path]

    def explained(seen: Tensor) -> bool:
        branches = [t for t in (gate, up) if t is not None]
        function = partial(compute, module=module, gate=gate, up=up)
        with torch.no_grad():
            if seen.shape != up.shape:
                return False
            if dtype in (torch.float16, torch.bfloat16):
                return roughly(function(formula), seen, branches)
            return bool(matching([formula], function, seen, branches))

    if not _same_chain(run, end, explained, roles.hidden):
        return True
    if down is None:
        return False
    made = run.answered[down.path]
    scaled = made if roles.output_scale == 1.0 else made * roles.output_scale
    return not _same_chain(run, run.result, partial(same, scaled), roles.after)


def _same_chain(
    run: Recording, end: Tensor, start: Callable[[Tensor], bool], chain: tuple[Path, ...]
) -> bool:
    """Whether the modules of a chain, and nothing else, led to a tensor."""
    for path in reversed(chain):
        call = next((c for c in run.calls if c.path == path), None)
        if call is None or not same(call.made, end):
            return False
        end = call.given
    return start(end)
