"""A block of somebody else's model that is computed as a `FeedForward`.

The block stays the object it was, with its children, its parameters and its hooks: `take_over`
gives it a class of its own that is both a `FeedForward` and what it was before, and `give_back`
takes it away again. PyTorch's `parametrize` and `fully_shard` do the same. Nothing is moved or
copied, so every reference to the block, its state dict and its optimiser stay what they were.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn import functional
from gatedffn.activations import Value
from gatedffn.errors import ShapeError
from gatedffn.functional import Save
from gatedffn.interop.replacing.roles import STATE, Path, Projection, Roles, Settings, State, at
from gatedffn.layers import FeedForward, is_plain, is_untouched
from gatedffn.ops.feed_forward import Weights
from gatedffn.variants import VARIANTS


class ReplacedFeedForward(FeedForward):
    """A `FeedForward` whose projections are those of a block of another library.

    Made by `gatedffn.replace` alone. Where the weights cannot be read (an adapter, a hook,
    dropout, a multiplier) the modules are called; what only the block's own forward does, it does.
    """

    def __init_subclass__(cls) -> None:
        # The original's must not run: it may enter the class in a register, by its name.
        pass

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._state()
        if len(args) == 1 and not kwargs:
            x = args[0]
        elif not args and len(kwargs) == 1 and state.argument in kwargs:
            x = kwargs[state.argument]
        else:
            x = None
        roles = state.roles
        if roles.around is not None:
            whole = self.why_modules() is None
            return state.original.forward(_Around(self) if whole else self, *args, **kwargs)
        if not isinstance(x, Tensor) or self.why_own_forward() is not None:
            return state.original.forward(self, *args, **kwargs)
        return self._compute(x) if self._why_called() is None else self._by_modules(x)

    def _state(self) -> State:
        found: State = self.__dict__[STATE]
        return found

    def _compute(self, x: Tensor) -> Tensor:
        state = self._state()
        roles, settings = state.roles, state.settings
        x = self._through(roles.before, x)
        if x.dim() == 0 or x.shape[-1] != roles.up.d_in:
            raise ShapeError(
                f"x is {tuple(x.shape)}: its last size must be d_model, {roles.up.d_in}"
            )
        y = functional.layer(
            x,
            self.weights(),
            VARIANTS[roles.variant],
            self.activation_parameters(),
            settings.save,
            None,
            settings.backend,
        )
        return self._through(roles.after, y)

    def _by_modules(self, x: Tensor) -> Tensor:
        roles = self._state().roles
        x = self._through(roles.before, x)
        parameters = self.activation_parameters()
        up: Tensor = at(self, roles.up.path)(x)
        gate: Tensor | None = None
        if roles.gate is not None:
            gate = at(self, roles.gate.path)(x)
        elif roles.order is not None:
            gate, up = functional.split_packed(up, -1, roles.order)
        if gate is None:
            hidden = functional.activation(up, roles.variant, **parameters)
        else:
            if roles.gate_scale != 1.0:
                gate = gate * roles.gate_scale
            hidden = functional.gating(gate, up, roles.variant, **parameters)
        hidden = self._through(roles.hidden, hidden)
        if roles.down is not None:
            hidden = at(self, roles.down.path)(hidden)
        if roles.output_scale != 1.0:
            hidden = hidden * roles.output_scale
        return self._through(roles.after, hidden)

    def _through(self, paths: tuple[Path, ...], x: Tensor) -> Tensor:
        for path in paths:
            x = at(self, path)(x)
        return x

    def why_own_forward(self) -> str | None:
        """Why the block computes as it did before; None when it does not."""
        roles = self._state().roles
        if roles.own_training and self.training:
            return "its own forward does something in training that none of its modules does"
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
        if self._state().settings.rounding == "model":
            device = at(self, roles.up.path)._parameters.get("weight")
            kind_of = "cpu" if device is None else device.device.type
            if torch.is_autocast_enabled(kind_of):
                dtypes = {torch.get_autocast_dtype(kind_of)}
            if dtypes & {torch.float16, torch.bfloat16}:
                return "rounding='model' in half precision: only its own forward rounds as it does"
        return None

    def why_modules(self) -> str | None:
        return self.why_own_forward() or self._why_called()

    def _why_called(self) -> str | None:
        """Why the projections are called, where the block computes in its own way."""
        roles = self._state().roles
        if roles.gate_scale != 1.0 or roles.output_scale != 1.0:
            return "it has multipliers"
        for path in roles.hidden:
            child = at(self, path)
            if not _silent(child):
                return f"{'.'.join(path)} acts between the projections"
        for projection in roles.projections:
            if not is_plain(at(self, projection.path), projection.kind):
                return (
                    f"{projection.name} is no longer a plain {projection.kind.__name__}, or has a "
                    "hook or a forward of its own"
                )
        return None

    def weights(self) -> Weights:
        roles = self._state().roles
        up, up_bias = self._matrix(roles.up)
        activated, activated_bias, linear, linear_bias = up, up_bias, None, None
        if roles.order is not None:
            activated, linear = functional.split_packed(up, 0, roles.order)
            if up_bias is not None:
                activated_bias, linear_bias = functional.split_packed(up_bias, 0, roles.order)
        elif roles.gate is not None:
            activated, activated_bias = self._matrix(roles.gate)
            linear, linear_bias = up, up_bias
        down = down_bias = None
        if roles.down is not None:
            down, down_bias = self._matrix(roles.down)
        return Weights(activated, linear, down, activated_bias, linear_bias, down_bias)

    def _matrix(self, projection: Projection) -> tuple[Tensor, Tensor | None]:
        parameters = at(self, projection.path)._parameters
        weight = parameters["weight"]
        assert weight is not None
        return weight.t() if projection.transposed else weight, parameters.get("bias")

    def activation_parameters(self) -> dict[str, Value]:
        roles = self._state().roles
        values: dict[str, Value] = dict(roles.parameters)
        for parameter in VARIANTS[roles.variant].parameters:
            path = roles.learned.get(parameter.name)
            if path is not None:
                raw = at(self, path[:-1])._parameters[path[-1]]
                assert raw is not None
                bound = parameter.above
                values[parameter.name] = raw if bound is None else F.softplus(raw) + bound
        return values

    def reset_parameters(self) -> None:
        for projection in self._state().roles.projections:
            reset: Callable[[], None] = at(self, projection.path).reset_parameters  # type: ignore[assignment]
            reset()

    @property
    def variant(self) -> str:  # type: ignore[override]
        return self._state().roles.variant

    @property
    def d_model(self) -> int:  # type: ignore[override]
        return self._state().roles.up.d_in

    @property
    def d_hidden(self) -> int:  # type: ignore[override]
        return self._state().roles.d_hidden

    @property
    def d_out(self) -> int:  # type: ignore[override]
        down = self._state().roles.down
        return self.d_hidden if down is None else down.d_out

    @property
    def save(self) -> Save:  # type: ignore[override]
        return self._state().settings.save

    @property
    def tile(self) -> int | None:  # type: ignore[override]
        return None

    @property
    def backend(self) -> str:  # type: ignore[override]
        return self._state().settings.backend

    def extra_repr(self) -> str:
        own = self._state().original.extra_repr(self)
        sizes = f"{self.d_model} -> {self.d_hidden} -> {self.d_out}"
        return ", ".join(filter(None, (own, f"gatedffn: {self.variant}", sizes)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revived, (self._state().original,), self.__getstate__()  # type: ignore[no-untyped-call]


# The names that the class gives to a block; one that has such a name for itself is left.
TAKEN = frozenset(
    name
    for kind in ReplacedFeedForward.__mro__[: ReplacedFeedForward.__mro__.index(nn.Module)]
    for name in vars(kind)
    if not name.startswith("__")
) - {"forward", "extra_repr", "reset_parameters"}


def _silent(module: nn.Module) -> bool:
    """Whether a module on the hidden values changes nothing now."""
    if type(module) is nn.Identity:
        return is_untouched(module, nn.Identity)
    if type(module) is nn.Dropout:
        return is_untouched(module, nn.Dropout) and not (module.training and module.p)
    return False


class _Around:
    """A block as its own forward sees it while the first projection computes the whole layer.

    The activation and the projection down hand on what they get.
    """

    block: ReplacedFeedForward
    stand_ins: dict[str, Any]

    def __init__(self, block: ReplacedFeedForward) -> None:
        vars(self)["block"] = block
        roles = block._state().roles
        assert roles.down is not None
        assert roles.around is not None
        down, activation = roles.down.path[0], roles.around
        vars(self)["stand_ins"] = {
            roles.up.path[0]: _StandIn(at(block, roles.up.path), block._compute),
            down: _StandIn(at(block, roles.down.path), _same),
            activation: _same,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block; wrappers of forward ask the class for it."""
        return self.block(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self.stand_ins:
            return self.stand_ins[name]
        found = getattr(self.block, name)
        if isinstance(found, MethodType) and found.__self__ is self.block:
            return MethodType(found.__func__, self)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.block, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.block, name)


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
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (ReplacedFeedForward, original), {**names, "__doc__": None})


def _revived(original: type[nn.Module]) -> nn.Module:
    made = _class_for(original)
    block: nn.Module = made.__new__(made)
    return block


def take_over(module: nn.Module, argument: str, roles: Roles, settings: Settings) -> None:
    """Makes a block a `ReplacedFeedForward`, in place."""
    original = type(module)
    module.__class__ = _class_for(original)
    module.__dict__[STATE] = State(original, argument, roles, settings)


def give_back(module: nn.Module) -> None:
    """Makes a replaced block what it was, in place."""
    state: State = module.__dict__.pop(STATE)
    module.__class__ = state.original
