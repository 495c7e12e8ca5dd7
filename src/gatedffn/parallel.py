"""Layers that several processes share, by PyTorch's tensor parallelism.

`parallelize` shards every `FeedForward` and all experts of a model; `FeedForwardParallel` and
`ExpertsParallel` are the styles that it uses, for plans of one's own. A layer then computes with
the units or experts that a process holds, by the operator that computes a whole layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from gatedffn.errors import SettingError
from gatedffn.experts import Experts
from gatedffn.functional import Order
from gatedffn.interop.replacing.expert_block import ReplacedExperts
from gatedffn.layers import FeedForward
from gatedffn.roles import read
from gatedffn.sharing import LayerParallel, learned_placements, units, why_uneven

SHARED = (FeedForward, Experts, ReplacedExperts)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool = False,
    whole_experts: bool = False,
    use_local_output: bool = True,
) -> nn.Module:
    """Shards every `FeedForward` and all experts of a model over the processes of a mesh.

    A process holds a part of the hidden units of each layer and of each expert, or with
    `whole_experts` some experts. Layers take and give what they did; of a router every process
    computes all. There is one all-reduce in forward and one in backward of each input, or with
    `sequence_parallel` all-gathers and reduce-scatters. All else in the model stays as it is.

    Args:
        model: a model, or a layer itself; `gatedffn.replace` makes layers of a model's own blocks.
        mesh: of one dimension: of a mesh of several `mesh["tp"]`. Every process holds the same
            model, whose numbers are then those of the first.
        sequence_parallel: whether inputs and outputs are parts of (..., tokens, d_model), split
            along the tokens, into as many on every process.
        whole_experts: whether experts stay whole, each on one process.
        use_local_output: whether outputs are plain tensors; else they are DTensors.

    Returns: the model.

    Raises:
        SettingError: there are neither a `FeedForward` nor experts; one of these cannot be shared,
            with the reason: its hidden units or experts cannot be divided evenly, it is sharded
            already, an adapter or a hook is on its projections, or it computes more than a
            feed-forward. Nothing is then changed.

    >>> import torch, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> layer = parallelize(FeedForward(8, 16), init_device_mesh("cpu", (1,)))
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    >>> dist.destroy_process_group()
    """
    layers = dict[str, nn.Module]()
    for name, module in model.named_modules():
        # One that is inside of another is not called: that one reads its weights.
        if isinstance(module, SHARED) and not any(name.startswith(outer) for outer in layers):
            layers[f"{name}." if name else ""] = module
    if not layers:
        raise SettingError(
            f"{type(model).__name__} holds no FeedForward and no experts: there is nothing to "
            "shard; gatedffn.replace puts them in the place of a model's own blocks"
        )
    layout = Shard(-2) if sequence_parallel else Replicate()
    lie: dict[str, Any] = {
        "input_layouts": layout,
        "output_layouts": layout,
        "use_local_output": use_local_output,
    }
    of_one, of_many = FeedForwardParallel(**lie), ExpertsParallel(whole=whole_experts, **lie)
    styles = [of_one if isinstance(m, FeedForward) else of_many for m in layers.values()]
    for (name, layer), style in zip(layers.items(), styles, strict=True):
        style.check(name.rstrip(".") or type(model).__name__, layer, mesh)
    _check_apart(layers)
    for layer, style in zip(layers.values(), styles, strict=True):
        style._apply(layer, mesh)
    return model


def _check_apart(layers: Mapping[str, nn.Module]) -> None:
    """Raises where a module is part of two layers: shared with the first, it is not what the second
    expects.
    """
    owners: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        for module in layer.modules():
            first = owners.setdefault(module, name)
            if first != name:
                raise SettingError(
                    f"{first.rstrip('.')} and {name.rstrip('.')} have a module in common: give "
                    "each its own, whose weight may be the same parameter"
                )


class FeedForwardParallel(LayerParallel):
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

    def _why_not(self, layer: nn.Module, mesh: DeviceMesh) -> str | None:
        if not isinstance(layer, FeedForward):
            return (
                f"it is a {type(layer).__name__}: it must be a FeedForward, which "
                "gatedffn.replace makes of a model's own block"
            )
        if getattr(layer._roles, "around", None) is not None:
            return "it computes more than a feed-forward: shard its projections by PyTorch's styles"
        for projection in layer._roles.projections:
            if read(layer, projection) is None:
                return (
                    f"{projection.name} is not a plain projection: merge adapters, do without "
                    "quantisation, and add hooks afterwards"
                )
        return why_uneven("d_hidden", layer.d_hidden, "hidden units", mesh)

    def _placements(self, layer: FeedForward) -> dict[str, Placement]:
        roles, found = layer._roles, dict[str, Placement]()
        for projection in roles.projections:
            outputs, down = int(projection.transposed), projection is roles.down
            rows = units(1 - outputs if down else outputs, None if down else roles.order)
            found[f"{projection.name}.weight"] = rows
            if isinstance(rows, _StridedShard):
                continue  # its bias is small: each process has all of it
            if not down:
                found[f"{projection.name}.bias"] = Shard(0)
        return found | learned_placements(layer, layer._learned_at)


class ExpertsParallel(LayerParallel):
    """Tensor parallelism of `Experts`, or of experts that `gatedffn.replace` took over.

    A process holds a part of the hidden units of each expert, or with `whole` some experts and all
    of them. What is learned for all experts is held by every process, and what is learned for each
    unit is split with the units.

    Args:
        whole: whether experts stay whole.
        input_layouts: how plain inputs lie, index and routing weights too: `Replicate()`, or
            `Shard(-2)` along the tokens.
        output_layouts: how the output is to lie.
        use_local_output: whether it is a plain tensor.

    Raises:
        SettingError: as `parallelize`.
    """

    def __init__(self, *, whole: bool = False, **layouts: Any) -> None:
        super().__init__(**layouts)
        self.whole = whole

    def _why_not(self, layer: nn.Module, mesh: DeviceMesh) -> str | None:
        if not isinstance(layer, Experts | ReplacedExperts):
            return (
                f"it is a {type(layer).__name__}: it must be an Experts, or experts that "
                "gatedffn.replace took over"
            )
        in_parts = isinstance(layer, ReplacedExperts) and len(layer._roles.arguments) == 1
        if in_parts and self.input_layouts != Replicate():
            return (
                "its input holds all tokens once for each expert, which cannot be split along "
                "them: leave out sequence_parallel"
            )
        own = layer.why_own_forward()
        if own is not None:
            return f"its own forward computes: {own}"
        if any(layer._parameters.get(stack.name) is None for stack in _stacks(layer)):
            return "its weights are no plain parameters: use this before parametrizations"
        down = _stacks(layer)[-1]
        count, *sizes = layer._parameters[down.name].shape  # type: ignore[union-attr]
        if self.whole:
            return why_uneven("num_experts", count, "experts", mesh)
        return why_uneven("d_hidden", sizes[not down.transposed], "hidden units", mesh)

    def _placements(self, layer: Experts | ReplacedExperts) -> dict[str, Placement]:
        found = dict[str, Placement]()
        stacks = _stacks(layer)
        for stack in stacks:
            down = stack is stacks[-1]
            if self.whole:
                found |= {stack.name: Shard(0), stack.bias: Shard(0)}
                continue
            outputs = 1 + stack.transposed
            found[stack.name] = units(3 - outputs if down else outputs, stack.order)
            if not down:
                found[stack.bias] = units(1, stack.order)
        learned = layer._learned_at if isinstance(layer, Experts) else layer._roles.learned
        return found if self.whole else found | learned_placements(layer, learned)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        module._shares_experts = self.whole  # type: ignore[assignment]
        return module


class _Stack(NamedTuple):
    """The matrices of experts: their parameter, that of their bias, and how they are stored."""

    name: str
    bias: str
    transposed: bool
    order: Order | None


def _stacks(layer: Experts | ReplacedExperts) -> list[_Stack]:
    """Those of a layer, down last."""
    if isinstance(layer, Experts):
        first, order = layer._first, "gate_up" if layer._gated else None
        return [
            _Stack(first, f"{first}_bias", False, order),  # type: ignore[arg-type]
            _Stack("down_proj", "down_proj_bias", False, None),
        ]
    roles = layer._roles
    return [
        _Stack(
            p.path[0],
            roles.biases.get(p.path, ""),
            p.transposed,
            roles.order if p is roles.up else None,
        )
        for p in roles.projections
    ]


def fsdp_placement(parameter: nn.Parameter) -> Shard | None:
    """Along what `fully_shard` is to split a parameter: its argument `shard_placement_fn`.

    A matrix that holds gate and up, split over processes as both apart, must not be split again by
    its rows: PyTorch 2.13 puts such a matrix together in another order, in checkpoints too.

    >>> import torch
    >>> fsdp_placement(nn.Parameter(torch.ones(2, 2))) is None
    True
    """
    if isinstance(parameter, DTensor) and parameter.dim() == 2:
        for placement in parameter.placements:
            if isinstance(placement, _StridedShard):
                return Shard(1 - placement.dim)
    return None
