"""What the parts of a feed-forward layer are for, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.activations import Value
from gatedffn.functional import Order
from gatedffn.ops.sharded import is_sharded
from gatedffn.variants import VARIANTS

Path = tuple[str, ...]
Affine = tuple[Tensor, Tensor | None]
_MODULES = nn.modules.module


@dataclass(frozen=True, slots=True)
class Projection:
    """A module that multiplies by a matrix: where it is, its class and how the matrix is stored.

    `d_in` and `d_out` are its sizes when it was found; `widths` has those of now.
    """

    path: Path
    kind: type[nn.Module]
    d_in: int
    d_out: int
    transposed: bool = False  # (in, out), as Conv1D of transformers has it

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Which modules of a layer are its projections, and what else it has done to the values.

    Packed: `gate` is None and `up` holds both in `order`. Without `down` the layer ends with the
    hidden values. `before`, `hidden` and `after` are modules that are called as they are: on the
    input, on the hidden values, on the output.
    """

    up: Projection
    gate: Projection | None = None
    down: Projection | None = None
    order: Order | None = None
    before: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()
    after: tuple[Path, ...] = ()
    gate_scale: float = 1.0
    output_scale: float = 1.0
    dropout: bool = False  # the layer's own, a number, acts on the hidden values

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for p in (self.gate, self.up, self.down) if p is not None)


def at(module: nn.Module, path: Path) -> nn.Module:
    """The module at a path below another."""
    for name in path:
        found = module._modules[name]
        assert found is not None
        module = found
    return module


def together(names: Sequence[str]) -> str:
    """The names of what is alike: the first and the last, and how many there are.

    >>> together(["a"]), together(["0", "1", "2"])
    ('a', '0 ... 2, 3 alike')
    """
    if len(names) < 3:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]}, {len(names)} alike"


def values_of(
    variant: str, fixed: Mapping[str, Value], learned: Mapping[str, Path], module: nn.Module
) -> dict[str, Value]:
    """The parameters of a formula as they are now.

    One that is learned is a parameter at a path below the module, stored as the inverse softplus
    of its distance from the bound of the row where there is one.
    """
    values: dict[str, Value] = {**fixed}
    for parameter in VARIANTS[variant].parameters:
        path = learned.get(parameter.name)
        if path is not None:
            raw = getattr(at(module, path[:-1]), path[-1])
            bound = parameter.above
            values[parameter.name] = raw if bound is None else F.softplus(raw) + bound
    return values


def widths(module: nn.Module, projection: Projection) -> tuple[int, int]:
    """The (in, out) sizes of a projection of a module, as its matrix has them now.

    >>> linear = Projection((), nn.Linear, 2, 3)
    >>> widths(nn.Linear(8, 4), linear), widths(nn.Identity(), linear)
    ((8, 4), (2, 3))
    """
    child = at(module, projection.path)
    weight = child._parameters.get("weight")
    if weight is not None and weight.dim() == 2 and weight.is_floating_point():
        rows, columns = weight.shape
        return (rows, columns) if projection.transposed else (columns, rows)
    # Quantised weights and adapters say it alone.
    found = getattr(child, "in_features", None), getattr(child, "out_features", None)
    if isinstance(found[0], int) and isinstance(found[1], int):
        return found[0], found[1]
    return projection.d_in, projection.d_out


def hooked() -> bool:
    """Whether a hook on all modules is to see each of them called."""
    return bool(
        _MODULES._global_forward_hooks
        or _MODULES._global_forward_pre_hooks
        or _MODULES._global_backward_hooks
        or _MODULES._global_backward_pre_hooks
    )


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of that very class, without a hook or a forward of its own.

    >>> is_untouched(nn.ReLU(), nn.ReLU)
    True
    """
    if type(module) is not kind:
        return False
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def read(module: nn.Module, projection: Projection) -> Affine | None:
    """The matrix and the bias of a projection; None unless reading is as good as calling it.

    >>> linear = Projection((), nn.Linear, 2, 3)
    >>> read(nn.Linear(2, 3), linear) is None, read(nn.Identity(), linear) is None
    (False, True)
    """
    for name in projection.path:
        module = module._modules[name]  # type: ignore[assignment]
    if not is_untouched(module, projection.kind):
        return None
    parameters = module._parameters
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # a plain attribute, or made from something else
        return None
    for held in (weight, bias):
        if type(held) not in _TENSORS and not (held is None or is_sharded(held)):
            return None
    assert weight is not None
    return (weight.t() if projection.transposed else weight), bias


_TENSORS = (nn.Parameter, Tensor)
