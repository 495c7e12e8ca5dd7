"""Blocks replaced in the order of loaders: on the meta device, sharded, then loaded."""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import gatedffn as gf
from gatedffn.interop.replacing import replace as replacing
from gatedffn.interop.replacing.structure import NotUnderstood
from support.architectures import OLD, TEXT, Architecture
from support.compare import assert_matches
from support.shared import (
    D_HIDDEN,
    D_MODEL,
    Packed,
    Share,
    by_linear,
    equal,
    fsdp,
    full,
    ours,
    with_fsdp,
)
from support.shared_checkpoints import folder


class Separate(nn.Module):
    """A block of another library."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D_MODEL, D_HIDDEN)
        self.up_proj = nn.Linear(D_MODEL, D_HIDDEN)
        self.down_proj = nn.Linear(D_HIDDEN, D_MODEL)
        self.act = activation or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Learned(nn.Module):
    """One with a learned activation, and without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(D_MODEL, D_HIDDEN, bias=False)
        self.act = nn.PReLU()
        self.down_proj = nn.Linear(D_HIDDEN, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))  # type: ignore[no-any-return]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "separate": Separate,
    "packed": partial(Packed, "up_gate"),
    "learned": Learned,
}


def replaced_after(share: Share, module: nn.Module) -> nn.Module:
    """Shared first, and replaced then."""
    made = share(module)
    gf.replace(made, strict=True)
    return made


def by_linear_fsdp(module: nn.Module) -> nn.Module:
    for child in module.children():
        if isinstance(child, nn.Linear):
            fsdp(child)
    return fsdp(module)


def loaded(share: Share, module: nn.Module, *, late: bool = False) -> nn.Module:
    """Made without numbers, replaced and shared, and given the numbers of a state dict then."""
    state = {name: t.clone() for name, t in module.state_dict().items()}
    made = copy.deepcopy(module).to("meta")
    if not late:
        gf.replace(made, strict=True)
    share(made)
    if late:
        gf.replace(made, strict=True)
    made.to_empty(device="cpu")
    set_model_state_dict(made, state, options=StateDictOptions(full_state_dict=True))
    return made


def taken_back() -> None:
    made = fsdp(Separate())
    kind = type(made)
    report = gf.replace(made, strict=True)
    assert type(made) is not kind
    report.undo()
    assert type(made) is kind


def one_leaves() -> None:
    """A block that one process leaves is left by all, with the reason."""
    made = nn.ModuleList([Separate(), Learned()])
    fsdp(made[0])
    fsdp(made[1])
    kinds = [type(module) for module in made]
    take = replacing._take

    def refuses(found: Any, settings: Any) -> Any:
        if dist.get_rank() == 1 and isinstance(found.module, Separate):
            raise NotUnderstood("this process will not")
        return take(found, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacing, "_take", refuses)
        report = gf.replace(made)
    assert [block.name for block in report.replaced] == ["1"]
    (left,) = report.left
    words = ["another process leaves it, and all that share a model", "this process will not"]
    assert words[dist.get_rank()] in str(left.reason)
    assert type(made[0]) is kinds[0]


def reasons() -> None:
    """What is said of a block that is left is true of it."""

    def said(module: nn.Module) -> str:
        (left,) = gf.replace(module).left
        return str(left.reason)

    flat = {"device_id": torch.device("cpu")}
    for by_name in (True, False):
        made = FullyShardedDataParallel(Separate(), use_orig_params=by_name, **flat)  # type: ignore[arg-type]
        assert "is held flat by FullyShardedDataParallel: replace the model before" in said(made)
    hooked = fsdp(Separate())
    hooked.get_submodule("act").register_forward_hook(lambda *_: None)
    assert "a module in it, has a hook" in said(hooked)
    softsign = fsdp(Separate(nn.Softsign()))
    assert "no variant of the table computes" in said(softsign)
    with_buffer = Separate()
    with_buffer.register_buffer("limit", torch.ones(()))
    assert "limit is a buffer whose numbers are not here: load" in said(with_buffer.to("meta"))
    bent = by_linear(Separate())
    vars(bent)["forward"] = bent.forward
    assert "a forward of its own" in said(bent)


CAUSAL = partial(Architecture, kind="AutoModelForCausalLM")
MODELS = {
    "packed": CAUSAL("phi3", "swiglu"),
    "learned": CAUSAL("apertus", "xielu"),
    "experts": CAUSAL("mixtral", "swiglu", {**TEXT, "num_local_experts": 4}),
}


def by_transformers(kind: str) -> None:
    """A model that transformers loads by its own plan: its blocks are replaced then, and experts
    are computed here by the name in its registry.
    """
    architecture, experts = MODELS[kind], kind == "experts"
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    alone = architecture.build()
    with folder() as where:
        if dist.get_rank() == 0:
            alone.save_pretrained(where)
        dist.barrier()
        given = {"experts_implementation": "gatedffn"} if experts else {}
        made = type(alone).from_pretrained(where, tp_plan="auto", **given)
    report = gf.replace(made)
    assert len(report.replaced) == (0 if experts else 2)
    words = "a plan has put a forward around its own: load the model with experts_implementation"
    assert all(words in str(block.reason) for block in report.left)
    alone.load_state_dict({name: full(t).clone() for name, t in made.state_dict().items()})
    inputs = architecture.inputs()
    if experts:
        alone.set_experts_implementation("eager")
    models: list[Any] = [made, copy.deepcopy(alone).double(), alone]
    found = []
    for model in models:
        with torch.no_grad():
            inference = model(**inputs)[0]
        y = full(model(**inputs)[0])
        torch.autograd.backward(y.square().mean())
        grads = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        found.append({"inference": inference, "output": y.detach(), **grads})
    for name, value in found[0].items():
        assert_matches(value, found[1][name], found[2][name], name)


def _cases() -> dict[str, Callable[[], None]]:
    made: dict[str, Callable[[], None]] = {}
    for name, make in BLOCKS.items():
        shares: dict[str, tuple[Share, int]] = {
            "DDP": (DistributedDataParallel, 0),
            "FSDP2": (fsdp, 0),
            "FSDP2 by linear": (by_linear_fsdp, 1),
            "a plan": (by_linear, 1),
        }
        for how, (share, called) in shares.items():
            if (how, name) != ("a plan", "packed"):  # whose rows it would split as one matrix
                made[f"after {how}, {name}"] = partial(
                    equal, make, partial(replaced_after, share), called
                )
        for how, share in {"FSDP2": fsdp, "TP": ours, "2D": with_fsdp}.items():
            made[f"meta, then {how}, {name}"] = partial(equal, make, partial(loaded, share), 0)
        made[f"meta, FSDP2, then replaced, {name}"] = partial(
            equal, make, partial(loaded, fsdp, late=True), 0
        )
    if not OLD:  # whose plans are others
        for kind in MODELS:
            made[f"tp_plan, {kind}"] = partial(by_transformers, kind)
    return made | {"taken back": taken_back, "one leaves": one_leaves, "reasons": reasons}


CASES = _cases()
