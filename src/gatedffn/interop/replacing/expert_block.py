"""A module of stacked experts of somebody else's model that is computed here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn.functional import Save, experts
from gatedffn.interop.replacing.roles import ExpertRoles
from gatedffn.interop.replacing.taking import (
    Replaced,
    inputs_of,
    taken_names,
    why_changed,
)
from gatedffn.ops.sharded import alike, full_tensor
from gatedffn.roles import Projection, values_of

ROLES = "_gatedffn_experts"  # of a module that the registry of transformers sends here


class ReplacedExperts(Replaced):
    """Experts whose stacked weights are the parameters of a module of another library.

    Made by `gatedffn.replace` alone.
    """

    _roles: ExpertRoles
    save: Save
    backend: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = routed(self, self._roles, args, kwargs)
        if inputs is None or self.why_own_forward() is not None:
            return self._gatedffn_own_code(*args, **kwargs)
        return self._gatedffn_computed(*inputs)

    def _gatedffn_computed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return by_roles(self, self._roles, self.save, self.backend, x, index, weights)

    def why_own_forward(self) -> str | None:
        """Why the module computes as it did before; None when it does not."""
        changed = why_changed(self, self._roles)
        if changed is None and self._gatedffn.rounding == "model":
            weight: Tensor = getattr(self, self._roles.up.path[0])
            dtype = weight.dtype
            if torch.is_autocast_enabled(weight.device.type):
                dtype = torch.get_autocast_dtype(weight.device.type)
            if dtype in (torch.float16, torch.bfloat16):
                return "rounding='model' in half precision: only its own forward rounds as it does"
        return changed

    def _gatedffn_sizes(self) -> tuple[str, int, int, int, int]:
        """For `explain`: a module of another library may have any public name for itself."""
        return sizes_of(self, self._roles)

    def extra_repr(self) -> str:
        own = self._gatedffn.original.extra_repr(self)
        return ", ".join(filter(None, (own, f"gatedffn: {self._roles.variant}")))


TAKEN = taken_names(ReplacedExperts)


def sizes_of(module: nn.Module, roles: ExpertRoles) -> tuple[str, int, int, int, int]:
    """The variant, d_model, d_hidden, d_out and how many experts there are."""
    assert roles.down is not None

    def shape(of: Projection) -> tuple[int, int, int]:
        count, rows, columns = getattr(module, of.path[0]).shape
        return (count, columns, rows) if of.transposed else (count, rows, columns)

    (count, _, d_model), (_, d_out, d_hidden) = shape(roles.up), shape(roles.down)
    return roles.variant, d_model, d_hidden, d_out, count


def routed(
    module: nn.Module, roles: ExpertRoles, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The input, the index and the routing weights of a call; None if it is none that was tried."""
    given = inputs_of(roles.arguments, args, kwargs)
    if given is None or not all(isinstance(t, Tensor) and t.dim() == 2 for t in given):
        return None
    if len(given) == 3:
        return given
    (x,) = given
    count = len(getattr(module, roles.up.path[0]))
    return None if len(x) % count else from_parts(x, count)


def from_parts(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What routing gives each expert its part of the rows: those that are not 0."""
    named = (full_tensor(x) != 0).any(-1)
    numbers = torch.arange(count, device=named.device).repeat_interleave(len(x) // count)
    index = numbers.where(named, count)[:, None]
    return x, alike(index, x), alike(torch.ones(len(x), 1, dtype=x.dtype, device=named.device), x)


def by_roles(
    module: nn.Module,
    roles: ExpertRoles,
    save: Save,
    backend: str,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """What a module computes by its roles, of the dtype of its input."""

    def read(projection: Projection | None) -> tuple[Tensor | None, Tensor | None]:
        if projection is None:
            return None, None
        matrix: Tensor = getattr(module, projection.path[0])
        name = roles.biases.get(projection.path)
        bias: Tensor | None = None if name is None else getattr(module, name)
        return matrix.transpose(1, 2) if projection.transposed else matrix, bias

    # A packed one holds the gate too, and goes in its place.
    packed = roles.order is not None
    gate, up, down = (
        read(p)
        for p in (roles.up if packed else roles.gate, None if packed else roles.up, roles.down)
    )
    assert down[0] is not None
    made = experts(
        x,
        gate[0],
        up[0],
        down[0],
        index,
        weights,
        gate[1],
        up[1],
        down[1],
        variant=roles.variant,
        order=roles.order,
        weigh=roles.weigh,
        save=save,
        backend=backend,
        **values_of(roles.variant, roles.parameters, roles.learned, module),
    )
    return made.to(x.dtype)
