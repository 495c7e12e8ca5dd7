"""A feed-forward that a layer has inline, and attention, which is none."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedffn as gf

D, H = 16, 32
MORE = "its forward does more than the feed-forward, and "


class Layer(nn.Module):
    """`fc2(act(fc1(x)))` with whatever else there may be in a layer."""

    def __init__(self, h: int, *, extra: bool, norm: bool, residual: bool, held: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, h), nn.Linear(h, D)
        self.residual = residual
        if held:
            self.act = nn.ReLU()
        if extra:
            self.other = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.other(x) if hasattr(self, "other") else x
        hidden = self.fc1(self.norm(y))
        made: Tensor = self.fc2(self.act(hidden) if hasattr(self, "act") else hidden.relu())
        return y + made if self.residual else made


@pytest.mark.parametrize("h", [D, 2 * D])
def test_a_feed_forward_that_is_inline_is_never_passed_over(h: int) -> None:
    for extra, norm, residual, held in itertools.product((False, True), repeat=4):
        layer = Layer(h, extra=extra, norm=norm, residual=residual, held=held)
        x = torch.randn(3, D)
        y = layer(x)
        report = gf.replace(layer)
        if held or not (extra or residual):
            assert not report.left
            (block,) = report.replaced
            assert (block.variant, block.projections) == ("relu", {"up": "fc1", "down": "fc2"})
        else:
            (left,) = report.left
            assert left.reason == f"{MORE}its activation is no attribute of it"
        torch.testing.assert_close(layer(x), y)


def inline(function: Callable[..., Tensor], **sizes: tuple[int, int]) -> nn.Module:
    """A layer of projections with a forward."""
    layer: nn.Module = type("Inline", (nn.Module,), {"forward": function})()
    for name, (d_in, d_out) in sizes.items():
        layer.add_module(name, nn.Linear(d_in, d_out))
    return layer


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    "layer",
    [
        inline(
            lambda s, x: x + s.down(F.silu(s.gate(s.a(x))) * s.up(x)),
            down=(H, D), a=(D, D), gate=(D, H), up=(D, H),
        ),
        inline(  # the channel mixing of RWKV
            lambda s, x: s.r(x).sigmoid() * s.value(s.key(x).relu() ** 2),
            key=(D, H), value=(H, D), r=(D, D),
        ),
        inline(
            lambda s, x: (y := x + s.o(attend(s.q(x), s.k(x), s.v(x)))) + s.two(F.gelu(s.one(y))),
            q=(D, D), k=(D, D), v=(D, D), o=(D, D), one=(D, D), two=(D, D),
        ),
    ],
    ids=["gated", "rwkv", "a whole layer"],
)  # fmt: skip
def test_one_among_other_projections_is_left_with_its_reason(layer: nn.Module) -> None:
    (left,) = gf.replace(layer).left
    assert str(left.reason).startswith(MORE)


@pytest.mark.parametrize(
    "layer",
    [
        inline(
            lambda s, x: s.o(attend(s.q(x), s.k(x), s.v(x))),
            q=(D, D), k=(D, D), v=(D, D), o=(D, D),
        ),
        inline(
            lambda s, x: s.o(s.g(x).sigmoid() * attend(x, x, s.v(x))),
            v=(D, D), g=(D, D), o=(D, D),
        ),
        inline(
            lambda s, x: s.o(attend(s.b(s.a(x)), x, s.v(x))),
            a=(D, 2), b=(2, D), v=(D, D), o=(D, D),
        ),
    ],
    ids=["square", "gated", "factored"],
)  # fmt: skip
def test_attention_is_not_named(layer: nn.Module) -> None:
    layer.act = nn.Identity()
    report = gf.replace(layer)
    assert not report.left
    assert not report.replaced
