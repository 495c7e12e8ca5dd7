"""What a block's class says and asks: its arguments, its sizes, which class it runs in."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, ENCODER, Architecture
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import gatedffn as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
D, H = 16, 48


class Mlp(nn.Module):
    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(d, h), nn.Linear(h, d), nn.ReLU()

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(states)))
        return result


class Layer(Mlp):
    """Does more than a feed-forward, and is replaced as a whole."""

    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__(d, h)
        self.inner = nn.Sequential(nn.Linear(d, d))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        states = states + self.inner(states) * (1.0 if mask is None else mask)
        return states + super().forward(states)


def encoder_layer(width: int = H, **settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, width, dropout=0.0, batch_first=True, **settings)


# The class that it runs in.


class Wrapping(nn.Module):
    """Wraps the forward of its subclasses as transformers does for checkpointing."""

    wrapped = 0

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        @wraps(forward)
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            if type(self).forward is counted and self.training:
                self.wrapped = self.wrapped + 1
            return forward(self, *args, **kwargs)

        cls.forward = counted


class WrappedMlp(Mlp, Wrapping):
    pass


class WrappedLayer(Layer, Wrapping):
    pass


@pytest.mark.parametrize("kind", [WrappedMlp, WrappedLayer])
@pytest.mark.parametrize("hook", [False, True])
def test_a_wrapper_that_asks_for_its_class_finds_it(kind: type[Any], hook: bool) -> None:
    block = kind()
    x = torch.randn(2, 3, D)
    wanted = block(x)
    report = gf.replace(block, strict=True)
    if hook:
        block.fc1.register_forward_hook(lambda *_: None)
    before = block.wrapped
    torch.testing.assert_close(block(x), wanted)
    assert block.wrapped == before + 1
    block.eval()
    torch.testing.assert_close(block(x), wanted)
    assert block.wrapped == before + 1
    report.undo()


class Asking(Layer):
    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        assert type(self) is Asking
        return super().forward(states, mask)


def test_a_forward_that_asks_for_its_class_finds_it() -> None:
    layer = Asking()
    x = torch.randn(2, 3, D)
    wanted = layer(x)
    gf.replace(layer, strict=True)
    torch.testing.assert_close(layer(x), wanted)
    assert gf.explain(layer)[0].path == "operator"


# Its arguments.


def signatures(block: nn.Module) -> list[inspect.Signature]:
    return [inspect.signature(block.forward), inspect.signature(type(block).forward)]


@pytest.mark.parametrize(
    ("build", "where"),
    [
        *((Mlp, ""), (Layer, ""), (encoder_layer, "")),
        (lambda: ARCHITECTURES["llama"].build(), "layers.0.mlp"),
        (lambda: ARCHITECTURES["opt"].build(), "decoder.layers.0"),
        (lambda: ARCHITECTURES["bloom"].build(), "h.0.mlp"),
    ],
)
def test_the_arguments_are_named_as_before(build: Callable[[], nn.Module], where: str) -> None:
    model = build()
    block = model.get_submodule(where)
    before = signatures(block)
    report = gf.replace(model)
    assert isinstance(block, gf.FeedForward)
    assert signatures(block) == before
    report.undo()
    assert signatures(block) == before


@pytest.mark.parametrize("kind", [Mlp, Layer])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(kind: type[nn.Module], by_name: bool, strict: bool) -> None:
    block = kind()
    gf.replace(block, strict=True)
    sizes: Any = {1: Dim("tokens", min=2, max=64)}
    more = [None] * (kind is Layer)
    names = ["states", "mask"]
    shapes: Any = dict(zip(names, [sizes, *more], strict=False)) if by_name else (sizes, *more)
    x = torch.randn(2, 5, D)
    program = torch.export.export(block, (x, *more), dynamic_shapes=shapes, strict=strict)
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(program.module()(x, *more), block(x))


# Its sizes.


def narrow(linear: Any, out: int, d_in: int, *, data: bool) -> None:
    """Keeps the first so many rows and columns, as pruning does."""
    weight, bias = linear.weight[:out, :d_in], linear.bias[:out]
    for name, kept in (("weight", weight), ("bias", bias)):
        if data:
            getattr(linear, name).data = kept.detach().clone()
        else:
            setattr(linear, name, nn.Parameter(kept.detach().clone()))


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("kind", [Mlp, gf.FeedForward])
def test_sizes_are_those_of_the_weights(kind: Any, when: str, data: bool) -> None:
    block = kind(D, H, variant="relu", bias=True) if kind is gf.FeedForward else kind()
    up, down = list(block.children())[:2]
    if when == "after":
        gf.replace(block)
    narrow(up, 40, 12, data=data)
    narrow(down, 12, 40, data=data)
    gf.replace(block)
    x = torch.randn(3, 12)
    torch.testing.assert_close(block(x), down(torch.relu(up(x))))
    assert (block.d_model, block.d_hidden, block.d_out) == (12, 40, 12)
    assert "12 -> 40 -> 12" in repr(block)
    assert gf.explain(block)[0].layer == "ReLU, 12 -> 40 -> 12"
    with pytest.raises(gf.GatedFFNError, match="its last size must be d_model, 12"):
        block(torch.randn(3, D))


@pytest.mark.parametrize(("name", "halves"), [("phi3", 2), ("gpt2", 1)])
def test_sizes_of_packed_and_of_turned_weights(name: str, halves: int) -> None:
    model = ARCHITECTURES[name].build()
    block = model.get_submodule(gf.replace(model).replaced[0].name)
    up = block.get_submodule(block._roles.up.name)
    width = 20 * halves
    up.weight.data = torch.randn(32, width) if name == "gpt2" else torch.randn(width, 32)
    assert (block.d_model, block.d_hidden, block.d_out) == (32, 20, 32)


# A feed-forward as wide as the model.


@pytest.mark.parametrize(
    "build",
    [
        lambda: encoder_layer(D),
        lambda: nn.TransformerDecoderLayer(D, 2, D, dropout=0.0, batch_first=True),
        lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)),
        lambda: Layer(D, D),
        lambda: Architecture("bert", "gelu", {**ENCODER, "intermediate_size": 32}).build(),
        lambda: Architecture("bert", "gelu", {**ENCODER, "intermediate_size": 24}).build(),
    ],
)
def test_a_feed_forward_as_wide_as_the_model_is_found(build: Callable[[], nn.Module]) -> None:
    assert gf.replace(build(), strict=True).replaced


def test_one_that_is_not_understood_is_named() -> None:
    report = gf.replace(encoder_layer(D, activation=nn.functional.softsign))
    assert [block.name for block in report.left] == [""]
    assert "no variant of the table computes" in str(report.left[0].reason)


class Noise(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + torch.rand_like(x)


def test_attention_with_what_could_be_an_activation_is_not_named() -> None:
    attention: Any = type("Attention", (nn.Module,), {"forward": lambda self, x: self.q(x)})()
    attention.q, attention.k, attention.v = (nn.Linear(D, D) for _ in range(3))
    attention.rope, attention.noise = (lambda q, k: (q, k)), Noise()
    state = torch.get_rng_state()
    assert not gf.replace(attention).left
    assert torch.equal(torch.get_rng_state(), state)
    assert attention.noise.calls == 0


# What it costs to find out.


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_attention_that_looks_like_a_gated_block_costs_little() -> None:
    counts = []
    for name in ("llama", "bert"):
        model = ARCHITECTURES[name].build()
        with Counting() as counting:
            gf.replace(model)
        counts.append(counting.count)
    assert counts[1] < 2 * counts[0]
