"""Cases that several processes run together: layers and functions on what they share."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gatedffn as gf
from gatedffn import functional as F
from gatedffn.errors import SettingError, ShapeError
from gatedffn.functional import ORDERS
from gatedffn.ops import measure
from gatedffn.ops.measure import Choice
from gatedffn.parallel import FeedForwardParallel, fsdp_placement
from support.compare import assert_matches

D_MODEL, D_HIDDEN = 16, 32
Share = Callable[[nn.Module], nn.Module]


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def full(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


class Packed(nn.Module):
    """Gate and up in one matrix, in an order."""

    def __init__(self, order: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(D_MODEL, 2 * D_HIDDEN, bias=bias)
        self.down = nn.Linear(D_HIDDEN, D_MODEL, bias=bias)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.split_packed(self.gate_up(x), -1, self.order)  # type: ignore[arg-type]
        return self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


def packed(order: str, bias: bool = False) -> nn.Module:
    made = Packed(order, bias)
    gf.replace(made, strict=True)
    return made


def layer(**options: Any) -> Callable[[], nn.Module]:
    return partial(gf.FeedForward, D_MODEL, D_HIDDEN, **options)


def step(module: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * weights).sum().backward()
    grads = {
        n.removeprefix("module.").removeprefix("_orig_mod."): p.grad
        for n, p in module.named_parameters()
    }
    assert None not in grads.values()
    return {"y": y.detach(), "x": x.grad, **grads}


def equal(make: Callable[[], nn.Module], share: Share, called: int, tokens: bool = False) -> None:
    """Output and gradients of a shared layer are those of one process; its children are called as
    often as is said. With `tokens` inputs and outputs are split along them.
    """
    alone = make()
    x, weights = torch.randn(2, 2, 8, D_MODEL)
    eager = step(copy.deepcopy(alone), x, weights)
    truth = step(copy.deepcopy(alone).double(), x.double(), weights.double())
    made = share(alone)
    count: list[None] = []
    original = gf.FeedForward._by_modules

    def by_modules(self: Any, x: Tensor) -> Tensor:
        count.append(None)
        return original(self, x)

    def part(t: Tensor) -> Tensor:
        return t.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] if tokens else t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gf.FeedForward, "_by_modules", by_modules)
        found = step(made, part(x), part(weights))
    assert len(count) == called
    for name, value in found.items():
        cut = part if name in ("y", "x") else lambda t: t
        assert_matches(full(value), cut(truth[name]), cut(eager[name]), name)


# Plans of others


def by_linear(module: nn.Module, local: bool = True) -> nn.Module:
    """Each projection by PyTorch's own styles."""
    column = partial(ColwiseParallel, use_local_output=local)
    plan: Any = {name: column() for name in ("gate_proj", "up_proj", "gate_up")}
    row = RowwiseParallel if local else partial(RowwiseParallel, input_layouts=Shard(-1))
    names = {name for name, _ in module.named_children()}
    plan = {name: style for name, style in plan.items() if name in names}
    return parallelize_module(
        module, mesh(), {**plan, "down_proj" if "down_proj" in names else "down": row()}
    )


def gathered(module: nn.Module) -> nn.Module:
    plan: Any = {n: ColwiseParallel(output_layouts=Replicate()) for n in ("gate_proj", "up_proj")}
    down = RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(module, mesh(), {**plan, "down_proj": down})


def packed_by_linear(order: str) -> None:
    made = by_linear(packed(order))
    with pytest.raises(SettingError, match=r"split over processes.*FeedForwardParallel"):
        made(torch.ones(2, D_MODEL))


# Ours


def ours(module: nn.Module, tokens: bool = False) -> nn.Module:
    return gf.parallelize(module, mesh(), sequence_parallel=tokens)


def by_style(module: nn.Module) -> nn.Module:
    wrapped = nn.ModuleDict({"ffn": module})
    parallelize_module(wrapped, mesh(), {"ffn": FeedForwardParallel()})
    return module


def hooked(module: nn.Module) -> nn.Module:
    """Something makes the children be called."""
    ours(module)
    module.get_submodule("up_proj").register_forward_hook(lambda *_: None)
    return module


def fsdp(module: nn.Module, **options: Any) -> nn.Module:
    fully_shard(module, **options)
    return module


def with_fsdp(module: nn.Module) -> nn.Module:
    both = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    gf.parallelize(module, both["tp"])
    return fsdp(module, mesh=both["dp"], shard_placement_fn=fsdp_placement)


def states() -> None:
    """A state dict is that of one process, or refused where PyTorch would change the order."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    for order in ORDERS:
        made = packed(order)
        want = {name: value.clone() for name, value in made.state_dict().items()}
        with_fsdp(made)
        found = get_model_state_dict(made, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(want[name], full(value)) for name, value in found.items()), order
    both = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    made = packed("gate_up")
    fsdp(gf.parallelize(made, both["tp"]), mesh=both["dp"])
    with pytest.raises(SettingError, match=r"=gatedffn\.parallel\.fsdp_placement"):
        made.state_dict()


def tied() -> None:
    """A weight that two layers share stays one."""
    one, two = gf.FeedForward(D_MODEL, D_HIDDEN), gf.FeedForward(D_MODEL, D_HIDDEN)
    two.up_proj.weight = one.up_proj.weight
    gf.parallelize(nn.ModuleList([one, two]), mesh())
    assert two.up_proj.weight is one.up_proj.weight
    assert two.gate_proj.weight is not one.gate_proj.weight


def refused() -> None:
    tied = nn.Sequential(layer()(), layer()())
    tied[1].up_proj = tied[0].up_proj
    for module, words in (
        (tied, "0 and 1 have a module in common"),
        (gf.FeedForward(D_MODEL, 31), "31 hidden units cannot be divided evenly by 2: choose"),
        (nn.Linear(2, 2), "holds no FeedForward.*gatedffn.replace"),
        (ours(layer()()), "it is sharded already: use this before fully_shard, and once"),
        (fsdp(layer()()), "it is sharded already"),
        (nn.Sequential(layer()(), gf.FeedForward(D_MODEL, 31)), "^1 cannot be shared"),
    ):
        before = [type(p) for p in module.parameters()]
        with pytest.raises(SettingError, match=words):
            gf.parallelize(module, mesh())
        assert [type(p) for p in module.parameters()] == before
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(SettingError, match=r"the mesh has 2 dimensions.*mesh\['tp'\]"):
        gf.parallelize(layer()(), both)
    with pytest.raises(SettingError, match="it is a Linear: it must be a FeedForward"):
        FeedForwardParallel()._apply(nn.Linear(2, 2), mesh())


def twice() -> None:
    """Gradients of gradients, which PyTorch would lose, raise."""
    made = ours(layer()())
    x = torch.ones(2, D_MODEL, requires_grad=True)
    y = made(x).square().sum()
    torch.autograd.grad(y, x, retain_graph=True)
    with pytest.raises(SettingError, match="create_graph=True, and gradients through a layer that"):
        torch.autograd.grad(y, x, create_graph=True)


def adapted() -> None:
    """What an adapter adds is no part of what processes share."""
    made = ours(layer()())
    made.get_submodule("up_proj").lora = nn.Linear(2, 2)
    made.get_submodule("up_proj").register_forward_hook(lambda *_: None)
    with pytest.raises(SettingError, match=r"up_proj\.lora\.weight was added.*fully_shard instead"):
        made(torch.ones(2, D_MODEL))
    plain = layer()()
    plain.get_submodule("up_proj").register_forward_hook(lambda *_: None)
    with pytest.raises(SettingError, match="up_proj is not a plain projection: merge adapters"):
        ours(plain)


def compiled(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(ours(module), backend="aot_eager")
    return made  # type: ignore[no-any-return]


# Functions


def function(call: Callable[..., Tensor], shapes: list[tuple[int, ...]], lies: list[Any]) -> None:
    """A function of DTensors gives what it gives of whole tensors, gradients included."""
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator) for shape in shapes]

    def run(values: list[Tensor]) -> list[Tensor]:
        y = call(*values)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        if isinstance(y, DTensor):
            weights = distribute_tensor(weights, y.device_mesh)
        return [y, *torch.autograd.grad((y * weights).sum(), values)]

    truth = run([t.double().requires_grad_() for t in given])
    eager = run([t.clone().requires_grad_() for t in given])
    there = mesh()
    shared = [distribute_tensor(t, there, [p]) for t, p in zip(given, lies, strict=True)]
    found = run([t.requires_grad_() for t in shared])
    assert all(isinstance(t, DTensor) for t in found)
    for number, (value, true, own) in enumerate(zip(found, truth, eager, strict=True)):
        assert_matches(full(value), true, own, f"result {number}")


def mixed() -> None:
    x = torch.randn(4, D_MODEL)
    there = distribute_tensor(x, mesh())
    words = "gate is a DTensor and up a plain tensor: all must be one or the other; distribute it"
    with pytest.raises(ShapeError, match=words):
        F.gating(there, x)
    with pytest.raises(ShapeError, match="gate is a DTensor and beta a plain tensor"):
        F.swish(there, torch.ones(1))
    made = layer()()
    with pytest.raises(ShapeError, match=r"x is a DTensor and gate a plain.*parallelize"):
        made(there)
    for child in made.children():
        child.weight = nn.Parameter(distribute_tensor(child.weight, mesh()))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="gate is a DTensor and x a plain tensor"):
        made(x)


# What is said


def _note(seen: list[str], module: nn.Module, _: object) -> None:
    seen.append(gf.explain(module)[0].path)


def explained() -> None:
    for make in (layer(learnable="unit"), partial(packed, "gate_up")):
        words = "weights are sharded at rest and gathered in a step"
        made = fsdp(nn.Sequential(make()))
        seen: list[str] = []
        made.get_submodule("0").register_forward_pre_hook(partial(_note, seen))
        (said,) = gf.explain(made)
        assert (said.path, said.why, said.sharded) == ("operator", None, words)
        assert said.plans
        made(torch.ones(2, D_MODEL))
        (said,) = gf.explain(made)
        assert said.path == "operator"
        assert seen == ["operator"]
        made = FullyShardedDataParallel(
            nn.Sequential(make()), use_orig_params=True, device_id=torch.device("cpu")
        )
        (said,) = gf.explain(made)
        assert (said.path, said.sharded) == ("operator", words)
        assert words in str(said)
    made = ours(layer(variant="prelu")())
    (said,) = gf.explain(made)
    assert (said.path, said.sharded) == ("operator", "one of 2 parts of the hidden units")
    assert "sharded" in said.to_json()
    made = by_linear(layer()())
    assert gf.explain(made)[0].path == "modules"


def chosen_together() -> None:
    """What the first process measures is what all take, and no other waits for ever."""
    names = ["few", "linear"]
    own = names[dist.get_rank() % 2]

    def decide(*_: object) -> Choice:
        return Choice(own, {own: 1.0}, "measured")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_decide", decide)
        patch.setattr(measure, "WAIT", 2.0)
        ours(layer()())
        taken = measure.choose("a key of this test", names, dict)
        assert taken.chosen == "few"
        assert dist.get_rank() == 0 or "first of the processes" in taken.by
        if dist.get_rank() == 1:  # the first never comes to this one
            assert measure.choose("a key of one process", names, dict).chosen == "linear"
    measure.forget()


LEARNED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "beta of the layer": {"learnable": "layer"},
    "xielu": {"variant": "xielu"},
    "xswiglu": {"variant": "xswiglu"},
    "beta of each unit": {"learnable": "unit"},
    "prelu": {"variant": "prelu"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **LEARNED,
    "biases": {"bias": True},
    "not gated": {"variant": "relu2", "bias": True},
    "save and tile": {"save": "input", "tile": 4},
    "named way": {"backend": "linear"},
}
R, S = Replicate, Shard
WEIGHTS = [(8, D_MODEL), (8, D_MODEL), (D_MODEL, 8), (8,), (8,), (D_MODEL,)]


def _cases() -> dict[str, Callable[[], None]]:
    made: dict[str, Callable[[], None]] = {}
    for name, options in LEARNED.items():
        made[f"by linear, {name}"] = partial(equal, layer(**options), by_linear, 1)
        if name in ("beta of the layer", "prelu"):
            made[f"by linear, DTensors between, {name}"] = partial(
                equal, layer(**options), partial(by_linear, local=False), 1
            )
    made["by linear, gathered"] = partial(equal, layer(learnable="layer"), gathered, 1)
    made["by linear, interleaved"] = partial(equal, partial(packed, "interleaved"), by_linear, 1)
    for order in ("gate_up", "up_gate"):
        made[f"by linear, {order}"] = partial(packed_by_linear, order)
    for name, options in OPTIONS.items():
        made[f"ours, {name}"] = partial(equal, layer(**options), ours, 0)
        made[f"ours, tokens, {name}"] = partial(
            equal, layer(**options), partial(ours, tokens=True), 0, True
        )
    for order in ORDERS:
        made[f"ours, {order}"] = partial(equal, partial(packed, order, True), ours, 0)
    made["compiled"] = partial(equal, layer(learnable="unit"), compiled, 0)
    made["compiled, packed"] = partial(equal, partial(packed, "gate_up"), compiled, 0)
    made["by style"] = partial(equal, layer(), by_style, 0)
    made["with FSDP2"] = partial(equal, layer(learnable="unit"), with_fsdp, 0)
    for name in ("beta of the layer", "prelu"):
        made[f"hooked, {name}"] = partial(equal, layer(**LEARNED[name], bias=True), hooked, 1)
    for here in (R(), S(0), S(1), Partial()):
        made[f"gating, {here}"] = partial(
            function,
            lambda g, u, b: F.gating(g, u, "swiglu", beta=b),
            [(4, 6), (4, 6), (6,)],
            [here, here, R()],
        )
        for order in ORDERS:
            made[f"glu, {order}, {here}"] = partial(
                function, partial(F.glu, variant="geglu", order=order), [(4, 12)], [here]
            )
    made["split_packed"] = partial(
        function, lambda x: torch.stack(F.split_packed(x, -1, "interleaved")), [(4, 12)], [S(1)]
    )
    made["swish"] = partial(function, lambda x, b: F.swish(x, b), [(4, 6), (1,)], [S(0), R()])
    for name, lies in {
        "units": [R(), S(0), S(0), S(1), S(0), S(0), R()],
        "tokens": [S(0), *[R()] * 6],
        "anyhow": [S(1), S(0), R(), S(0), R(), S(0), S(0)],
        "inputs": [S(1), S(1), S(1), R(), R(), R(), R()],
    }.items():
        made[f"feed_forward, {name}"] = partial(
            function, F.feed_forward, [(6, D_MODEL), *WEIGHTS], lies
        )
        made[f"gated_linear, {name}"] = partial(
            function, F.gated_linear, [(6, D_MODEL), *WEIGHTS[:2]], lies[:3]
        )
    made |= {
        "mixed": mixed,
        "states": states,
        "tied": tied,
        "refused": refused,
        "twice": twice,
        "adapted": adapted,
        "explained": explained,
        "chosen together": chosen_together,
    }
    return made


CASES = _cases()
