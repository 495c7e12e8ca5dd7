"""Operators on DTensors: every process computes with the part that it holds.

A rule says for each dimension of the mesh how the operands must lie there for that, and what the
result then is. PyTorch moves what lies otherwise, forward and backward, and adds gradients up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gatedffn.errors import SettingError, ShapeError
from gatedffn.ops.gating import reference
from gatedffn.ops.spec import PLAIN

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


class Split(NamedTuple):
    """A call along one dimension of a mesh: how the operands lie there, how the hidden values,
    which the parameters broadcast to, and how the result. `once` is the place of an operand that is
    added to a sum over the processes, so that one of them alone may add it. `own` makes of the
    parts of a process, and of its place among so many, what it computes with.
    """

    operands: "Sequence[Placement]"
    hidden: "Placement"
    result: "Placement"
    once: int = -1
    own: Callable[[list[Tensor | None], int, int], list[Tensor | None]] | None = None

    @property
    def is_split(self) -> bool:
        """Whether the processes compute different things."""
        return not self.hidden.is_replicate()


Rule = Callable[[Sequence[Any], Sequence[Tensor | None], tuple[Any, ...]], Split]
"""Of (the placements of the operands along a dimension, the operands, the settings)."""


def whole(
    placements: Sequence[Any], _tensors: Sequence[Tensor | None], _settings: tuple[Any, ...]
) -> Split:
    """The rule that every process computes all."""
    from torch.distributed.tensor import Replicate

    return Split([Replicate()] * len(placements), Replicate(), Replicate())


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor: a tensor that several processes hold together.

    >>> is_sharded(torch.ones(1))
    False
    """
    # Asked without an import, which takes seconds: who has such a tensor has made it.
    return isinstance(value, Tensor) and type(value) not in PLAIN and hasattr(value, "device_mesh")


def full_tensor(t: Any) -> Tensor:
    """The numbers that all processes hold of a tensor together, without a gradient."""
    held = t.detach()
    made: Tensor = held.full_tensor() if is_sharded(held) else held
    return made


def alike(t: Tensor, like: Any) -> Tensor:
    """A tensor that every process holds, as a DTensor where another one is."""
    return _everywhere(t, like.device_mesh) if is_sharded(like) else t


def mesh_of(named: Sequence[tuple[str, object]]) -> Any:
    """The mesh of all DTensors among the tensors of a call; None where there is none.

    Raises:
        ShapeError: some tensors are DTensors and others are not, or they have several meshes.
    """
    tensors = [(name, t) for name, t in named if isinstance(t, Tensor)]
    sharded = [(name, t) for name, t in tensors if is_sharded(t)]
    if not sharded:
        return None
    plain = [name for name, t in tensors if not is_sharded(t)]
    first, mesh = sharded[0][0], sharded[0][1].device_mesh  # type: ignore[attr-defined]
    if plain:
        raise ShapeError(
            f"{first} is a DTensor and {plain[0]} a plain tensor: all must be one or the other; "
            "distribute it with torch.distributed.tensor.distribute_tensor, or have "
            "gatedffn.parallelize shard the layer, which then takes plain inputs"
        )
    for name, t in sharded:
        if t.device_mesh != mesh:  # type: ignore[attr-defined]
            raise ShapeError(
                f"{first} is a DTensor of {mesh} and {name} one of "
                f"{t.device_mesh}: all must be of one mesh; redistribute one"  # type: ignore[attr-defined]
            )
    return mesh


def shape_of(t: Tensor) -> Tensor:
    """A tensor of its shape and dtype without numbers."""
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def compute(
    mesh: Any,
    tensors: Sequence[Tensor | None],
    parameters: Mapping[str, Any],
    splits: Sequence[Split],
    like: Tensor,
    hidden_dims: int,
    local: Callable[[list[Tensor | None], dict[str, Any]], Tensor],
) -> Tensor:
    """What `local` makes of the parts that this process holds, as a DTensor of the shape of `like`.

    `splits` are those along each dimension of the mesh.
    """
    from torch.distributed.tensor import DTensor

    held: list[Tensor | None] = []
    for place, t in enumerate(tensors):
        if t is None:
            held.append(None)
            continue
        part = _part(t, [split.operands[place] for split in splits], splits, place)
        for d, split in enumerate(splits):
            if place == split.once and mesh.get_local_rank(d):
                part = part - part.detach()  # zeros, with the gradient that the others have too
        held.append(part)
    for d, split in enumerate(splits):
        if split.own is not None:
            held = split.own(held, mesh.get_local_rank(d), mesh.size(d))
    values = {
        name: _part(v, [beside(split.hidden, v, hidden_dims) for split in splits], splits)
        if isinstance(v, Tensor)
        else v
        for name, v in parameters.items()
    }
    made: Tensor = DTensor.from_local(
        _Once.apply(local(held, values)),  # type: ignore[no-untyped-call]
        mesh,
        [split.result for split in splits],
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made


class _Once(torch.autograd.Function):
    """The same, differentiated once: PyTorch loses the rest on the way to and from DTensors."""

    @staticmethod
    def forward(_ctx: Any, local: Tensor) -> Tensor:
        return local.view_as(local)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise SettingError(
                "create_graph=True, and gradients through a layer that processes share, or through "
                "DTensors, have no gradients of their own: compute them with one process"
            )
        return grad


def beside(hidden: "Placement", value: Tensor, dims: int) -> "Placement":
    """How a parameter must lie to broadcast to hidden values of so many dimensions."""
    from torch.distributed.tensor import Replicate, Shard

    if isinstance(hidden, Shard):
        dim = hidden.dim - (dims - value.dim())
        if dim >= 0 and value.shape[dim] != 1:
            return Shard(dim)
    return Replicate()


def _part(t: Any, placements: Sequence[Any], splits: Sequence[Split], place: int = -2) -> Tensor:
    """What this process holds of a DTensor that lies in a way; gradients find back."""
    from torch.distributed.tensor import Partial

    gradients = [
        # Each process sees a part of what it does, where the call is split along this dimension.
        Partial() if here.is_replicate() and split.is_split and split.once != place else here
        for here, split in zip(placements, splits, strict=True)
    ]
    # Of a leaf, through which nothing else passes its gradient on, that is added up here.
    if t.placements != tuple(placements) or (t.is_leaf and t.requires_grad):
        t = t.redistribute(placements=placements)
    part: Tensor = t.to_local(grad_placements=gradients)
    return part


# Packed tensors


def cut_apart(packed: Any, dim: int, order: str) -> bool:
    """Whether gate and up of a unit, packed along a dimension, are held by different processes.

    They are in plain parts of a matrix whose halves are gate and up; in pairs of rows they are not.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    both = _StridedShard(dim, split_factor=2)  # compared whole: torch.compile reads no factor
    for d, placement in enumerate(packed.placements):
        count = packed.device_mesh.size(d)
        if count == 1 or not _shards(placement, dim):
            continue
        if placement.is_shard():
            if order != "interleaved" or -(-packed.shape[dim] // count) % 2:
                return True
        elif order == "interleaved" or placement != both:
            return True
    return False


def branches(packed: Any, dim: int, order: str) -> tuple[Tensor, Tensor]:
    """The gate and the up part of a packed DTensor: of what is here, where that holds both."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dim %= packed.dim()
    places = [d for d, p in enumerate(packed.placements) if _shards(p, dim)]
    if len(places) != 1 or cut_apart(packed, dim, order):
        whole_there = [Replicate() if d in places else p for d, p in enumerate(packed.placements)]
        return reference.branches(packed.redistribute(placements=whole_there), dim, order)
    lies = [Shard(dim) if d in places else p for d, p in enumerate(packed.placements)]
    shape = (*packed.shape[:dim], packed.shape[dim] // 2, *packed.shape[dim + 1 :])
    like = torch.empty(shape, device="meta")
    gate, up = [
        DTensor.from_local(
            part,
            packed.device_mesh,
            lies,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        for part in reference.branches(packed.to_local(), dim, order)
    ]
    return gate, up


def _shards(placement: Any, dim: int) -> bool:
    """Whether a dimension is split, in whatever way."""
    return getattr(placement, "dim", None) == dim


# What linear layers of somebody's plan give


def sharded_matrix(parameters: Iterable[Tensor]) -> Tensor | None:
    """The first matrix that is a DTensor, if there is one."""
    return next((p for p in parameters if is_sharded(p) and p.dim() == 2), None)


def values_beside(
    values: Mapping[str, Any], hidden: Tensor, weight: Any, dim: int
) -> dict[str, Any]:
    """Parameters as they broadcast to hidden values that a called projection gave.

    `dim` is the dimension of its weight that counts its outputs. Where that is sharded the hidden
    values are a part of all, and each process sees a part of the gradient of a parameter, whether
    the values say so or are plain tensors.
    """
    learned = {name: v for name, v in values.items() if isinstance(v, Tensor)}
    if is_sharded(hidden):
        mesh = hidden.device_mesh  # type: ignore[attr-defined]
        return {**values, **{n: _everywhere(v, mesh) for n, v in learned.items()}}
    if hidden.shape[-1] == weight.shape[dim]:
        return {**values}
    from torch.distributed.tensor import Replicate, Shard

    last = Shard(hidden.dim() - 1)
    lies = [last if _shards(p, dim) else Replicate() for p in weight.placements]
    splits = [Split((), here, here) for here in lies]
    made = {
        name: _part(
            _everywhere(v, weight.device_mesh),
            [beside(here, v, hidden.dim()) for here in lies],
            splits,
        )
        for name, v in learned.items()
    }
    return {**values, **made}


def _everywhere(value: Tensor, mesh: Any) -> Any:
    """A parameter that every process holds, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_sharded(value):
        return value
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
