"""A block of somebody else's model that is computed as a `FeedForward`.

The block stays the object it was, with its children, its parameters and its hooks: `take_over`
gives it the roles of its parts, and a class of its own that is both a `FeedForward` and what it
was before; `give_back` takes both away again. PyTorch's `parametrize` and `fully_shard` do the
same. Nothing is moved or copied, so every reference to the block, its state dict and its optimiser
stay what they were.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.errors import SettingError
from gatedffn.interop.replacing.roles import BlockRoles, Settings, State
from gatedffn.layers import FeedForward
from gatedffn.roles import at, hooked, is_untouched
from gatedffn.variants import VARIANTS


class ReplacedFeedForward(FeedForward):
    """A `FeedForward` whose parts are those of a block of another library.

    Made by `gatedffn.replace` alone. It computes by its roles as every `FeedForward` does; what
    only the block's own forward does, that forward does.
    """

    _gatedffn: State
    _roles: BlockRoles

    _by_roles = FeedForward.forward  # by a name, which the compiler of PyTorch follows

    def __init_subclass__(cls) -> None:
        # The original's must not run: it may enter the class in a register, by its name.
        pass

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        argument = self._gatedffn.argument
        if len(args) == 1 and not kwargs:
            x = args[0]
        elif not args and len(kwargs) == 1 and argument in kwargs:
            x = kwargs[argument]
        else:
            x = None
        if self._roles.around is not None:
            return _as_it_was(self, args, kwargs, self.why_modules() is None)
        if not isinstance(x, Tensor) or self.why_own_forward() is not None:
            return _as_it_was(self, args, kwargs, False)
        return self._by_roles(x)

    def why_own_forward(self) -> str | None:
        """Why the block computes as it did before; None when it does not."""
        roles = self._roles
        if roles.own_training and self.training:
            return "its own forward does something in training that none of its modules does"
        if roles.watched and hooked():
            return "a hook on all modules is to see those that are not projections"
        for path, kind in roles.watched:
            if not is_untouched(at(self, path), kind):
                return f"{'.'.join(path)} is another module than it was, or has a hook"
        for path, name, value in roles.fixed:
            if at(self, path).__dict__.get(name) != value:
                return f"{'.'.join((*path, name))} is not what it was"
        dtypes: set[torch.dtype] = set()
        for projection in roles.projections:
            weight = at(self, projection.path)._parameters.get("weight")
            if weight is not None:
                dtypes.add(weight.dtype)
        if len(dtypes) > 1:
            return "its projections have different dtypes"
        if self._gatedffn.rounding == "model":
            device = at(self, roles.up.path)._parameters.get("weight")
            kind_of = "cpu" if device is None else device.device.type
            if torch.is_autocast_enabled(kind_of):
                dtypes = {torch.get_autocast_dtype(kind_of)}
            if dtypes & {torch.float16, torch.bfloat16}:
                return "rounding='model' in half precision: only its own forward rounds as it does"
        return None

    def extra_repr(self) -> str:
        own = self._gatedffn.original.extra_repr(self)
        sizes = f"{self.d_model} -> {self.d_hidden} -> {self.d_out}"
        return ", ".join(filter(None, (own, f"gatedffn: {self.variant}", sizes)))

    def __prepare_scriptable__(self) -> nn.Module:
        raise SettingError(
            f"torch.jit.script compiles no {type(self).__name__} that gatedffn.replace has taken "
            "over: undo that first, or use torch.compile or torch.export"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revived, (self._gatedffn.original,), self.__getstate__()  # type: ignore[no-untyped-call]


STATE = "_gatedffn"  # what a replaced block was, and by being there that it is one
# What a block gets beside its class.
_GIVEN = (
    *(STATE, "_roles"),
    *("variant", "_start", "_learned_at"),
    *("save", "tile", "backend"),
)
# The names that a block gets; one that has such a name for itself is left.
TAKEN = frozenset(_GIVEN) | {
    name
    for kind in ReplacedFeedForward.__mro__[: ReplacedFeedForward.__mro__.index(nn.Module)]
    for name in vars(kind)
    if not name.startswith("__")
} - {"forward", "extra_repr", "reset_parameters"}


def _as_it_was(
    block: ReplacedFeedForward, args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool
) -> Any:
    """What the forward of a block's own class returns.

    That may ask for the class of what it gets, and run again in backward, as transformers'
    checkpointing does: so it gets an object of its class, with all that the block holds. With
    `whole` the first projection in there computes the whole layer; the activation and the
    projection down hand on what they get.
    """
    original = block._gatedffn.original
    own = object.__new__(original)
    held = {name: value for name, value in vars(block).items() if name not in _GIVEN}
    if whole:
        roles = block._roles
        assert roles.down is not None
        assert roles.around is not None
        up, down = roles.up.path[0], roles.down.path[0]
        modules: dict[str, Any] = {
            **block._modules,
            up: _StandIn(at(block, roles.up.path), block._by_roles),
            down: _StandIn(at(block, roles.down.path), _same),
        }
        (modules if roles.around in modules else held)[roles.around] = _same
        held["_modules"] = modules
    vars(own).update(held)
    result = original.forward(own, *args, **kwargs)
    for name, value in vars(own).items():
        if held.get(name) is not value:  # the forward has set it
            vars(block)[name] = value
    return result


class _StandIn:
    """A projection to everybody who asks, and something else to who calls it."""

    def __init__(self, projection: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        self.projection = projection
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.projection, name)


def _same(x: Tensor) -> Tensor:
    return x


_CLASSES: dict[type[nn.Module], type[ReplacedFeedForward]] = {}


def _class_for(original: type[nn.Module]) -> type[ReplacedFeedForward]:
    if original not in _CLASSES:
        _CLASSES[original] = _new_class(original)
    return _CLASSES[original]


def _new_class(original: type[nn.Module]) -> type[ReplacedFeedForward]:
    # Named as before: wrappers look for the classes of layers by their names.
    names: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }

    def forward(self: ReplacedFeedForward, *args: Any, **kwargs: Any) -> Any:
        return ReplacedFeedForward.forward(self, *args, **kwargs)

    # Tools read from it which arguments there are.
    update_wrapper(forward, original.forward, updated=())
    names |= {"__doc__": None, "forward": forward}
    return type(original.__name__, (ReplacedFeedForward, original), names)


def _revived(original: type[nn.Module]) -> nn.Module:
    made = _class_for(original)
    block: nn.Module = made.__new__(made)
    return block


def take_over(module: nn.Module, argument: str, roles: BlockRoles, settings: Settings) -> None:
    """Makes a block a `ReplacedFeedForward`, in place."""
    original = type(module)
    given = (
        State(original, argument, settings.rounding),
        roles,
        roles.variant,
        {**VARIANTS[roles.variant].defaults, **roles.parameters},
        roles.learned,
        settings.save,
        None,
        settings.backend,
    )
    module.__class__ = _class_for(original)
    module.__dict__.update(zip(_GIVEN, given, strict=True))


def give_back(module: nn.Module) -> None:
    """Makes a replaced block what it was, in place."""
    state: State = module.__dict__[STATE]
    for name in _GIVEN:
        del module.__dict__[name]
    module.__class__ = state.original
