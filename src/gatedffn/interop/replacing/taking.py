"""A module of somebody else's model that is computed here, in place, and given back.

The module stays the object it was, with its children, its parameters and its hooks: `take_over`
gives it what the computation needs, and a class of its own that is both one of ours and what it
was before; `give_back` takes both away again. PyTorch's `parametrize` and `fully_shard` do the
same. Nothing is moved or copied, so every reference to the module, its state dict and its
optimiser stay what they were.
"""

from collections.abc import Mapping
from functools import update_wrapper
from typing import Any, ClassVar

from torch import nn

from gatedffn.errors import SettingError
from gatedffn.interop.replacing.roles import BlockRoles, Settings, State
from gatedffn.roles import Path, at, hooked, is_untouched
from gatedffn.variants import VARIANTS

STATE = "_gatedffn"  # what a replaced module was, and by being there that it is one


class Replaced(nn.Module):
    """What a module becomes that is taken over, beside what it was."""

    _gatedffn: State
    _roles: BlockRoles
    _kind: ClassVar[type["Replaced"]]  # which of ours it is
    # What a module gets beside its class.
    _given: ClassVar[tuple[str, ...]] = (STATE, "_roles", "_row", "save", "backend")

    def _gatedffn_own_code(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computed before it was taken over, by its own forward."""
        original = self._gatedffn.original
        return original.forward(as_before(self, original, self._given), *args, **kwargs)

    def __init_subclass__(cls) -> None:
        # The original's must not run: it may enter the class in a register, by its name.
        pass

    def __prepare_scriptable__(self) -> nn.Module:
        raise SettingError(
            f"torch.jit.script compiles no {type(self).__name__} that gatedffn.replace has taken "
            "over: undo that first, or use torch.compile or torch.export"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        kinds = self._kind, self._gatedffn.original
        return _revived, kinds, self.__getstate__()  # type: ignore[no-untyped-call]


def fixed_of(module: nn.Module, roles: BlockRoles) -> tuple[tuple[Path, str, object], ...]:
    """What the formula may depend on: a limit, a function, the kind of a GELU."""
    found: list[tuple[Path, str, object]] = []
    for path in ((), *(path for path, _ in roles.watched)):
        # A block itself has flags too, such as for checkpointing, that change nothing here.
        kinds = (int, float) if not path else (int, float, str)
        for name, value in vars(at(module, path)).items():
            flag = name == "training" or (isinstance(value, bool) and not path)
            function = callable(value) and not isinstance(value, type)
            # One that was set around its own forward calls that, or is called instead of it.
            own = not name.startswith("_") and name != "forward"
            if own and not flag and (function or isinstance(value, kinds)):
                found.append((path, name, value))
    return tuple(found)


def why_changed(module: nn.Module, roles: BlockRoles) -> str | None:
    """Why a module may compute something else than was found out; None when it does not."""
    if roles.watched and hooked():
        return "a hook on all modules is to see those that are not projections"
    for path, kind in roles.watched:
        if not is_untouched(at(module, path), kind):
            return f"{'.'.join(path)} is another module than it was, or has a hook"
    for path, name, value in roles.fixed:
        if at(module, path).__dict__.get(name) != value:
            return f"{'.'.join((*path, name))} is not what it was"
    return None


def inputs_of(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """The inputs of those names, in their order; None when there are others, or some are not given.

    >>> inputs_of(("x", "index"), (1,), {"index": 2}), inputs_of(("x",), (1,), {"mask": 2})
    ((1, 2), None)
    """
    if not kwargs:
        return args if len(args) == len(names) else None
    rest = names[len(args) :]
    if len(args) + len(kwargs) != len(names) or not all(name in kwargs for name in rest):
        return None
    return (*args, *(kwargs[name] for name in rest))


def as_before(module: nn.Module, original: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An object of a module's own class that holds what the module holds but for some names."""
    own = object.__new__(original)
    vars(own).update({name: value for name, value in vars(module).items() if name not in names})
    return own


_CLASSES: dict[tuple[type[Replaced], type[nn.Module]], type[Replaced]] = {}


def class_for(kind: type[Replaced], original: type[nn.Module]) -> type[Replaced]:
    """The class that is one of ours and another one."""
    if (kind, original) not in _CLASSES:
        _CLASSES[kind, original] = _new_class(kind, original)
    return _CLASSES[kind, original]


def _new_class(kind: type[Replaced], original: type[nn.Module]) -> type[Replaced]:
    # Named as before: wrappers look for the classes of layers by their names.
    names: dict[str, Any] = {
        "_kind": kind,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }

    def forward(self: Replaced, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    # Tools read from it which arguments there are.
    update_wrapper(forward, original.forward, updated=())
    names |= {"__doc__": None, "forward": forward}
    return type(original.__name__, (kind, original), names)


def _revived(kind: type[Replaced], original: type[nn.Module]) -> nn.Module:
    made = class_for(kind, original)
    module: nn.Module = made.__new__(made)
    return module


def taken_names(kind: type[Replaced]) -> frozenset[str]:
    """The names that a module gets; one that has such a name for itself is left."""
    return frozenset(kind._given) | {
        name
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name in vars(base)
        if not name.startswith("__")
    } - {"forward", "extra_repr", "reset_parameters"}


def take_over(
    kind: type[Replaced],
    module: nn.Module,
    arguments: tuple[str, ...],
    roles: BlockRoles,
    settings: Settings,
    **given: object,
) -> None:
    """Makes a module one of ours, in place."""
    original = type(module)
    module.__class__ = class_for(kind, original)
    module.__dict__.update(
        {
            STATE: State(original, arguments, settings.rounding),
            "_roles": roles,
            "_row": VARIANTS[roles.variant],
            "save": settings.save,
            "backend": settings.backend,
            **given,
        }
    )


def give_back(module: nn.Module) -> None:
    """Makes a replaced module what it was, in place."""
    state: State = module.__dict__[STATE]
    for name in type(module)._given:  # type: ignore[attr-defined]
        del module.__dict__[name]
    module.__class__ = state.original


def is_changed(module: nn.Module) -> bool:
    """Whether something else has put a forward or a class over a replaced module."""
    return "forward" in vars(module) or type(module) not in _CLASSES.values()
