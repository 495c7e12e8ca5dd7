"""What a layout is: the tensors of a feed-forward block as some model or library stores them.

A block is canonical under the names of `FeedForward`: `gate_proj.weight` and `up_proj.weight` are
(d_hidden, d_model), `down_proj.weight` is (d_out, d_hidden), biases are vectors, and experts add
an axis in front. A layout says how these lie in the tensors of a file, in the words below.

Axes are one word each, in the order of storage:

    h   hidden units                       d   d_model, or d_out of the down projection
    p   gate and up packed along one axis: 2 h; `block` units of one, then as many of the other
    2   gate and up (or what `roles` says) on an axis of their own, index 0 first
    e   experts                            eh, ed  experts and h, or d, flattened into one axis
    1   an axis of one
    +h  +p  the end of an axis whose beginning belongs to something else (attention)
    ep  experts and p on one axis, in `viewed` alone
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["gate", "up", "down"]
Projection = Literal["gate_proj", "up_proj", "down_proj"]

PROJECTIONS: Mapping[Role, Projection] = {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A matrix as it is stored, with the bias that goes with it.

    `roles` are what it holds, in the order of storage. `block` is how many hidden units of the
    first stand before as many of the second: 1 is interleaved, None is all of them. `bias` is None
    where the layout has no place for one; `needs_bias` where it is always there. `viewed` are the
    axes of the tensor's shape, where its owner reads the same memory by `axes`.
    """

    name: str
    roles: tuple[Role, ...]
    axes: str
    bias: str | None = None
    bias_axes: str | None = None
    block: int | None = None
    needs_bias: bool = False
    viewed: str | None = None

    @property
    def shape_axes(self) -> str:
        """The axes of the tensor's shape."""
        return self.viewed or self.axes

    @property
    def halves(self) -> bool:
        """Whether all of one role stands before all of the other on one axis."""
        return self.block is None and any(axis in ("p", "+p") for axis in self.axes.split())

    @property
    def order(self) -> str:
        """In which order it holds two branches, in words; nothing where it does not say."""
        if self.halves:
            return f"{self.roles[0]} first"
        if self.block is None:
            return ""
        return "alternating" + (f" by {self.block}" if self.block > 1 else "")

    def axes_of_bias(self) -> str:
        """The axes of the bias: those of the matrix without the input's."""
        if self.bias_axes is not None:
            return self.bias_axes
        kept = ("e", "2", "d") if self.roles == ("down",) else ("e", "2", "h", "p")
        return " ".join(axis for axis in self.axes.split() if axis in kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """A vector of the block beside the projections, such as a norm of the hidden values.

    `key` is its name among the canonical ones. It is optional in a file, and only converted to
    layouts that have it too.
    """

    name: str
    key: str
    axes: str = "h"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A row: how somebody stores feed-forward blocks, as facts.

    Attributes:
        name: what users call it.
        used_by: the models and libraries that store so.
        stored: the matrices of a block, by names relative to the block; `{expert}` is a number, at
            the beginning or the end of a name.
        places: where blocks are, as the end of a module's path; `{layer}` and `{n}` are numbers.
        extras: vectors of the block that are converted along.
        beside: names in the block's module that are not part of it and stay as they are.
        alone: whether the module holds nothing else; if not, other names in it are not looked at.
        variants: what its own code computes; empty where the configuration says it.
        activation: the fields of `config.json` that name the activation, the first found counts;
            empty where none is about these blocks.
        spellings: names in that field which mean something else here than everywhere.
        settings: parameters of the variant, and the field that each comes from.
        width: the field with the width of the block; `both_halves` where it counts gate and up.
        experts: the field with the number of experts.
        architectures: in `config.json`, those whose checkpoints are stored so.
        when: fields of `config.json` and the values that they must have for that.
        per_rank: with tensor parallelism, the packed matrix is the ranks' one after the other.
        beyond: what its own code does that `FeedForward` does not; such blocks are converted but
            not run.
    """

    name: str
    used_by: str
    stored: tuple[Stored, ...]
    places: tuple[str, ...]
    extras: tuple[Extra, ...] = ()
    beside: tuple[str, ...] = ()
    alone: bool = True
    variants: tuple[str, ...] = ()
    activation: tuple[str, ...] = ("hidden_act",)
    spellings: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    width: str | None = None
    both_halves: bool = False
    experts: str | None = None
    architectures: tuple[str, ...] = ()
    when: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    per_rank: bool = False
    beyond: str | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that its blocks have."""
        return tuple(role for stored in self.stored for role in stored.roles)

    @property
    def gated(self) -> bool:
        """Whether its blocks have a gate."""
        return "gate" in self.roles

    @property
    def has_experts(self) -> bool:
        """Whether a block holds several experts."""
        return any("{expert}" in s.name or s.axes[0] == "e" for s in self.stored)

    @property
    def flattened(self) -> bool:
        """Whether the experts share an axis, so that no shape says their number."""
        return any(s.axes.split()[0] in ("eh", "ed") for s in self.stored)

    @property
    def fused(self) -> bool:
        """Whether a matrix is shared with something else than the block."""
        return any("+" in stored.axes for stored in self.stored)
