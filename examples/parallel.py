"""A layer that several processes share gives what one gives: outputs, gradients, three steps.

Started alone it starts two and then four processes of itself, each with `torchrun`.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gatedffn as gf

D_MODEL, D_HIDDEN = 16, 48


class Packed(nn.Module):
    """A block that holds gate and up in one matrix, as Phi-3 and GLM-4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(D_MODEL, 2 * D_HIDDEN, bias=False)
        self.down_proj = nn.Linear(D_HIDDEN, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: gf.FeedForward(D_MODEL, D_HIDDEN),
    "packed": Packed,
    "not gated": lambda: gf.FeedForward(D_MODEL, D_HIDDEN, variant="relu2", bias=True),
    "learned per layer": lambda: gf.FeedForward(D_MODEL, D_HIDDEN, variant="xielu"),
    "learned per unit": lambda: gf.FeedForward(D_MODEL, D_HIDDEN, learnable="unit"),
}
WAYS = ("DDP", "FSDP2", "TP", "TP with sequence", "2D")


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(LAYERS[name](), nn.LayerNorm(D_MODEL)).double()
    gf.replace(made)  # a block of somebody else's; layers of this library stay as they are
    return made


def shared(made: nn.Module, way: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model as `way` shares it, and which part of the batch this process is given."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from gatedffn.parallel import fsdp_placement

    count, rank = dist.get_world_size(), dist.get_rank()
    if way == "DDP":
        return DistributedDataParallel(made), lambda t: t.chunk(count)[rank]
    if way == "FSDP2":
        return fully_shard(made), lambda t: t.chunk(count)[rank]
    if way == "2D":
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("dp", "tp"))
        gf.parallelize(made, mesh["tp"])
        fully_shard(made, mesh=mesh["dp"], shard_placement_fn=fsdp_placement)
        return made, lambda t: t.chunk(2)[mesh["dp"].get_local_rank()]
    mesh = init_device_mesh("cpu", (count,))
    if way == "TP":
        return gf.parallelize(made, mesh), lambda t: t
    gf.parallelize(made[0], mesh, sequence_parallel=True)  # type: ignore[index]
    return made, lambda t: t.chunk(count, dim=1)[rank]


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def step(made: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The output, after backward."""
    y: Tensor = made(x)
    nn.functional.mse_loss(y, target).backward()
    return y


def trial(way: str, name: str) -> str:
    """Compares with one process, and says which way ran."""
    alone, own = model(name), model(name)
    made, part = shared(own, way)
    x, target = torch.randn(2, 4, 8, D_MODEL, dtype=torch.float64)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (alone, made)]
    for number in range(3):
        y = step(alone, x, target)
        torch.testing.assert_close(step(made, part(x), part(target)), part(y))
        for (key, p), q in zip(alone.named_parameters(), own.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            gradient = full(q.grad)
            if way == "TP with sequence" and key.startswith("1."):
                dist.all_reduce(gradient)  # of the norm behind it, which is the user's to shard
            if way == "TP with sequence":
                gradient = gradient / dist.get_world_size()  # a mean of means over tokens
            torch.testing.assert_close(gradient, p.grad, msg=lambda m, k=key: f"{way}, {k}: {m}")
            if way == "TP with sequence":
                q.grad.copy_(q.grad)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        del number
    for p, q in zip(alone.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(full(q), p)
    return gf.explain(own)[0].path
