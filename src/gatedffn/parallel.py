"""Layers whose hidden units are shared by several processes, by PyTorch's tensor parallelism.

`parallelize` shards every `FeedForward` of a model; `FeedForwardParallel` is the style that it
uses, for plans of one's own. A layer then computes with the units that a process holds, by the
operator that computes a whole layer.
"""

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
from gatedffn.layers import FeedForward
from gatedffn.ops import measure
from gatedffn.ops.operator import forget_plans
from gatedffn.roles import at, read


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool = False,
    use_local_output: bool = True,
) -> nn.Module:
    """Shards every `FeedForward` of a model over the processes of a mesh, along hidden units.

    Layers take and give what they did. There is one all-reduce in forward and one in backward, or
    with `sequence_parallel` an all-gather and a reduce-scatter each way. All else in the model
    stays as it is.

    Args:
        model: a model, or a layer itself; `gatedffn.replace` makes layers of a model's own blocks.
        mesh: of one dimension: of a mesh of several `mesh["tp"]`. Every process holds the same
            model, whose numbers are then those of the first.
        sequence_parallel: whether inputs and outputs are parts of (batch, tokens, d_model), split
            along the tokens, into as many on every process.
        use_local_output: whether outputs are plain tensors; else they are DTensors.

    Returns: the model.

    Raises:
        SettingError: there is no `FeedForward`; one cannot be shared, with the reason: its hidden
            units cannot be divided evenly, it is sharded already, an adapter or a hook is on its
            projections, or it computes more than a feed-forward. Nothing is then changed.

    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> layer = parallelize(FeedForward(8, 16), init_device_mesh("cpu", (1,)))
    >>> layer(Tensor(2, 8)).shape
    torch.Size([2, 8])
    >>> dist.destroy_process_group()
    """
    layers = dict[str, FeedForward]()
    for name, module in model.named_modules():
        # One that is inside of another is not called: that one reads its weights.
        if isinstance(module, FeedForward) and not any(name.startswith(outer) for outer in layers):
            layers[f"{name}." if name else ""] = module
    if not layers:
        raise SettingError(
            f"{type(model).__name__} holds no FeedForward: there is nothing to shard; "
            "gatedffn.replace puts FeedForward in the place of a model's own blocks"
        )
    layout = Shard(1) if sequence_parallel else Replicate()
    style = FeedForwardParallel(
        input_layouts=layout, output_layouts=layout, use_local_output=use_local_output
    )
    for name, layer in layers.items():
        _check(name.rstrip(".") or type(model).__name__, layer, mesh)
    for layer in layers.values():
        style._apply(layer, mesh)
    return model


class FeedForwardParallel(ParallelStyle):
    """Tensor parallelism of a whole `FeedForward`, for `parallelize_module` of PyTorch.

    Gate and up are split by their rows, one that holds both as both apart, down by its columns, and
    so is what is learned for each hidden unit. What is learned for the layer is held by every
    process, and its gradient is that of the whole layer.

    Args:
        input_layouts: how a plain input lies: `Replicate()`, or `Shard(1)` along the tokens.
        output_layouts: how the output is to lie.
        use_local_output: whether it is a plain tensor.

    Raises:
        SettingError: as `parallelize`.
    """

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

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(type(module).__name__, module, device_mesh)
        assert isinstance(module, FeedForward)
        lies = _placements(module)
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
        if module._roles.order is not None:
            module.register_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]
        module._shared_by = device_mesh.size()
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
        return output.to_local() if self.local else output


def _placements(layer: FeedForward) -> dict[str, Placement]:
    """How the parameters of a layer lie that are split; by name."""
    roles, found = layer._roles, dict[str, Placement]()
    for projection in roles.projections:
        outputs = int(projection.transposed)
        down = projection is roles.down
        rows: Placement = Shard(1 - outputs if down else outputs)
        if roles.order in ("gate_up", "up_gate") and not down:
            rows = _StridedShard(outputs, split_factor=2)
        found[f"{projection.name}.weight"] = rows
        if isinstance(rows, _StridedShard):
            continue  # its bias is small: each process has all of it
        if not down:
            found[f"{projection.name}.bias"] = Shard(0)
    for path in layer._learned_at.values():
        value = getattr(at(layer, path[:-1]), path[-1])
        if value.numel() > 1:
            found[".".join(path)] = Shard(value.dim() - 1)
    return found


def _check(name: str, layer: nn.Module, mesh: DeviceMesh) -> None:
    """Raises unless a layer can be shared by the processes of a mesh."""
    reason = _why_not(layer, mesh)
    if reason is not None:
        raise SettingError(f"{name} cannot be shared by the processes of a mesh: {reason}")


def _why_not(layer: nn.Module, mesh: DeviceMesh) -> str | None:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        return f"the mesh has {mesh.ndim} dimensions, {names}: give one of them, as mesh['tp']"
    if not isinstance(layer, FeedForward):
        return (
            f"it is a {type(layer).__name__}: it must be a FeedForward, which gatedffn.replace "
            "makes of a model's own block"
        )
    if getattr(layer._roles, "around", None) is not None:
        return "it computes more than a feed-forward: shard its projections by PyTorch's styles"
    if any(isinstance(p, DTensor) for p in layer.parameters()):
        return "it is sharded already: use this before fully_shard, and once"
    for projection in layer._roles.projections:
        if read(layer, projection) is None:
            return (
                f"{projection.name} is not a plain projection: use this before adapters, hooks and "
                "quantisation"
            )
    if layer.d_hidden % mesh.size():
        return (
            f"its {layer.d_hidden} hidden units cannot be divided evenly by {mesh.size()}: choose "
            "a d_hidden that can, or fewer processes"
        )
    return None


def fsdp_placement(parameter: nn.Parameter) -> Shard | None:
    """Along what `fully_shard` is to split a parameter: its argument `shard_placement_fn`.

    A matrix that holds gate and up, split over processes as both apart, must not be split again by
    its rows: PyTorch 2.13 puts such a matrix together in another order, in checkpoints too.

    >>> fsdp_placement(nn.Parameter(Tensor(2, 2))) is None
    True
    """
    if isinstance(parameter, DTensor) and parameter.dim() == 2:
        for placement in parameter.placements:
            if isinstance(placement, _StridedShard):
                return Shard(1 - placement.dim)
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
