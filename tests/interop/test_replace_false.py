"""Blocks that nearly compute a variant: each differs in one thing, and is left for that."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedffn as gf

D, H = 16, 48
Forward = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, forward: Forward | None = None, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.gate_proj = kind(D, H, bias=False)
        self.up_proj = kind(D, H, bias=False)
        self.down_proj = kind(H, D, bias=False)
        self.act: Any = nn.SiLU()
        self.function: Any = F.silu
        self.n = 0
        self.seen: list[Any] = []
        self.own = forward

    def forward(self, x: Tensor) -> Tensor:
        return plain(self, x) if self.own is None else self.own(self, x)


def plain(block: Block, x: Tensor) -> Tensor:
    y: Tensor = block.down_proj(block.act(block.gate_proj(x)) * block.up_proj(x))
    return y


def hidden(block: Block, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    y: Tensor = block.down_proj(change(block.act(block.gate_proj(x)) * block.up_proj(x)))
    return y


def counts(block: Block, x: Tensor) -> Tensor:
    block.n += 1
    return plain(block, x)


def collects(block: Block, x: Tensor) -> Tensor:
    block.seen.append(x.shape)
    return plain(block, x)


def without_gradients(block: Block, x: Tensor) -> Tensor:
    return plain(block, x if torch.is_grad_enabled() else 2 * x)


def doubles_long_inputs(block: Block, x: Tensor) -> Tensor:
    return plain(block, 2 * x if x.dim() > 2 and x.shape[1] > 64 else x)


def doubles_without_a_batch(block: Block, x: Tensor) -> Tensor:
    return plain(block, 2 * x if x.dim() == 2 else x)


def small_gate(block: Block, x: Tensor) -> Tensor:
    gate = F.hardshrink(block.gate_proj(x), 1e-4)
    y: Tensor = block.down_proj(block.act(gate) * block.up_proj(x))
    return y


def in_dtype(dtype: torch.dtype) -> Forward:
    return lambda block, x: hidden(
        block, x, lambda h: h.clamp(-100, 100) if h.dtype == dtype else h
    )


NEARLY: dict[str, tuple[Forward, torch.dtype]] = {
    "a limit on the input": (lambda b, x: plain(b, x.clamp(-10, 10)), torch.float32),
    "a branch on the input": (
        lambda b, x: plain(b, 2 * x if x.abs().max() > 20 else x),
        torch.float32,
    ),
    "a far limit on the output": (lambda b, x: plain(b, x).clamp(-65504, 65504), torch.float32),
    "a far limit on the hidden values": (
        lambda b, x: hidden(b, x, lambda h: h.clamp(-3e6, 3e6)),
        torch.float32,
    ),
    "small values are dropped": (small_gate, torch.float32),
    "a limit in float16": (in_dtype(torch.float16), torch.float16),
    "a limit in bfloat16": (in_dtype(torch.bfloat16), torch.bfloat16),
    "a limit in float32": (in_dtype(torch.float32), torch.float32),
    "another way without gradients": (without_gradients, torch.float32),
    "another way for long inputs": (doubles_long_inputs, torch.float32),
    "another way without a batch": (doubles_without_a_batch, torch.float32),
    "it counts": (counts, torch.float32),
    "it collects": (collects, torch.float32),
    "the output is detached": (lambda b, x: plain(b, x).detach(), torch.float32),
    "the input is detached": (lambda b, x: plain(b, x.detach()), torch.float32),
}


@pytest.mark.parametrize("name", list(NEARLY))
def test_what_is_nearly_a_variant_is_left(name: str) -> None:
    forward, dtype = NEARLY[name]
    block = Block(forward).to(dtype)
    before = set(vars(block))
    report = gf.replace(block)
    assert not report.replaced
    assert len(report.left) == 1
    assert set(vars(block)) == before


def test_the_plain_block_beside_them_is_not() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert gf.replace(Block().to(dtype)).replaced


class Unseen(Block):
    """Reads the weights by itself."""

    limit = 0.0

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_proj.weight), F.linear(x, self.up_proj.weight)
        product = F.silu(gate) * up
        if self.limit:
            product = product.clamp(-self.limit, self.limit)
        return F.linear(product, self.down_proj.weight)


@pytest.mark.parametrize("limit", [0.0, 50.0, 1000.0, 65504.0])
def test_a_limit_in_a_forward_that_reads_the_weights_is_noticed(limit: float) -> None:
    block = Unseen()
    block.limit = limit
    assert bool(gf.replace(block).replaced) is (limit == 0.0)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, 0.5, self.training))


class Limited(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-20, 20))


class Frozen(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.detach(), self.bias)


class Named(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [Doubled, Dropping, Limited, Frozen])
@pytest.mark.parametrize("zero", [False, True])
def test_a_projection_that_is_nearly_one_is_left(kind: type[nn.Linear], zero: bool) -> None:
    block = Block(kind=kind).eval()
    if zero:
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
    state = torch.get_rng_state()
    assert not gf.replace(block).replaced
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("zero", [False, True])
def test_a_class_that_is_a_linear_by_another_name_is_replaced(zero: bool) -> None:
    block = Block(kind=Named)
    if zero:
        nn.init.zeros_(block.down_proj.weight)
    assert gf.replace(block).replaced


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.silu(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_learned_number_in_another_place_is_left(frozen: bool) -> None:
    block = Block().requires_grad_(not frozen)
    block.act = Scaled().requires_grad_(not frozen)  # while it is one, it looks as Swish's beta
    (left,) = gf.replace(block).left
    assert all(parameter.requires_grad is not frozen for parameter in block.parameters())
    assert "another gradient" in str(left.reason)


@pytest.mark.parametrize("inplace", [nn.SiLU(inplace=True), nn.ReLU(inplace=True)])
def test_an_activation_in_place_is_understood(inplace: nn.Module) -> None:
    block = nn.Sequential(nn.Linear(D, H), inplace, nn.Linear(H, D))
    x = torch.randn(2, 3, D)
    before = block(x)
    assert gf.replace(block).replaced
    torch.testing.assert_close(block(x), before)


def other_gelu(block: Block) -> None:
    block.act = nn.GELU("tanh")


def changed_gelu(block: Block) -> None:
    block.act.approximate = "tanh"


@pytest.mark.parametrize("change", [other_gelu, changed_gelu])
def test_another_gelu_afterwards_is_followed(change: Callable[[Block], None]) -> None:
    block = Block()
    block.act = nn.GELU()
    gf.replace(block)
    block = copy.deepcopy(block)
    assert block.why_modules() is None  # type: ignore[operator]
    change(block)
    x = 3 * torch.randn(2, 3, D)
    assert torch.equal(block(x), plain(block, x))


def test_another_function_afterwards_is_followed() -> None:
    block = Block()
    block.own = lambda b, x: b.down_proj(b.function(b.gate_proj(x)) * b.up_proj(x))
    assert gf.replace(block).replaced
    block.function = F.gelu
    x = torch.randn(2, 3, D)
    assert torch.equal(block(x), block.own(block, x))


class Residual(nn.Module):
    """Computes more than a feed-forward."""

    def __init__(self, change: Callable[["Residual", Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, H), nn.Linear(H, D), nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(D, D))
        self.change = change
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x)
        hidden = self.act(self.fc1(x))
        hidden = hidden if self.change is None else self.change(self, hidden)
        y: Tensor = x + self.fc2(hidden)
        return y


def keeps(layer: Residual, hidden: Tensor) -> Tensor:
    layer.kept = hidden.abs().sum()
    return hidden


def limits(_: Residual, hidden: Tensor) -> Tensor:
    return hidden.clamp(max=100) if hidden.dtype == torch.float32 else hidden


@pytest.mark.parametrize("change", [None, keeps, limits])
def test_a_layer_that_does_more_with_its_hidden_values_is_left(change: Any) -> None:
    layer = Residual(change)
    assert bool(gf.replace(layer).replaced) is (change is None)
    assert layer.kept is None


def sometimes_keeps(layer: Residual, hidden: Tensor) -> Tensor:
    if hidden.dim() == 2:
        layer.kept = True
    return hidden


def test_what_a_forward_keeps_is_kept_by_the_layer() -> None:
    layer = Residual(sometimes_keeps)
    assert gf.replace(layer).replaced
    layer(torch.randn(3, D))
    assert layer.kept


def test_a_register_of_classes_is_not_written_to() -> None:
    register: dict[str, type] = {}

    class Registered(Block):
        def __init_subclass__(cls) -> None:
            register[cls.__name__] = cls

    class Mine(Registered):
        pass

    assert gf.replace(Mine()).replaced
    assert register == {"Mine": Mine}


def test_the_default_device_and_inference_mode_change_nothing() -> None:
    with torch.device("meta"), torch.inference_mode():
        block = nn.Sequential(Named(D, H, device="cpu"), nn.GELU(), nn.Linear(H, D, device="cpu"))
        report = gf.replace(block)
    assert "inference mode" in str(report.left[0].reason)
    block = nn.Sequential(Named(D, H), nn.GELU(), nn.Linear(H, D))
    with torch.device("meta"), torch.inference_mode():
        assert gf.replace(block).replaced


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_model_raises() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)))
    with pytest.raises(gf.GatedFFNError, match="replace the module that it was made from"):
        gf.replace(scripted)
    report = gf.replace(nn.Sequential(scripted))
    assert [str(b.reason) for b in report.left] == [
        "it is scripted: replace the module that it was made from"
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_replaced_block_says_that_it_cannot_be_scripted() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)))
    report = gf.replace(model)
    with pytest.raises(gf.GatedFFNError, match=r"undo that first, or use torch\.compile or torch"):
        torch.jit.script(model)
    report.undo()
    torch.jit.script(model)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_what_is_no_name_raises(argument: str) -> None:
    arguments: dict[str, Any] = {argument: 5}
    with pytest.raises(gf.GatedFFNError, match="is 5: give a pattern"):
        gf.replace(Block(), **arguments)
