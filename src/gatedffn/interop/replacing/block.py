"""A block of somebody else's model that is computed as a `FeedForward`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.interop.replacing.roles import BlockRoles, Settings
from gatedffn.interop.replacing.taking import (
    Replaced,
    as_before,
    inputs_of,
    take_over,
    taken_names,
    why_changed,
)
from gatedffn.layers import FeedForward
from gatedffn.roles import at
from gatedffn.variants import VARIANTS


class ReplacedFeedForward(Replaced, FeedForward):
    """A `FeedForward` whose parts are those of a block of another library.

    Made by `gatedffn.replace` alone. It computes by its roles as every `FeedForward` does; what
    only the block's own forward does, that forward does.
    """

    _roles: BlockRoles
    _given = (*Replaced._given, "variant", "_start", "_learned_at", "tile")

    _by_roles = FeedForward.forward  # by a name, which the compiler of PyTorch follows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = inputs_of(self._gatedffn.arguments, args, kwargs)
        if self._roles.around is not None:
            return _as_it_was(self, args, kwargs, self.why_modules() is None)
        if (
            inputs is None
            or not isinstance(inputs[0], Tensor)
            or self.why_own_forward() is not None
        ):
            return _as_it_was(self, args, kwargs, False)
        return self._by_roles(inputs[0])

    def why_own_forward(self) -> str | None:
        """Why the block computes as it did before; None when it does not."""
        roles = self._roles
        if roles.own_training and self.training:
            return "its own forward does something in training that none of its modules does"
        changed = why_changed(self, roles)
        if changed is not None:
            return changed
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


TAKEN = taken_names(ReplacedFeedForward)


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
    own = as_before(block, original, block._given)
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
        (modules if roles.around in modules else vars(own))[roles.around] = _same
        vars(own)["_modules"] = modules
    held = dict(vars(own))
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


def take_block(module: nn.Module, argument: str, roles: BlockRoles, settings: Settings) -> None:
    """Makes a block a `ReplacedFeedForward`, in place."""
    take_over(
        ReplacedFeedForward,
        module,
        (argument,),
        roles,
        settings,
        variant=roles.variant,
        _start={**VARIANTS[roles.variant].defaults, **roles.parameters},
        _learned_at=roles.learned,
        tile=None,
    )
