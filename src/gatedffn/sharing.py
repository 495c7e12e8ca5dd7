"""What layers that several processes share have in common, whichever they are."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.weak import WeakIdKeyDictionary

from gatedffn.errors import SettingError
from gatedffn.functional import Order
from gatedffn.halves import told_in_checkpoints
from gatedffn.ops import measure
from gatedffn.ops.operator import forget_plans
from gatedffn.roles import Path, at


class LayerParallel(ParallelStyle):
    """A style for a whole layer: its parameters are split, its input said how it lies."""

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output
        self._made = WeakIdKeyDictionary()  # one parameter that layers share stays one

    def check(self, name: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        """Raises unless a layer can be shared by the processes of a mesh."""
        if not isinstance(mesh, DeviceMesh):
            raise SettingError(
                f"mesh is {mesh!r}: it must be a DeviceMesh, as init_device_mesh makes"
            )
        reason = self._why_not(layer, mesh)
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            reason = (
                f"the mesh has {mesh.ndim} dimensions, {names}: give one of them, as mesh['tp']"
            )
        elif any(isinstance(p, DTensor) for p in layer.parameters()):
            reason = "it is sharded already: use this before fully_shard, and once"
        if reason is not None:
            raise SettingError(f"{name} cannot be shared by the processes of a mesh: {reason}")

    def _why_not(self, layer: nn.Module, mesh: DeviceMesh) -> str | None:
        raise NotImplementedError

    def _placements(self, layer: Any) -> dict[str, Placement]:
        """How the parameters of a layer lie that are split; by name."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check(type(module).__name__, module, device_mesh)
        lies = self._placements(module)
        for path, child in module.named_modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    full = f"{path}.{name}" if path else name
                    here = lies.get(full, Replicate())
                    child._parameters[name] = self._sharded(parameter, device_mesh, here)
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[name] = distribute_tensor(buffer, device_mesh)
        module.register_forward_pre_hook(_Enter(device_mesh, self.input_layouts), with_kwargs=True)
        module.register_forward_hook(_Leave(self.output_layouts, self.use_local_output))
        if any(isinstance(here, _StridedShard) for here in lies.values()):
            told_in_checkpoints()
            module.register_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]
        module._shared_by = device_mesh.size()  # type: ignore[assignment]
        _choose_together(device_mesh)
        return module

    def _sharded(self, parameter: nn.Parameter, mesh: DeviceMesh, here: Placement) -> nn.Parameter:
        made: nn.Parameter | None = self._made.get(parameter)  # type: ignore[no-untyped-call]
        if made is None:
            held = distribute_tensor(parameter.detach(), mesh, [here])
            made = self._made[parameter] = nn.Parameter(held, parameter.requires_grad)
        return made


class _Enter:
    """Says of a plain input how it lies."""

    def __init__(self, mesh: DeviceMesh, layout: Placement) -> None:
        self.mesh, self.layout = mesh, layout

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (
            tuple(self._entered(value) for value in args),
            {name: self._entered(value) for name, value in kwargs.items()},
        )

    def _entered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        return DTensor.from_local(value, self.mesh, [self.layout], run_check=False)


class _Leave:
    """Adds up what the processes computed, or does as much of it as the next module asks for."""

    def __init__(self, layout: Placement, local: bool) -> None:
        self.layout, self.local = layout, local

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, DTensor):
            return output
        if output.placements != (self.layout,):
            output = output.redistribute(placements=[self.layout])
        if not self.local:
            return output
        local = output.to_local()
        # To autograd it is a view, which a model that adds to it in place may not change.
        return local.clone() if local.requires_grad else local


def units(dim: int, order: Order | None) -> Placement:
    """How a matrix lies that is split along hidden units; in halves both halves are."""
    return _StridedShard(dim, split_factor=2) if order in ("gate_up", "up_gate") else Shard(dim)


def learned_placements(layer: nn.Module, learned: Mapping[str, Path]) -> dict[str, Placement]:
    """How parameters of the formula lie that there are for each hidden unit."""
    found = dict[str, Placement]()
    for path in learned.values():
        value = getattr(at(layer, path[:-1]), path[-1])
        if value.numel() > 1:
            found[".".join(path)] = Shard(value.dim() - 1)
    return found


def why_uneven(name: str, count: int, words: str, mesh: DeviceMesh) -> str | None:
    if count % mesh.size():
        return (
            f"its {count} {words} cannot be divided evenly by {mesh.size()}: choose a {name} that "
            "can, or fewer processes"
        )
    return None


def _check_state(module: nn.Module, *_: object) -> None:
    """Raises where PyTorch would put a matrix together in another order."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        *others, own = parameter.placements
        if isinstance(own, _StridedShard) and own.dim in [getattr(p, "dim", None) for p in others]:
            raise SettingError(
                f"{name} holds gate and up and is split twice by its rows, which PyTorch puts "
                "together in another order: give fully_shard the argument "
                "shard_placement_fn=gatedffn.parallel.fsdp_placement"
            )


def _choose_together(mesh: DeviceMesh) -> None:
    """Has the processes of a mesh choose the ways of the first of them, here and from now on."""
    global _together
    store = dist.distributed_c10d._get_default_store()
    ranks = tuple(dist.get_process_group_ranks(mesh.get_group()))
    if len(ranks) == 1 or _together == (store, ranks):
        return
    _together = (store, ranks)
    own = PrefixStore(f"gatedffn {ranks}", store)
    measure.choose_together(own, leads=ranks[0] == dist.get_rank())
    forget_plans()


_together: tuple[Any, tuple[int, ...]] | None = None
