"""What a block does between its projections, seen while it runs on numbers that are made up.

The projections are answered for: instead of a product each returns values that were chosen, of
every size and sign. So the element-wise part is seen exactly, whatever the weights hold, zeros
included, and in float64 in a model of any dtype.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.interop.replacing.structure import NotUnderstood
from gatedffn.interop.replacing.trial import undisturbed, values
from gatedffn.roles import Path, Projection, at

VALUES = 2048  # numbers that a hidden branch is seen on, at least


class DoesNotRun(NotUnderstood):
    """A forward that raises."""


class DoesNotCall(NotUnderstood):
    """A forward that reads the weights of its projections by itself."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, or of a function that the block has as an attribute."""

    path: Path
    given: Tensor
    made: Tensor
    silent: bool  # a module that in inference hands on what it gets


@dataclass(slots=True)
class Recording:
    """One run of a block: what went into the projections, what they answered, all other calls."""

    x: Tensor
    given: dict[Path, Tensor] = field(default_factory=dict)
    answered: dict[Path, Tensor] = field(default_factory=dict)
    handed: dict[Path, Tensor] = field(default_factory=dict)  # the same, for the block to change
    calls: list[Call] = field(default_factory=list)
    before: int = 0  # how many of these came before the first projection
    result: Tensor | None = None
    changed: tuple[str, ...] = ()  # attributes that the forward sets

    def forget(self) -> None:
        """Makes it as if nothing had run."""
        self.given.clear()
        self.answered.clear()
        self.handed.clear()
        self.calls.clear()

    def through(self, end: Tensor, start: Callable[[Tensor], bool]) -> tuple[Path, ...] | None:
        """The modules that led, one after the other, from a tensor with a property to another."""
        chain: list[Path] = []
        before = len(self.calls)
        while True:
            place = self.maker(end, before)
            call = None if place is None else self.calls[place]
            before = place or 0
            if start(end) and not (call is not None and call.silent):
                return tuple(chain)
            if call is None:
                return None
            chain.insert(0, call.path)
            end = call.given

    def maker(self, made: Tensor, before: int) -> int | None:
        """The place of the last of the first so many calls that made a tensor."""
        places = reversed(range(before))
        return next((place for place in places if same(self.calls[place].made, made)), None)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, a change of dtype apart.

    >>> same(torch.ones(2), torch.ones(2, dtype=torch.float64))
    True
    """
    if one is other:
        return True
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def arguments(module: nn.Module) -> list[str]:
    """The names of what the forward of a module must be given.

    Raises:
        NotUnderstood: something must be given by name, or nothing at all.
    """
    required = []
    for parameter in inspect.signature(type(module).forward).parameters.values():
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise NotUnderstood(f"its forward must be given {parameter.name} by name")
        required.append(parameter.name)
    if len(required) < 2:
        raise NotUnderstood("its forward takes no input")
    return required[1:]


def run(
    module: nn.Module, x: Tensor, others: int, before: Callable[[], None] = lambda: None
) -> Any:
    """What the forward of a block returns for an input and a number of other arguments.

    These are None, as a mask that is not there, or the input once more, as a residual. `before` is
    called before each attempt.

    Raises:
        NotUnderstood: the forward fails with either.
    """
    attempts: list[list[Any]] = [[None] * others]
    if others:
        attempts.append([x] * others)
    for place, rest in enumerate(attempts):
        before()
        try:
            return type(module).forward(module, x, *rest)
        except NotUnderstood:
            raise
        except Exception as error:
            # Whatever a stranger's code raises on numbers like these, it is left as it is.
            if place == len(attempts) - 1:
                first = f"{type(error).__name__}: {error}".splitlines()[0]
                raise DoesNotRun(f"its forward cannot be run alone ({first})") from error
    raise AssertionError


def record(
    module: nn.Module, projections: tuple[Projection, ...], dtype: torch.dtype, training: bool
) -> Recording:
    """Runs the forward of a block with projections that answer with chosen values of a dtype.

    Raises:
        NotUnderstood: the forward fails on such an input, or does not call each projection once.
    """
    device = at(module, projections[0].path)._parameters["weight"].device  # type: ignore[union-attr]
    generator = torch.Generator("cpu").manual_seed(0)
    width = min(p.d_out for p in projections)
    tokens = max(2, -(-VALUES // (2 * width)))
    own = at(module, projections[0].path)._parameters["weight"].dtype  # type: ignore[union-attr]
    x = values((2, tokens, projections[0].d_in), generator)
    x = x.clamp(-torch.finfo(own).max, torch.finfo(own).max).to(device, own)
    recording = Recording(x)
    limit = torch.finfo(dtype).max ** 0.5  # float16 holds products then

    def answer(projection: Projection) -> Callable[..., Tensor]:
        def forward(given: Tensor) -> Tensor:
            if projection.path in recording.given:
                raise NotUnderstood(f"its forward calls {projection.name} more than once")
            shape = (*given.shape[:-1], projection.d_out)
            made = values(shape, generator).clamp(-limit, limit)
            made = made.to(device, dtype).requires_grad_(not training)
            if not recording.given:
                recording.before = len(recording.calls)
            recording.given[projection.path] = given
            recording.answered[projection.path] = made
            recording.handed[projection.path] = made.clone()
            return recording.handed[projection.path]

        return forward

    def watch(path: Path, original: Callable[..., Any], silent: bool = False) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(made, Tensor):
                recording.calls.append(Call(path, args[0], made, silent))
            return made

        return forward

    others = len(arguments(module)) - 1
    buffers = [(n, b) for n, b in module.named_buffers() if not b.is_inference()]
    versions = [(name, buffer, buffer._version) for name, buffer in buffers]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(module, training))
        for projection in projections:
            stack.enter_context(_instead(at(module, projection.path), answer(projection)))
        for path, child in bystanders(module, projections):
            silent = isinstance(child, (nn.Dropout, nn.Identity))
            stack.enter_context(_instead(child, watch(path, child.forward, silent)))
        for name, function in _functions(module):
            stack.callback(vars(module).__setitem__, name, function)
            vars(module)[name] = watch((name,), function)
        attributes = attributes_of(module)
        result = run(module, x, others, recording.forget)
        recording.changed = changed_since(attributes)
    changed = [name for name, buffer, version in versions if buffer._version != version]
    if changed:
        raise NotUnderstood(f"its forward changes {', '.join(changed)}")
    if not recording.given:
        raise DoesNotCall("its forward does not call its projections")
    missing = [p.name for p in projections if p.path not in recording.given]
    if missing:
        raise NotUnderstood(f"its forward does not call {', '.join(missing)}")
    recording.result = result if isinstance(result, Tensor) else None
    return recording


def bystanders(
    module: nn.Module, projections: tuple[Projection, ...]
) -> Iterator[tuple[Path, nn.Module]]:
    """Every module of a block that is no projection and holds none."""
    held = {p.path[:i] for p in projections for i in range(len(p.path) + 1)}
    for name, child in module.named_modules(remove_duplicate=False):
        path = tuple(name.split(".")) if name else ()
        if path not in held and not any(path[: len(p.path)] == p.path for p in projections):
            yield path, child


def _functions(module: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
    ]


Attributes = list[tuple[nn.Module, dict[str, tuple[int, int]]]]


def attributes_of(module: nn.Module) -> Attributes:
    """What the attributes of a module and of all in it are, for `changed_since`."""
    return [(m, _attributes(m)) for m in module.modules()]


def changed_since(attributes: Attributes) -> tuple[str, ...]:
    """The names of the attributes that are something else by now."""
    return tuple(
        name
        for m, before in attributes
        for after in [_attributes(m)]
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    )


def _attributes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which object each attribute of a module is, and how much a collection holds."""
    # `undisturbed` holds the objects meanwhile, so that no other gets the same id.
    return {
        name: (id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
        for name, value in vars(module).items()
    }


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
