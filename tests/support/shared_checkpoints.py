"""Distributed checkpoints saved by processes that share a model in one way, read in another."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gatedffn as gf
from gatedffn.interop.checkpoints.convert import convert
from gatedffn.parallel import fsdp_placement
from support.shared import D_HIDDEN, D_MODEL, Share, fsdp, full, layer, ours, packed
from support.shared_experts import experts


@contextmanager
def folder() -> Iterator[Path]:
    """One that all processes write to."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    try:
        yield Path(str(names[0]))
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(str(names[0]))


def both(module: nn.Module, processes: int = 2) -> nn.Module:
    """Over as many as share the units, and over the data beside them."""
    shape = (dist.get_world_size() // processes, processes)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    gf.parallelize(module, mesh["tp"], whole_experts=True)
    fully_shard(module, mesh=mesh["dp"], shard_placement_fn=fsdp_placement)
    return module


SHARES: dict[str, Share] = {
    "one process": lambda module: module,
    "FSDP2": fsdp,
    "TP": ours,
    "2D": both,
    "2D, data": partial(both, processes=1),
}


def several() -> nn.Module:
    """A model with a layer of each kind, whose whole state is saved at once."""
    return nn.Sequential(
        layer(learnable="unit", bias=True)(),
        layer(variant="xielu")(),
        packed("up_gate", True),
        packed("interleaved"),
        experts(learnable="unit", bias=True)(),
    )


def anew(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def numbers(module: nn.Module) -> dict[str, Tensor]:
    return {name: full(value).clone() for name, value in module.state_dict().items()}


def from_one_to_all(source: str) -> None:
    """What is saved where a model lies in one way is read wherever else."""
    with folder() as where:
        saved = SHARES[source](anew(several, 0))
        save(get_model_state_dict(saved), checkpoint_id=where)
        want = numbers(saved)
        for target, share in SHARES.items():
            made = share(anew(several, 1))
            state = get_model_state_dict(made)
            load(state, checkpoint_id=where)
            set_model_state_dict(made, state)
            found = numbers(made)
            assert found.keys() == want.keys()
            for name, value in want.items():
                assert torch.equal(found[name], value), f"{target}: {name}"


def with_optimiser(source: str) -> None:
    """Training goes on elsewhere as it would have gone on here."""
    x = torch.randn(4, D_MODEL)

    def trained(module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        module(x).square().sum().backward()
        optimiser.step()

    make = partial(packed, "up_gate", True)
    with folder() as where:
        module = SHARES[source](anew(make, 0))
        optimiser = torch.optim.AdamW(module.parameters(), lr=0.01)
        trained(module, optimiser)
        of_model, of_optimiser = get_state_dict(module, optimiser)
        save({"model": of_model, "optimiser": of_optimiser}, checkpoint_id=where)
        trained(module, optimiser)
        want = numbers(module)
        for target in ("one process", "TP", "2D, data"):
            other = SHARES[target](anew(make, 1))
            optimiser = torch.optim.AdamW(other.parameters(), lr=0.01)
            of_model, of_optimiser = get_state_dict(other, optimiser)
            state: dict[str, Any] = {"model": of_model, "optimiser": of_optimiser}
            load(state, checkpoint_id=where)
            set_state_dict(
                other,
                optimiser,
                model_state_dict=state["model"],
                optim_state_dict=state["optimiser"],
            )
            trained(other, optimiser)
            for name, value in numbers(other).items():
                torch.testing.assert_close(value, want[name], msg=f"{target}: {name}")


class Names(nn.Module):
    """A packed block by the names that layouts know."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(D_MODEL, 2 * D_HIDDEN, bias=False)
        self.down_proj = nn.Linear(D_HIDDEN, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


def converted() -> None:
    """`convert` reads what a plan saved, packed to separate, and what its processes hold."""
    module = Names()
    gf.replace(module, strict=True)
    x = torch.randn(3, D_MODEL)
    want = module(x)
    ours(module)
    at = "model.layers.0.mlp."
    parts: list[Any] = [None] * dist.get_world_size()
    own = {n: p.to_local() for n, p in module.named_parameters()}  # type: ignore[attr-defined]
    dist.all_gather_object(parts, own)
    state = get_model_state_dict(module)
    options = StateDictOptions(full_state_dict=True)
    whole: dict[str, Any] = {**get_model_state_dict(module, options=options)}
    with folder() as where:
        with pytest.raises(CheckpointException, match="HuggingFaceStorageWriter keeps one piece"):
            save(state, storage_writer=HuggingFaceStorageWriter(str(where)))
        if dist.get_rank() != 0:
            return
        held = {
            name: torch.cat([part[name] for part in parts], dim=int("down" in name))
            for name in parts[0]
        }
        for tensors, given in (
            (whole, {"layout": "phi3"}),
            (held, {"layout": "vllm", "from_tp": len(parts)}),
        ):
            source = where / f"from {given['layout']}.safetensors"
            save_file({f"{at}{name}": t.detach() for name, t in tensors.items()}, source)
            target = where / f"{given['layout']}.safetensors"
            convert(source, target, to="llama", verify=True, **given)
            separate = gf.FeedForward(D_MODEL, D_HIDDEN)
            read = load_file(target)
            separate.load_state_dict({name.removeprefix(at): t for name, t in read.items()})
            torch.testing.assert_close(separate(x), want)


def asked() -> None:
    """Pieces are told however PyTorch gives its arguments, and it is told of them once."""
    module = ours(packed("up_gate"))
    weight: Any = next(p for n, p in module.named_parameters() if "up" in n)
    assert len(weight.__create_write_items__("w", object=weight)) == 2
    before = DTensor.__create_chunk_list__
    ours(packed("up_gate"))
    assert DTensor.__create_chunk_list__ is before


def _cases() -> dict[str, Callable[[], None]]:
    made: dict[str, Callable[[], None]] = {}
    for source in SHARES:
        made[f"saved, {source}"] = partial(from_one_to_all, source)
    for source in ("one process", "TP"):
        made[f"saved, {source}, with an optimiser"] = partial(with_optimiser, source)
    return made | {"converted": converted, "asked": asked}


CASES = _cases()
