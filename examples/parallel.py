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


class Mixture(nn.Module):
    """Experts, routed by what the tokens hold."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = gf.Experts(D_MODEL, D_HIDDEN, 4, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = x[..., :4].softmax(-1).topk(2)
        return self.experts(x, index, weights)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: gf.FeedForward(D_MODEL, D_HIDDEN),
    "packed": Packed,
    "not gated": lambda: gf.FeedForward(D_MODEL, D_HIDDEN, variant="relu2", bias=True),
    "learned per layer": lambda: gf.FeedForward(D_MODEL, D_HIDDEN, variant="xielu"),
    "learned per unit": lambda: gf.FeedForward(D_MODEL, D_HIDDEN, learnable="unit"),
    "experts": Mixture,
    "whole experts": Mixture,
}
WAYS = ("DDP", "FSDP2", "TP", "TP with sequence", "2D")


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(LAYERS[name]()).double()
    gf.replace(made)  # takes the packed block over; layers of this library stay as they are
    return made


def shared(
    made: nn.Module, way: str, *, whole: bool
) -> tuple[nn.Module, Callable[[Tensor], Tensor], float]:
    """The model as `way` shares it, the part of a batch that this process is given, and what its
    loss counts: gradients are averaged over data, and added up over tokens.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from gatedffn.parallel import fsdp_placement

    count, rank = dist.get_world_size(), dist.get_rank()
    if way == "DDP":
        return DistributedDataParallel(made), lambda t: t.chunk(count)[rank], 1.0
    if way == "FSDP2":
        fully_shard(made)
        return made, lambda t: t.chunk(count)[rank], 1.0
    if way == "2D":
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("dp", "tp"))
        gf.parallelize(made, mesh["tp"], whole_experts=whole)
        fully_shard(made, mesh=mesh["dp"], shard_placement_fn=fsdp_placement)
        return made, lambda t: t.chunk(2)[mesh["dp"].get_local_rank()], 1.0
    mesh = init_device_mesh("cpu", (count,))
    if way == "TP":
        return gf.parallelize(made, mesh, whole_experts=whole), lambda t: t, 1.0
    gf.parallelize(made, mesh, sequence_parallel=True, whole_experts=whole)
    return made, lambda t: t.chunk(count, dim=1)[rank], 1.0 / count


def full(t: Tensor) -> Tensor:
    """What all processes hold of a tensor together."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def trial(way: str, name: str) -> str:
    """Compares with one process, and says which way ran."""
    alone, own = model(name), model(name)
    made, part, weight = shared(own, way, whole="whole" in name)
    x, target = torch.randn(2, 4, 8, D_MODEL, dtype=torch.float64)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (alone, made)]
    for _ in range(3):
        y, z = alone(x), made(part(x))
        torch.testing.assert_close(z, part(y))
        torch.autograd.backward(nn.functional.mse_loss(y, target))
        torch.autograd.backward(weight * nn.functional.mse_loss(z, part(target)))
        for p, q in zip(alone.parameters(), own.parameters(), strict=True):
            assert q.grad is not None
            torch.testing.assert_close(full(q.grad), p.grad)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for p, q in zip(alone.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(full(q), p)
    return gf.explain(own)[0].path


def process() -> None:
    """What each process does: all trials, of which the first tells."""
    dist.init_process_group("gloo")
    lines = [["", *LAYERS], ["---"] * (1 + len(LAYERS))]
    lines += [[way, *(trial(way, name) for name in LAYERS)] for way in WAYS]
    if dist.get_rank() == 0:
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    dist.destroy_process_group()


def start(count: int) -> str:
    """What the first of so many processes prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GATEDFFN_TUNE": "off"},  # small: by the rule
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


if "RANK" in os.environ:
    process()
else:
    two, four = start(2), start(4)
    assert two == four
    print(two)
