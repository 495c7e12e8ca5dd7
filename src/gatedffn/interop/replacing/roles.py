"""What the parts of somebody else's feed-forward block are for, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from gatedffn.functional import Order, Save

Path = tuple[str, ...]
Rounding = Literal["float32", "model"]
STATE = "_gatedffn"  # where a replaced block keeps what it knows


@dataclass(frozen=True, slots=True)
class Projection:
    """A module that multiplies by a matrix: where it is, its class and how the matrix is stored."""

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
    """What the parts of a block are for: all that is needed to compute it.

    Packed: `gate` is None and `up` holds both in `order`. Without `down` the block ends with the
    hidden values. `before`, `hidden` and `after` are modules that are called as they are: on the
    input, on the hidden values, on the output. `watched` are all the others, with their classes;
    `fixed` are the numbers, words and functions that these and the block itself have as attributes.
    A learned parameter is read from a module of the block, `softplus` of it plus the bound of the
    row where there is one.

    `around` is the name of the activation where the block computes more than a feed-forward: its
    own forward then runs, in which the first projection stands for all three.
    """

    variant: str
    up: Projection
    gate: Projection | None = None
    down: Projection | None = None
    order: Order | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    learned: Mapping[str, Path] = field(default_factory=dict)
    before: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()
    after: tuple[Path, ...] = ()
    watched: tuple[tuple[Path, type[nn.Module]], ...] = ()
    fixed: tuple[tuple[Path, str, object], ...] = ()
    gate_scale: float = 1.0
    output_scale: float = 1.0
    around: str | None = None
    own_training: bool = False  # in training it does what none of its modules does

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for p in (self.gate, self.up, self.down) if p is not None)

    @property
    def d_hidden(self) -> int:
        return self.up.d_out // 2 if self.order else self.up.d_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a block is computed."""

    rounding: Rounding = "float32"
    backend: str = "auto"
    save: Save = "gate_up"


@dataclass(frozen=True, slots=True)
class State:
    """What a replaced block knows beside what it was."""

    original: type[nn.Module]
    argument: str  # the name of the input
    roles: Roles
    settings: Settings


def at(module: nn.Module, path: Path) -> nn.Module:
    """The module at a path below another."""
    for name in path:
        found = module._modules[name]
        assert found is not None
        module = found
    return module
