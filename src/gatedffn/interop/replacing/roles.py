"""What `replace` finds out about somebody else's feed-forward block, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from gatedffn.functional import Save, Weigh
from gatedffn.roles import Path, Roles

Rounding = Literal["float32", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRoles(Roles):
    """The roles in a block, its formula, and what tells that only its own forward knows better.

    A learned parameter is read from a module of the block. `watched` are all modules without a
    role, with their classes; `fixed` are the numbers, words and functions that these and the block
    itself have as attributes.

    `around` is the name of the activation where the block computes more than a feed-forward: its
    own forward then runs, in which the first projection stands for all three.
    """

    variant: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    learned: Mapping[str, Path] = field(default_factory=dict)
    watched: tuple[tuple[Path, type[nn.Module]], ...] = ()
    fixed: tuple[tuple[Path, str, object], ...] = ()
    around: str | None = None
    own_training: bool = False  # in training it does what none of its modules does


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRoles(BlockRoles):
    """The roles of parameters that hold the weights of several experts, stacked.

    The path of a projection is the name of its parameter, (experts, out, in), or with `transposed`
    (experts, in, out). `biases` are the names of those parameters, by projection.

    `arguments` are what its forward calls the input, the index and the routing weights; or the
    input alone, where every expert has its part of the rows.
    """

    arguments: tuple[str, ...]
    biases: Mapping[Path, str] = field(default_factory=dict)
    weigh: Weigh = "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a block is computed."""

    rounding: Rounding = "float32"
    backend: str = "auto"
    save: Save = "gate_up"


@dataclass(frozen=True, slots=True)
class State:
    """What a replaced block knows beside its roles."""

    original: type[nn.Module]
    arguments: tuple[str, ...]  # the names of its inputs
    rounding: Rounding
