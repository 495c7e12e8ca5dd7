"""What a module computes that holds the weights of several experts, told by numbers.

It is asked through twins: objects of its class with other parameters, of sizes that no model has.
So the module is never touched, nothing of its own size is computed, and what its forward makes of
the matrices is seen exactly.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from gatedffn.interop.replacing.checks import check_gradients, mixes
from gatedffn.interop.replacing.elsewhere import is_elsewhere
from gatedffn.interop.replacing.expert_block import by_roles, from_parts
from gatedffn.interop.replacing.hypotheses import Formula, compute, matching, own_parameters
from gatedffn.interop.replacing.probe import described, explaining, others, splits_of
from gatedffn.interop.replacing.recording import (
    DoesNotRun,
    Recording,
    attributes_of,
    changed_since,
    same,
)
from gatedffn.interop.replacing.roles import ExpertRoles
from gatedffn.interop.replacing.stacks import (
    Stacks,
    arguments_of,
    called,
    parameters,
    readings,
    stacked,
    twin,
)
from gatedffn.interop.replacing.standing import found_once
from gatedffn.interop.replacing.structure import NotUnderstood, Touched, close
from gatedffn.interop.replacing.taking import fixed_of
from gatedffn.interop.replacing.trial import undisturbed, values
from gatedffn.roles import Path

CHOSEN = (
    64,
    40,
)  # d_model and d_hidden of a twin; with 2 d_hidden three sizes, so a matrix fits once
RANDOM = 12, 10
LONG = 70  # tokens that all name the same experts
SPREAD = 3.0  # of the values before the activation
WEIGHT = -2.0  # a routing weight by which nothing is rounded


def roles_of_experts(module: nn.Module) -> ExpertRoles:
    """The roles of the parameters of a module of experts.

    They are found out once for modules of a class that are set alike.

    Raises:
        NotUnderstood: it computes something that no variant does, or it cannot be told.
    """

    def find() -> ExpertRoles:
        with undisturbed(module, module.training):
            return _proven(module)

    more = any(t.numel() for child in module.children() for t in child.state_dict().values())
    return found_once(module, "experts", find, lasting=not more)


def _proven(module: nn.Module) -> ExpertRoles:
    held = stacked(module)
    dtypes = {t.dtype for t in held.values()}
    if not dtypes <= {torch.float64, torch.float32, torch.bfloat16, torch.float16}:
        raise NotUnderstood("its weights are quantised")
    if len(dtypes) != 1:
        raise NotUnderstood("its weights have different dtypes")
    own = dtypes.pop()
    arguments = arguments_of(module)
    reasons: list[NotUnderstood] = []
    for stacks in readings(held):
        for dtype in (torch.float64, torch.float32)[: 1 if own == torch.float64 else 2]:
            try:
                roles = _told(module, stacks, dtype, own)
            except NotUnderstood as reason:
                reasons.append(reason)
                continue
            roles = _with_sizes(roles, stacks)
            return replace(roles, arguments=arguments, fixed=fixed_of(module, roles))
    if not reasons:
        raise NotUnderstood("the sizes of its parameters are not those of experts")
    # A reading that does not even run says the least.
    raise next((r for r in reasons if not isinstance(r, DoesNotRun)), reasons[0])


def _told(module: nn.Module, stacks: Stacks, dtype: torch.dtype, own: torch.dtype) -> ExpertRoles:
    """The roles by one reading, from twins that know their own sizes where they ask for them."""
    for numbers in (False, True):
        try:
            roles = _explained(module, stacks.sized(*CHOSEN, numbers=numbers), dtype)
            for kind in dict.fromkeys((dtype, own)):
                _compared(module, stacks.sized(*RANDOM, numbers=numbers), roles, kind, own)
        except DoesNotRun:
            if numbers:
                raise
        else:
            return roles
    raise AssertionError


def _with_sizes(roles: ExpertRoles, stacks: Stacks) -> ExpertRoles:
    """The roles with the sizes of a module instead of those of its twins."""
    sizes = {p.path: p for p in stacks.all}
    assert roles.down is not None
    gate = None if roles.gate is None else sizes[roles.gate.path]
    return replace(roles, gate=gate, up=sizes[roles.up.path], down=sizes[roles.down.path])


def _run(
    module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, *, training: bool = False
) -> Tensor:
    """What the forward of a twin gives.

    Raises:
        NotUnderstood: it raises, or gives no tensor of the shape and dtype of its input.
    """
    buffers = [(name, b, b._version) for name, b in module.named_buffers()]
    with undisturbed(module, training):
        before = attributes_of(module)
        try:
            made = called(module, x, index, weights)
        except Exception as error:  # whatever a stranger's code raises
            own = [n for n, m in module.named_children() if any(True for _ in m.parameters())]
            also = f", and {own[0]} has parameters of its own" if own else ""
            first = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DoesNotRun(
                f"its forward fails with other sizes than its own{also} ({first})"
            ) from error
        changed = [*changed_since(before), *(name for name, b, v in buffers if b._version != v)]
    if changed:
        raise NotUnderstood(f"its forward sets {', '.join(dict.fromkeys(changed))}")
    if not isinstance(made, Tensor) or made.shape != x.shape or made.dtype != x.dtype:
        raise NotUnderstood("its forward does not return one tensor like its input")
    return made


def _explained(module: nn.Module, stacks: Stacks, dtype: torch.dtype) -> ExpertRoles:
    """The roles that explain the hidden values, seen exactly through matrices that select."""
    count, (d_model, d_hidden) = stacks.count, CHOSEN
    generator = torch.Generator("cpu").manual_seed(0)
    limit = torch.finfo(dtype).max ** 0.5
    device = _device(module)
    answered: dict[Path, Tensor] = {}
    for p in stacks.first:
        made = values((d_model, p.d_out), generator).clamp(-limit, limit)
        answered[p.path] = made.to(device, dtype).requires_grad_()
    eye = torch.eye(d_model, dtype=dtype, device=device)
    matrices = {path: v.t().expand(count, -1, -1) for path, v in answered.items()}
    matrices[stacks.down.path] = eye[:, :d_hidden].expand(count, -1, -1)
    held = parameters(stacks, matrices, lambda shape: eye.new_zeros(shape))
    try:
        own = twin(module, held, dtype, stacks.numbers)
    except Exception as error:  # whatever its children raise
        raise NotUnderstood(f"it cannot be copied ({error})") from error
    some = torch.tensor([0, count // 2, count - 1], device=device)
    index = some[torch.arange(d_model, device=device) % 3, None]
    weights = torch.ones_like(index, dtype=dtype)
    y = _run(own, eye, index, weights)
    run = Recording(eye, answered=answered)
    seen = y[:, :d_hidden]
    paths = [path for path, child in others(own, ()) if any(own_parameters(child))]
    found: tuple[str, Formula] | None = None
    splits = splits_of(stacks.first, stacks.down)
    for word, split in splits.items():
        gate, up = split(run)
        if mixes(run, split, seen):
            continue
        with torch.no_grad():
            formula = explaining(own, paths[0] if paths else (), gate, up, seen)
        if formula is not None:
            found = word, formula
            break
    if found is None or found[1].gate_scale != 1.0 or y[:, d_hidden:].any():
        raise NotUnderstood("no variant of the table computes what happens between its projections")
    word, formula = found
    check_gradients(own, run, splits[word], formula, seen)
    roles = described(word, formula, stacks.first, stacks.down)
    known = [place[:-1] for place in formula.learned.values()]
    more = [path for path in paths if path not in known]
    if more:
        raise NotUnderstood(f"{'.'.join(more[0])} has parameters of its own")
    gate, up = splits[word](run)
    with torch.no_grad():
        weighed = _run(own, eye, index, WEIGHT * weights)
        before = not same(weighed, WEIGHT * y)
        if before:
            branches = [WEIGHT * t for t in (gate, up) if t is not None]
            scaled = None if gate is None else WEIGHT * gate
            ours = compute(formula, own, scaled, WEIGHT * up)
            if matching([formula], lambda _: ours, weighed[:, :d_hidden], branches) is None:
                raise NotUnderstood("it does more with the routing weights than multiply by them")
        try:
            twice = [torch.cat([t, t], -1) for t in (index, weights)]
            twice[0][:, 1] = count
            if not same(_run(own, eye, *twice), y):
                raise NotUnderstood("a slot whose index is the number of experts gives something")
        except DoesNotRun:
            pass  # what it refuses may give nothing
    return ExpertRoles(
        variant=roles.variant,
        up=roles.up,
        gate=roles.gate,
        down=roles.down,
        order=roles.order,
        parameters=roles.parameters,
        learned=roles.learned,
        watched=tuple((path, type(child)) for path, child in others(own, ())),
        arguments=(),
        biases=stacks.biases,
        weigh="input" if before else "output",
    )


def _compared(
    module: nn.Module, stacks: Stacks, roles: ExpertRoles, dtype: torch.dtype, own: torch.dtype
) -> None:
    """Raises unless on random numbers outputs and all gradients are those of the roles."""
    count, (d_model, _) = stacks.count, RANDOM
    generator = torch.Generator("cpu").manual_seed(1)
    device = _device(module)

    def random(*shape: int, spread: float = 1.0) -> Tensor:
        made = spread * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return made.to(device, dtype).requires_grad_()

    matrices = {
        p.path: random(count, p.d_out, p.d_in, spread=SPREAD * p.d_in**-0.5) for p in stacks.all
    }
    held = parameters(stacks, matrices, lambda shape: random(*shape))
    both = twin(module, held, dtype, stacks.numbers)
    tokens = count // 2 + 6
    named = torch.cat(
        [
            torch.randperm(count, generator=generator, device="cpu"),
            torch.randint(count, (2 * tokens - count,), generator=generator, device="cpu"),
        ]
    )
    index = named.view(tokens, 2).to(device)
    crowded = torch.tensor([[count - 1, count // 2]], device=device).expand(LONG, 2)
    x, long, weights, more = (
        random(*shape) for shape in ((tokens, d_model), (LONG, d_model), (tokens, 2), (LONG, 2))
    )
    leaves = [x, weights, *(t for t in both._parameters.values() if t is not None)]
    cotangent = random(tokens, d_model).detach()
    parts = random(2 * count, d_model)
    with torch.no_grad():
        parts[::2] = 0.0  # as those of a token that another expert was chosen for
    results = []
    for ours in (False, True):

        def made(*inputs: Tensor, training: bool = False, ours: bool = ours) -> Tensor:
            if ours:
                with undisturbed(both, training):
                    return by_roles(both, roles, "gate_up", "definition", *inputs)
            return _run(both, *inputs, training=training)

        y = made(x, index, weights)
        of = torch.autograd.grad(y, leaves, cotangent, materialize_grads=True, allow_unused=True)
        with torch.no_grad():
            rest = [
                made(long, crowded, more),
                made(x[:1], index[:1], weights[:1]),
                made(x, index, weights, training=True),
            ]
        if len(arguments_of(module)) == 1:
            rest += _of_parts(both, roles if ours else None, parts)
        results.append([y, *of, *rest])
    if not all(close(one, other) for one, other in zip(*results, strict=True)):
        where = f" in {dtype}" if dtype == own else ""
        raise NotUnderstood(f"on random input it gives another result or gradient{where}")


def _of_parts(module: nn.Module, roles: ExpertRoles | None, parts: Tensor) -> list[Tensor]:
    """The output and its gradient for the rows of all experts, by roles or by the module itself."""
    with undisturbed(module, False):
        if roles is None:
            y = type(module).forward(module, parts)
        else:
            count = len(parts) // 2
            y = by_roles(module, roles, "gate_up", "definition", *from_parts(parts, count))
        return [y, *torch.autograd.grad(y.sum(), parts)]


def check_own(module: nn.Module, roles: ExpertRoles) -> None:
    """Raises unless a module gives with its own weights, where they are here, what its roles give.

    Raises:
        Touched: its weights can have no gradient.
    """
    held = stacked(module)
    if is_elsewhere(held.values()):
        return
    weight = held[roles.up.path[0]]
    if any(t.is_inference() for t in held.values()):
        raise Touched("its weights were made in inference mode, and can have no gradient: clone it")
    both = twin(module, {name: t.detach() for name, t in held.items()}, weight.dtype)
    generator = torch.Generator("cpu").manual_seed(2)
    x = torch.randn(5, roles.up.d_in, generator=generator, device="cpu").to(weight)
    named = torch.randint(weight.shape[0], (5, 2), generator=generator, device="cpu")
    index, weights = named.to(weight.device), torch.rand_like(x[:, :2])
    with torch.no_grad(), undisturbed(both, False):
        theirs = _run(both, x, index, weights)
        ours = by_roles(both, roles, "gate_up", "definition", x, index, weights)
    if not close(ours, theirs):
        raise NotUnderstood("with its own weights it gives another result")


def _device(module: nn.Module) -> torch.device:
    device = next(iter(stacked(module).values())).device
    return torch.device("cpu") if device.type == "meta" else device
