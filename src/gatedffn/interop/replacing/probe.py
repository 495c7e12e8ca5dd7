"""Finds out what a candidate computes, by running it, and describes it as `Roles`."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from gatedffn.functional import ORDERS, Order, split_packed
from gatedffn.interop.replacing.checks import (
    Branches,
    Split,
    check_gradients,
    check_parameters,
    differs,
    mixes,
)
from gatedffn.interop.replacing.elsewhere import is_elsewhere
from gatedffn.interop.replacing.hypotheses import (
    Formula,
    compute,
    formulas,
    matching,
    numbers,
    own_parameters,
)
from gatedffn.interop.replacing.recording import DoesNotCall, DoesNotRun, Recording, record, same
from gatedffn.interop.replacing.roles import BlockRoles
from gatedffn.interop.replacing.standing import stand_in
from gatedffn.interop.replacing.structure import Candidate, NotUnderstood
from gatedffn.roles import Path, Projection, at


def roles_of(candidate: Candidate) -> BlockRoles:
    """The roles of the parts of a candidate.

    Raises:
        NotUnderstood: it computes something that no variant does, or it cannot be told.
    """
    if candidate.reason is not None:
        raise candidate.reason
    own = _dtype(candidate)
    reason: NotUnderstood | None = None
    # Nearly everything can be told in float64; what was written with fewer digits, in float32. A
    # module that insists on its dtype is asked as a copy.
    for dtype in (torch.float64, torch.float32)[: 1 if own == torch.float64 else 2]:
        for module in (None, candidate.module)[: 1 if own == dtype else 2]:
            asked = candidate
            if module is not None:
                record(module, candidate.projections, own, training=False)  # or no copy can help
                asked = replace(candidate, module=_copy(candidate, dtype))
            try:
                roles = _roles(asked, dtype)
                _check_own_dtype(candidate, roles, dtype)
                return roles
            except DoesNotRun as error:
                reason = error
            except DoesNotCall:
                raise
            except NotUnderstood as error:
                reason = error
                break
    assert reason is not None
    raise reason


def _dtype(candidate: Candidate) -> torch.dtype:
    """That of its projections."""
    weight = at(candidate.module, candidate.projections[0].path)._parameters["weight"]
    assert weight is not None
    return weight.dtype


def part_of(candidate: Candidate) -> tuple[Projection, ...] | None:
    """The projections among those of a candidate that are a feed-forward, the one down last.

    A run shows it: what the last one gets is made of the others alone, value by value, and bends.
    That of attention is made of other places too, and that of a factored matrix does not bend.
    """
    if not candidate.projections:
        return None
    module = candidate.module
    own = _dtype(candidate)
    try:
        if is_elsewhere(module.parameters()):
            module = stand_in(module, numbers=False)
        run = record(module, candidate.projections, own, training=False)
        for down in candidate.projections:
            first = _behind(run, candidate.projections, run.given[down.path])
            if first and _closes_block(first, down) and _by_value(run, first, down):
                return *first, down
    except NotUnderstood:
        pass
    return None


def _behind(run: Recording, projections: tuple[Projection, ...], seen: Tensor) -> list[Projection]:
    """The projections from whose answers a value was made by more than linear steps."""
    if not seen.requires_grad:
        return []
    answers = [run.answered[p.path] for p in projections]
    try:
        found = torch.autograd.grad(
            seen.sum(), answers, retain_graph=True, materialize_grads=True, allow_unused=True
        )
    except Exception as error:  # whatever a stranger's backward raises
        raise NotUnderstood(f"its hidden values have no gradient ({error})") from error
    made = {p: g.flatten(0, -2) for p, g in zip(projections, found, strict=True) if g.any()}
    bends = any(not torch.equal(g, g[:1].expand_as(g)) for g in made.values())
    return [*made] if bends else []


def _closes_block(first: list[Projection], down: Projection) -> bool:
    """Whether the sizes are those of gate, up and down, or of what stands for them."""
    widths = {p.d_out for p in first}
    one = first[0]
    fits = one.d_out in ((down.d_in,) if len(first) == 2 else (down.d_in, 2 * down.d_in))
    return len(first) <= 2 and len(widths) == 1 and fits and one.d_in == down.d_out


def _by_value(run: Recording, first: list[Projection], down: Projection) -> bool:
    seen = run.given[down.path]
    for split in splits_of(first, down).values():
        _, up = split(run)
        if up.shape == seen.shape and not mixes(run, split, seen):
            return True
    return False


def _roles(candidate: Candidate, dtype: torch.dtype) -> BlockRoles:
    module, projections = candidate.module, candidate.projections
    run = record(module, projections, dtype, training=False)
    if run.changed:
        raise NotUnderstood(f"its forward sets {', '.join(dict.fromkeys(run.changed))}")
    called = [p for path in run.given for p in projections if p.path == path]
    down = called[-1] if len(called) > 1 else None
    first = called if down is None else called[:-1]
    if len(first) == 2 and (first[0].d_out != first[1].d_out or first[0].d_in != first[1].d_in):
        raise NotUnderstood("the two projections that should be gate and up differ in size")
    around = candidate.around
    before: tuple[Path, ...] | None = ()
    if not around:
        before = _chain(run, [run.given[p.path] for p in first], lambda t: same(run.x, t))
        if before is None:
            around = True
    end = run.result if down is None else run.given[down.path]
    if end is None:
        raise NotUnderstood("its forward does not return one tensor")
    splits = splits_of(first, down)
    roles = _match(module, run, splits, end, first, down)
    scale, after = _ending(module, run, down)
    if after is None:
        around = True
    if around:
        return _around(candidate, roles, dtype)
    assert before is not None
    assert after is not None
    used = {*before, *roles.hidden, *after}
    roles = _with(
        roles,
        around=None,
        before=before,
        after=after,
        output_scale=scale,
        watched=tuple(
            (path, type(child))
            for path, child in others(module, projections)
            if not any(path[: len(known)] == known for known in used)
        ),
    )
    check_parameters(module, roles)
    own_training = _wrapped(type(module)) or differs(
        module, projections, roles, dtype, training=True
    )
    return _with(roles, own_training=own_training)


def _wrapped(kind: type[nn.Module]) -> bool:
    """Whether a base has wrapped the forward that a class was written with.

    transformers does so for checkpointing, and the wrapper asks which class it runs in.
    """
    hooks = (base for base in kind.__mro__[:-1] if "__init_subclass__" in vars(base))
    return hasattr(kind.forward, "__wrapped__") and any(True for _ in hooks)


def _copy(candidate: Candidate, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, without the matrices: its projections are answered for."""
    parameters = [
        p for place in candidate.projections for p in at(candidate.module, place.path).parameters()
    ]
    stand_ins = [torch.empty(1, dtype=dtype, device=p.device).expand(p.shape) for p in parameters]
    known: dict[int, object] = {
        id(p): nn.Parameter(t, requires_grad=False)
        for p, t in zip(parameters, stand_ins, strict=True)
    }
    return copy.deepcopy(candidate.module, known).to(dtype)


def _check_own_dtype(candidate: Candidate, roles: BlockRoles, dtype: torch.dtype) -> None:
    own = _dtype(candidate)
    known = own == dtype or roles.around is not None
    if not known and differs(candidate.module, candidate.projections, roles, own, training=False):
        raise NotUnderstood(f"in {own} it computes something else than in {dtype}")


def _with(roles: BlockRoles, **changes: object) -> BlockRoles:
    return replace(roles, **changes)  # type: ignore[arg-type]


def others(module: nn.Module, projections: tuple[Projection, ...]) -> list[tuple[Path, nn.Module]]:
    """Every module of a block but itself and its projections."""
    own = {p.path for p in projections}
    named = ((tuple(n.split(".")), m) for n, m in module.named_modules(remove_duplicate=False) if n)
    return [(path, child) for path, child in named if path not in own]


def _chain(
    run: Recording, ends: Sequence[Tensor], start: Callable[[Tensor], bool]
) -> tuple[Path, ...] | None:
    """The modules that lead to all of some tensors alike."""
    chains = {run.through(end, start) for end in ends}
    return chains.pop() if len(chains) == 1 else None


def splits_of(first: Sequence[Projection], down: Projection | None) -> dict[str, Split]:
    """The ways in which the answers of the first projections can be gate and up, by a word."""
    paths = [p.path for p in first]
    if len(paths) == 2:
        return {
            "first": lambda run: (run.answered[paths[0]], run.answered[paths[1]]),
            "second": lambda run: (run.answered[paths[1]], run.answered[paths[0]]),
        }
    plain: dict[str, Split] = {"": lambda run: (None, run.answered[paths[0]])}

    def packed(order: Order, run: Recording) -> Branches:
        return split_packed(run.answered[paths[0]], -1, order)

    halves: dict[str, Split] = {}
    if first[0].d_out % 2 == 0:
        halves = {order: partial(packed, order) for order in ORDERS}
    if down is None:
        return plain | halves
    return plain if down.d_in == first[0].d_out else halves


def _match(
    module: nn.Module,
    run: Recording,
    splits: dict[str, Split],
    end: Tensor,
    first: Sequence[Projection],
    down: Projection | None,
) -> BlockRoles:
    """Walks back from the end of the hidden values until a variant explains them."""
    hidden: list[Path] = []
    seen, before = end, len(run.calls)
    while True:
        if any(same(seen, answer) for answer in run.answered.values()):
            raise NotUnderstood(_why_unknown(module, splits, run, end))
        place = run.maker(seen, before)
        call = None if place is None else run.calls[place]
        silent = call is not None and call.silent
        found = None if silent else _formula(module, run, splits, seen, before)
        if found is not None:
            break
        if call is None or place is None or not _is_module(module, call.path):
            raise NotUnderstood(_why_unknown(module, splits, run, end))
        hidden.insert(0, call.path)
        seen, before = call.given, place
    word, formula, activation = found
    check_gradients(module, run, splits[word], formula, seen)
    roles = described(word, formula, first, down)
    return _with(roles, hidden=tuple(hidden), around=activation)


def described(
    word: str, formula: Formula, first: Sequence[Projection], down: Projection | None
) -> BlockRoles:
    """Roles from a formula and the word for which projection is which."""
    gate, up, order = None, first[0], None
    if word in ("first", "second"):
        gate, up = (first[0], first[1]) if word == "first" else (first[1], first[0])
    elif word:
        order = word
    return BlockRoles(
        variant=formula.row.name,
        up=up,
        gate=gate,
        down=down,
        order=order,  # type: ignore[arg-type]
        parameters={n: v for n, v in formula.parameters.items() if n not in formula.learned},
        learned=formula.learned,
        gate_scale=formula.gate_scale,
    )


def _is_module(module: nn.Module, path: Path) -> bool:
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return False
        module = child
    return True


def _formula(
    module: nn.Module, run: Recording, splits: dict[str, Split], seen: Tensor, before: int
) -> tuple[str, Formula, str | None] | None:
    """The formula for what was seen, the word for its roles, and the name of the activation."""
    with torch.no_grad():
        for word, split in splits.items():
            gate, up = split(run)
            first = up if gate is None else gate
            if first.shape != seen.shape or mixes(run, split, seen):
                continue
            calls = [c for c in run.calls[run.before : before] if c.given.shape == first.shape]
            paths = [c.path for c in calls if _is_module(module, c.path)]
            handed = next(iter(run.handed.values()))
            activation = next((c.path[0] for c in calls if c.given is handed), None)
            place = next((p for p in paths if any(own_parameters(at(module, p)))), ())
            found = explaining(module, place, gate, up, seen)
            if found is not None:
                return word, found, activation
    return None


def explaining(
    module: nn.Module, activation: Path, gate: Tensor | None, up: Tensor, seen: Tensor
) -> Formula | None:
    """The formula that gives what was seen; `activation` is a module with parameters, or ()."""
    branches = [t for t in (gate, up) if t is not None]
    function = partial(compute, module=module, gate=gate, up=up)
    for tried in formulas(module, activation, gated=gate is not None):
        found = matching(tried, function, seen, branches)
        if found is not None:
            return found
    return None


def _ending(
    module: nn.Module, run: Recording, down: Projection | None
) -> tuple[float, tuple[Path, ...] | None]:
    """What the output of the last projection is multiplied by, and the modules that follow."""
    if down is None:
        return 1.0, ()
    if run.result is None:
        return 1.0, None
    made = run.answered[down.path]
    for scale in (1.0, *numbers(module)):
        scaled = made if scale == 1.0 else made * scale
        after = run.through(run.result, partial(same, scaled))
        if after is not None:
            return scale, after
    return 1.0, None


def _why_unknown(module: nn.Module, splits: dict[str, Split], run: Recording, end: Tensor) -> str:
    _, up = next(iter(splits.values()))(run)
    if end.shape != up.shape:
        return "what its last projection gets has another shape than its hidden values"
    called = [
        f"{'.'.join(c.path)} is {type(at(module, c.path)).__name__}"
        for c in run.calls
        if _is_module(module, c.path) and not c.silent and c.given.shape == up.shape
    ]
    saw = f" ({', '.join(dict.fromkeys(called))})" if called else ""
    return f"no variant of the table computes what happens between its projections{saw}"


def _around(candidate: Candidate, roles: BlockRoles, dtype: torch.dtype) -> BlockRoles:
    """The roles in a block that computes more than a feed-forward.

    Its own forward does the rest, so its activation must be an attribute and get exactly what the
    first projection makes, and the second projection exactly what the activation makes.
    """
    module, name = candidate.module, roles.around
    if roles.gate is not None or roles.order is not None or roles.down is None:
        raise NotUnderstood(
            "its forward does more than the feed-forward, and that is understood without a gate "
            "alone"
        )
    if name is None or any(len(p.path) != 1 for p in candidate.projections):
        raise NotUnderstood(
            "its forward does more than the feed-forward, and its activation is no attribute of it"
        )
    own = _dtype(candidate)
    for kind, training in ((dtype, False), (own, False), (dtype, True)):
        again = record(module, candidate.projections, kind, training)
        handed = again.handed[roles.up.path]
        calls = [c for c in again.calls if c.path == (name,)]
        exact = (
            len(calls) == 1
            and calls[0].given is handed
            and same(calls[0].made, again.given[roles.down.path])
        )
        if not exact and not training:
            raise NotUnderstood("between its projections it does more than its activation does")
        if not exact:
            roles = _with(roles, own_training=True)
    child = module._modules.get(name)
    watched = () if child is None else (((name,), type(child)),)
    return _with(roles, hidden=(), watched=watched)
