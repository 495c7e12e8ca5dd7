"""Processes that share a model replace the same blocks of it."""

from collections.abc import Collection

from torch import nn

from gatedffn.ops.sharded import is_sharded


def left_by_others(model: nn.Module, taken: Collection[str]) -> set[str]:
    """Which of some blocks another process leaves with which this one shares the model.

    All of them ask: those of the meshes that parameters are sharded over.
    """
    meshes = list[object]()
    for parameter in model.parameters():
        if is_sharded(parameter) and (mesh := parameter.device_mesh) not in meshes:  # type: ignore[attr-defined]
            meshes.append(mesh)
    by_all = {*taken}
    for mesh in meshes:
        for group in mesh.get_all_groups():  # type: ignore[attr-defined]
            import torch.distributed as dist

            told: list[set[str]] = [set()] * dist.get_world_size(group)
            dist.all_gather_object(told, by_all, group=group)
            by_all.intersection_update(*told)
    return {*taken} - by_all
