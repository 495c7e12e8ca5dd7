"""Experts that several processes share: by their hidden units, or each whole on one process."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import gatedffn as gf
from gatedffn import functional as F
from gatedffn.errors import SettingError, ShapeError
from gatedffn.parallel import ExpertsParallel
from support.compare import assert_matches
from support.shared import Share, fsdp, full, function, mesh
from support.stacked import COUNT, HIDDEN, VARIANTS, WIDTH, Stack

TOKENS = 8  # of a sequence; two sequences
Tensors = tuple[Tensor, ...]


def experts(**options: Any) -> Callable[[], nn.Module]:
    return partial(gf.Experts, WIDTH, HIDDEN, 4, **options)


def mixture(**options: Any) -> Callable[[], nn.Module]:
    return partial(gf.MixtureFeedForward, WIDTH, HIDDEN, 4, top_k=2, shared_hidden=4, **options)


class Turned(Stack):
    """Packed halves, (experts, in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(self.first.detach().transpose(1, 2).contiguous())

    def up(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.first[expert]


class Parts(nn.Module):
    """As Llama 4's: the input holds all tokens once for each expert, 0 where one is not chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, WIDTH, 2 * HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(4, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(len(self.down_proj), -1, x.shape[-1])
        gate, up = (parts @ self.gate_up_proj).chunk(2, dim=-1)
        return ((up * nn.functional.silu(gate)) @ self.down_proj).view(x.shape)


class OfParts(nn.Module):
    """The block around them, which adds in place to what its shared expert gives."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.shared = Parts(), gf.FeedForward(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = x[:, :4].topk(1)
        scores = torch.zeros_like(x[:, :4]).scatter(1, index, weights.sigmoid())
        parts = self.experts(x.repeat(4, 1) * scores.t().reshape(-1, 1))
        return self.shared(x).add_(parts.view(4, -1, WIDTH).sum(0))  # type: ignore[no-any-return]


def of_parts(share: Share) -> None:
    """All that is shared gives what one process gives."""
    alone = OfParts()
    made = copy.deepcopy(alone)
    gf.replace(made, strict=True)
    assert gf.explain(share(made))[0].path == "operator"
    x = torch.randn(TOKENS, WIDTH)
    want, found = (step(m, (x,), torch.ones_like(x)) for m in (alone, made))
    for name, value in want.items():
        torch.testing.assert_close(full(found[name]), value, msg=name)


def replaced(kind: type[nn.Module]) -> nn.Module:
    made = kind()
    gf.replace(made, strict=True)
    return made


def step(module: nn.Module, inputs: Tensors, cotangent: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, of the routing weights too."""
    given = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    y = module(*given)
    (y * cotangent).sum().backward()
    of_inputs = {str(place): t.grad for place, t in enumerate(given)}
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert None not in grads.values()
    return {"y": y.detach(), **{n: g for n, g in of_inputs.items() if g is not None}, **grads}


def equal(
    make: Callable[[], nn.Module],
    share: Share,
    *,
    beyond: bool = False,
    tokens: bool = False,
    flat: bool = True,
) -> None:
    """What is shared gives what one process gives, and the operator computes it. Where an index is
    `beyond` its slot gives nothing. With `tokens` inputs and outputs are split along them.
    """
    alone = make()
    shape = (2 * TOKENS,) if flat else (2, TOKENS)
    x, cotangent = torch.randn(2, *shape, WIDTH)
    inputs: Tensors = (x,)
    if not isinstance(alone, gf.MixtureFeedForward):
        count = getattr(alone, "num_experts", COUNT)
        inputs = x, torch.randint(count + beyond, (*shape, 2)), torch.rand(*shape, 2)

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    eager = step(copy.deepcopy(alone), inputs, cotangent)
    truth = step(copy.deepcopy(alone).double(), (*map(wide, inputs),), cotangent.double())
    made = share(alone)

    def part(t: Tensor) -> Tensor:
        return t.chunk(dist.get_world_size(), dim=-2)[dist.get_rank()] if tokens else t

    found = step(made, (*map(part, inputs),), part(cotangent))
    for name, value in found.items():
        cut = part if name == "y" or name.isdigit() else lambda t: t
        assert_matches(full(value), cut(truth[name]), cut(eager[name]), name)
    for said in gf.explain(made):
        assert said.path == "operator"


def by_units(module: nn.Module, tokens: bool = False) -> nn.Module:
    return gf.parallelize(module, mesh(), sequence_parallel=tokens)


def whole(module: nn.Module, tokens: bool = False) -> nn.Module:
    return gf.parallelize(module, mesh(), sequence_parallel=tokens, whole_experts=True)


def with_fsdp(share_whole: bool, module: nn.Module) -> nn.Module:
    both = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    gf.parallelize(module, both["tp"], whole_experts=share_whole)
    return fsdp(module, mesh=both["dp"])


def late(module: nn.Module) -> nn.Module:
    """Sharded first, and replaced then."""
    made = fsdp(module)
    gf.replace(made, strict=True)
    return made


def refused() -> None:
    with pytest.raises(SettingError, match=r"its 3 experts cannot be.*choose a num_experts"):
        whole(gf.Experts(8, 8, 3))
    with pytest.raises(SettingError, match=r"its 7 hidden units cannot be.*choose a d_hidden"):
        by_units(gf.Experts(8, 7, 4))
    with pytest.raises(SettingError, match="it is sharded already"):
        by_units(whole(gf.Experts(8, 8, 4)))
    with pytest.raises(SettingError, match="it is a Stack: it must be an Experts, or"):
        ExpertsParallel()._apply(Stack(), mesh())
    with pytest.raises(SettingError, match=r"all tokens once for each expert.*leave out sequence"):
        by_units(replaced(Parts), tokens=True)
    with pytest.raises(SettingError, match="mesh is 'tp': it must be a DeviceMesh"):
        gf.parallelize(gf.Experts(8, 8, 4), "tp")  # type: ignore[arg-type]
    made = whole(gf.Experts(8, 8, 4))
    x, index = torch.randn(2, 8), torch.tensor([[0], [-1]])
    with pytest.raises(ShapeError, match="index holds -1"):
        made(x, index, torch.ones(2, 1))


def explained() -> None:
    for share, what in ((by_units, "hidden units"), (whole, "experts")):
        (said,) = gf.explain(share(gf.Experts(8, 8, 4)))
        assert said.sharded == f"one of 2 parts of the {what}"
        assert said.plans


def call(
    x: Tensor,
    weights: Tensor,
    gate: Tensor,
    *rest: Tensor,
    packed: bool = False,
    **options: Any,
) -> Tensor:
    """`functional.experts` of an index in which one names nothing."""
    index = torch.tensor([[0, 3], [1, 1], [2, 5], [3, 0]])
    if isinstance(x, DTensor):
        index = distribute_tensor(index, x.device_mesh)
    up, (down, gate_bias, *biases) = (None, rest) if packed else (rest[0], rest[1:])
    up_bias, down_bias = (None, *biases[:1]) if packed else biases[:2]
    learned: dict[str, Any] = {} if packed or len(biases) < 3 else {"beta": biases[2]}
    return F.experts(
        x, gate, up, down, index, weights, gate_bias, up_bias, down_bias, **learned, **options
    )


R, S = Replicate, Shard
SHAPES = [(4, 6), (4, 2), (4, 8, 6), (4, 8, 6), (4, 6, 8), (4, 8), (4, 8), (4, 6), (8,)]
PACKED = [(4, 6), (4, 2), (4, 16, 6), (4, 6, 8), (4, 16), (4, 6)]
HALVES = _StridedShard(1, split_factor=2)
LIES: dict[str, list[Any]] = {
    "experts": [R(), R(), *[S(0)] * 6, R()],
    "units": [R(), R(), S(1), S(1), S(2), S(1), S(1), R(), S(0)],
    "tokens": [S(0), S(0), *[R()] * 7],
    "anyhow": [S(1), S(0), S(1), R(), S(0), S(1), R(), S(1), R()],
}


def _cases() -> dict[str, Callable[[], None]]:
    made: dict[str, Callable[[], None]] = {}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "biases": {"bias": True, "save": "input", "weigh": "input"},
        "not gated": {"variant": "relu2", "bias": True},
        "learned per layer": {"variant": "xielu"},
        "learned per unit": {"learnable": "unit"},
    }
    for how, share in {"units": by_units, "whole": whole}.items():
        for name, of in options.items():
            made[f"experts, {how}, {name}"] = partial(equal, experts(**of), share, beyond=True)
        for kind in (*VARIANTS, Turned):
            made[f"experts, {how}, {kind.__name__}"] = partial(
                equal, partial(replaced, kind), share
            )
        for flat in (True, False):
            made[f"experts, {how}, tokens, {flat}"] = partial(
                equal, experts(bias=True), partial(share, tokens=True), tokens=True, flat=flat
            )
        made[f"experts, {how}, of parts"] = partial(of_parts, share)
        made[f"experts, {how}, mixture"] = partial(equal, mixture(), share)
        made[f"experts, {how}, with FSDP2"] = partial(
            equal, experts(bias=True), partial(with_fsdp, how == "whole"), beyond=True
        )
    made["experts, late"] = partial(equal, Stack, late)
    for name, lies in LIES.items():
        made[f"functional.experts, {name}"] = partial(function, call, SHAPES, lies)
    for name, (order, lies) in {
        "halves": ("gate_up", [R(), R(), HALVES, S(2), HALVES, R()]),
        "pairs": ("interleaved", [R(), R(), S(1), S(2), S(1), R()]),
        "cut apart": ("up_gate", [R(), R(), S(1), S(2), S(1), R()]),
    }.items():
        made[f"functional.experts, {name}"] = partial(
            function, partial(call, packed=True, order=order), PACKED, lies
        )
    return made | {"experts refused": refused, "experts explained": explained}


CASES = _cases()
