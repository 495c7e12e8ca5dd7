"""Distributed checkpoints of matrices that hold gate and up, each half split over processes.

PyTorch up to 2.13 writes and reads the two pieces that a process holds of such a matrix as if they
were one, at the place of the first: where it is asked for pieces, it is told the right ones here.
It asks a class, so that states of optimisers, which PyTorch makes, are told of too.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from gatedffn.errors import SettingError

Piece = tuple[ChunkStorageMetadata, Tensor]


def pieces(t: DTensor) -> list[Piece] | None:
    """What this process holds of a tensor, one by one; None where that is one piece.

    A dimension that another dimension of the mesh splits too is a matter of PyTorch's own.
    """
    dims = [getattr(placement, "dim", None) for placement in t.placements]
    for d, placement in enumerate(t.placements):
        count = t.device_mesh.size(d)
        if not isinstance(placement, _StridedShard) or dims.count(placement.dim) > 1 or count == 1:
            continue
        dim, parts = placement.dim, int(placement.split_factor)
        if t.shape[dim] % (parts * count):
            return None
        half = t.shape[dim] // parts
        each = half // count
        _, start = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
        found = []
        for place, held in enumerate(torch.split(t.to_local().detach(), each, dim)):
            offsets = [*start]
            offsets[dim] = place * half + t.device_mesh.get_local_rank(d) * each
            found.append((ChunkStorageMetadata(offsets=Size(offsets), sizes=held.shape), held))
        return found
    return None


@cache  # once in a process, whatever else has been put around these methods
def told_in_checkpoints() -> None:
    """Has the checkpoints of PyTorch ask here for the pieces of a tensor."""
    for name, ours in _ASKED.items():
        setattr(DTensor, name, _told(getattr(DTensor, name), ours))
    checked = _checked(HuggingFaceStorageWriter.prepare_local_plan)
    HuggingFaceStorageWriter.prepare_local_plan = checked  # type: ignore[method-assign]


def _told(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def method(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        found = pieces(self)
        if found is None:
            return original(self, *args, **kwargs)
        return ours(self, found, *args, **kwargs)

    return method


def _checked(original: Callable[..., SavePlan]) -> Callable[..., SavePlan]:
    @wraps(original)
    def prepare_local_plan(self: HuggingFaceStorageWriter, plan: SavePlan) -> SavePlan:
        names = Counter(item.index.fqn for item in plan.items)
        twice = sorted(name for name, count in names.items() if count > 1)
        if twice:
            raise SettingError(
                f"{twice[0]} holds gate and up, of each of which a process has a piece, and "
                "HuggingFaceStorageWriter keeps one piece of a process: save the full state dict, "
                "StateDictOptions(full_state_dict=True)"
            )
        return original(self, plan)

    return prepare_local_plan


def _items(self: DTensor, found: list[Piece], fqn: str, *_: Any, **__: Any) -> list[WriteItem]:
    return [
        WriteItem(
            index=MetadataIndex(fqn, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk, properties=TensorProperties.create_from_tensor(held), size=self.size()
            ),
        )
        for chunk, held in found
    ]


def _chunks(_self: DTensor, found: list[Piece]) -> list[ChunkStorageMetadata]:
    return [chunk for chunk, _ in found]


def _held(_self: DTensor, found: list[Piece], index: MetadataIndex) -> Tensor:
    return next(held for chunk, held in found if chunk.offsets == index.offset)


_ASKED: dict[str, Callable[..., Any]] = {
    "__create_write_items__": _items,
    "__create_chunk_list__": _chunks,
    "__get_tensor_shard__": _held,
}
