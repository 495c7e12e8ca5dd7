"""The gated convolution, the stack built of it, and the published networks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.cases import rows
from support.compare import assert_matches, same_bits
from support.eager import eager_gating
from torch import Tensor, nn

from gatedffn import GatedConv1d, GatedConvStack, GatedFFNError
from gatedffn.convolution import NETWORKS
from gatedffn.errors import ParameterError, SettingError, ShapeError
from gatedffn.layers import Learnable
from gatedffn.variants import VARIANTS, Variant

PUBLISHED = ("glu", "gtu", "bilinear", "relu", "tanh")  # Dauphin et al. 2016, section 5


def summed(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A causal convolution as a sum over how many positions ago."""
    width, total = kernel.shape[-1], torch.zeros((), dtype=x.dtype)
    for back in range(width):
        shifted = F.pad(x, (back, 0))[..., : x.shape[-1]]
        total = total + torch.einsum("oi,bit->bot", kernel[:, :, width - 1 - back], shifted)
    return total if bias is None else total + bias[:, None]


def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv1d(F.pad(x, (kernel.shape[-1] - 1, 0)), kernel, bias)


def by_hand(layer: GatedConv1d, x: Tensor) -> Tensor:
    """The layer from its own tensors; in float64, where it is the truth, without F.conv1d."""
    state, row = dict(layer.named_parameters()), VARIANTS[layer.variant]
    convolution = summed if x.dtype == torch.float64 else convolved

    def convolve(name: str) -> Tensor:
        return convolution(x, state[f"{name}_conv.weight"], state.get(f"{name}_conv.bias"))

    values: dict[str, Any] = {
        name: value[:, None] if isinstance(value, Tensor) else value
        for name, value in layer.activation_parameters().items()
    }
    if row.gated:
        return eager_gating(convolve("gate"), convolve("up"), row, values)
    return eager_gating(convolve("up"), None, row, values)


def all_gradients(layer: GatedConv1d, x: Tensor, *, hand: bool = False) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    output = by_hand(layer, x) if hand else layer(x)
    named = {"x": x, **dict(layer.named_parameters())}
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view(output.shape)
    found = torch.autograd.grad(output, list(named.values()), weights)
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


def judge(layer: GatedConv1d, x: Tensor) -> None:
    eager, actual = all_gradients(layer, x, hand=True), all_gradients(layer, x)
    truth = all_gradients(layer.double(), x.double(), hand=True)
    for name in truth:
        assert_matches(actual[name], truth[name], eager[name], name)


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("kernel_size", [1, 2, 4, 5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_output_and_every_gradient(variant: str, kernel_size: int, bias: bool) -> None:
    layer = GatedConv1d(6, 10, kernel_size, variant=variant, bias=bias)
    judge(layer, 3.0 * torch.randn(3, 6, 9))


@rows
def test_every_row(row: Variant) -> None:
    learnable: Learnable = "unit" if any(p.learnable for p in row.parameters) else None
    layer = GatedConv1d(6, 10, 3, variant=row, learnable=learnable)
    with torch.no_grad():
        for parameter in row.parameters:
            if parameter.learnable:
                raw = layer.get_parameter(parameter.name)
                raw.add_(0.1 * torch.randn_like(raw))
    judge(layer, 6.0 * torch.randn(3, 6, 9))


@given(st.integers(1, 7), st.integers(1, 12), st.integers(0, 11))
def test_an_output_sees_its_kernel_and_nothing_of_the_future(
    kernel_size: int, length: int, changed: int
) -> None:
    changed %= length
    layer = GatedConv1d(2, 3, kernel_size).double()
    x = torch.randn(1, 2, length, dtype=torch.float64, requires_grad=True)
    touched = [
        bool(torch.autograd.grad(layer(x)[..., t].sum(), x)[0][..., changed].any())
        for t in range(length)
    ]
    assert touched == [0 <= t - changed < kernel_size for t in range(length)]


def test_the_length_may_be_less_than_the_kernel() -> None:
    layer = GatedConv1d(2, 3, 6)
    x = torch.randn(1, 2, 10)
    assert_matches(layer(x[..., :2]), layer(x)[..., :2].double(), layer(x)[..., :2])


def test_kernels_are_drawn_as_convolutions_of_their_own() -> None:
    torch.manual_seed(5)
    layer = GatedConv1d(4, 6, 3)
    torch.manual_seed(5)
    alone = [nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3)]
    for name, convolution in zip(("gate_conv", "up_conv"), alone, strict=True):
        assert same_bits(layer.get_parameter(f"{name}.weight"), convolution.weight)
    torch.manual_seed(5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    assert all(same_bits(before[name], p) for name, p in layer.named_parameters())


def test_meta_device_and_dtype() -> None:
    stack = GatedConvStack(4, [[(4, 2)], [(2, 1), (6, 3)]], device="meta", dtype=torch.bfloat16)
    assert stack(torch.empty(2, 4, 9, device="meta", dtype=torch.bfloat16)).shape == (2, 6, 9)
    stack.to_empty(device="cpu")
    for parameter in stack.parameters():
        nn.init.constant_(parameter, torch.nan)
    stack.reset_parameters()
    assert stack(torch.ones(2, 4, 9, dtype=torch.bfloat16)).isfinite().all()


def test_the_repr_shows_what_it_is() -> None:
    words = repr(GatedConv1d(4, 6, 3, variant="swiglu", beta=1.5))
    assert "4 -> 6, kernel_size=3, variant='swiglu', beta=1.5" in words


# the stack


def test_a_block_is_its_layers_plus_its_input() -> None:
    stack = GatedConvStack(4, [[(4, 2)], [(2, 1), (6, 3)]])
    x = torch.randn(2, 4, 9)
    first = stack.bodies[0](x) + x
    assert isinstance(stack.shortcuts[0], nn.Identity)
    second = stack.bodies[1](first) + stack.shortcuts[1](first)
    shortcut = stack.shortcuts[1]
    assert isinstance(shortcut, nn.Conv1d)
    assert shortcut.kernel_size == (1,)
    assert same_bits(stack(x), second)
    assert stack.out_channels == 6


def test_the_settings_reach_every_layer() -> None:
    blocks = [[(4, 2)], [(2, 1), (6, 3)]]
    stack = GatedConvStack(4, blocks, variant="swiglu", bias=False, learnable="unit", beta=1.5)
    layers = [module for module in stack.modules() if isinstance(module, GatedConv1d)]
    assert [(layer.out_channels, layer.kernel_size) for layer in layers] == [(4, 2), (2, 1), (6, 3)]
    for layer in layers:
        beta = layer.activation_parameters()["beta"]
        assert torch.equal(torch.as_tensor(beta), torch.full((layer.out_channels,), 1.5))
    assert not any(name.endswith("bias") for name, _ in stack.named_parameters())


def test_the_receptive_field_is_what_an_output_depends_on() -> None:
    stack = GatedConvStack(2, [[(2, 3)], [(3, 1), (4, 4)], [(4, 2)]]).double()
    x = torch.randn(1, 2, 20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(stack(x)[..., -1].sum(), x)
    seen = gradient.abs().sum((0, 1)).nonzero().flatten()
    assert stack.receptive_field == len(seen) == 20 - int(seen.min()) == 7


# the published networks: Dauphin et al. 2016, table 1, layer by layer

TABLE = {
    "GCNN-13": (128, [(1268, 4)] * 13),
    "GCNN-14": (
        280,
        [(850, 6)] * 3
        + [(850, 1)]
        + [(850, 5)] * 4
        + [(850, 1)]
        + [(850, 4)] * 3
        + [(1024, 4), (2048, 4)],
    ),
    "GCNN-14B": (
        128,
        [(512, 5)]
        + [(128, 1), (128, 5), (512, 1)] * 3
        + [(512, 1), (512, 5), (1024, 1)] * 3
        + [(1024, 1), (1024, 5), (2048, 1)] * 6
        + [(1024, 1), (1024, 5), (4096, 1)],
    ),
}


def test_the_networks() -> None:
    assert list(NETWORKS) == list(TABLE)
    for name, (embedding, layers) in TABLE.items():
        network = NETWORKS[name]
        assert network.d_embedding == embedding
        assert [layer for block in network.blocks for layer in block] == layers
        assert "1612.08083" in network.source


@pytest.mark.parametrize(("name", "blocks"), [("GCNN-13", 13), ("GCNN-14", 14), ("GCNN-14B", 14)])
def test_a_network_can_be_built_and_has_its_number_of_blocks(name: str, blocks: int) -> None:
    network = NETWORKS[name]
    assert len(network.blocks) == blocks
    stack = GatedConvStack(network.d_embedding, network.blocks, device="meta")
    x = torch.empty(2, network.d_embedding, 40, device="meta")
    assert stack(x).shape == (2, network.blocks[-1][-1][0], 40)
    assert stack.receptive_field == 1 + sum(k - 1 for block in network.blocks for _, k in block)


# errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GatedConv1d(0), SettingError, "in_channels is 0"),
        (lambda: GatedConv1d(4, 0), SettingError, "out_channels is 0"),
        (lambda: GatedConv1d(4, kernel_size=0), SettingError, "kernel_size is 0"),
        (lambda: GatedConv1d(4, gamma=1.0), ParameterError, "no parameter gamma"),
        (lambda: GatedConv1d(4, variant="glue"), GatedFFNError, "glu"),
        (lambda: GatedConv1d(4)(torch.zeros(4, 9)), ShapeError, r"\(4, 9\)"),
        (lambda: GatedConv1d(4)(torch.zeros(2, 9, 4)), ShapeError, r"\(batch, 4, length\)"),
        (lambda: GatedConvStack(4, []), SettingError, "blocks is empty"),
        (lambda: GatedConvStack(4, [[(4, 2)], []]), SettingError, "needs a layer"),
    ],
)
def test_errors(build: Any, error: type[GatedFFNError], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
