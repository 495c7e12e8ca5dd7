"""Dauphin's gated convolution, and the residual stack built of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn import functional
from gatedffn.errors import SettingError, ShapeError
from gatedffn.layers import Device, Learnable, VariantModule, is_followed
from gatedffn.sizing import check_size
from gatedffn.variants import VARIANTS, Variant, get_variant

Block = tuple[tuple[int, int], ...]
"""One residual block: (output channels, kernel width) of each of its layers."""


@dataclass(frozen=True, slots=True)
class Network:
    """A published gated convolutional network: its embedding width and its residual blocks."""

    d_embedding: int
    blocks: tuple[Block, ...]
    source: str


_PAPER = "Dauphin et al. 2016 (arXiv 1612.08083), table 1"


def _single(*layers: tuple[int, int]) -> tuple[Block, ...]:
    return tuple((layer,) for layer in layers)


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "GCNN-13": Network(128, _single(*[(1268, 4)] * 13), _PAPER),
        "GCNN-14": Network(
            280,
            _single(
                *[(850, 6)] * 3,
                (850, 1),
                *[(850, 5)] * 4,
                (850, 1),
                *[(850, 4)] * 3,
                (1024, 4),
                (2048, 4),
            ),
            _PAPER + "; fairseq, fconv_lm_dauphin_wikitext103",
        ),
        "GCNN-14B": Network(
            128,
            (
                ((512, 5),),
                *[((128, 1), (128, 5), (512, 1))] * 3,
                *[((512, 1), (512, 5), (1024, 1))] * 3,
                *[((1024, 1), (1024, 5), (2048, 1))] * 6,
                ((1024, 1), (1024, 5), (4096, 1)),
            ),
            _PAPER + "; fairseq, fconv_lm_dauphin_gbw",
        ),
    }
)
"""The published networks by name. GCNN-13's list is the paper's alone; no code was seen for it."""


class GatedConv1d(VariantModule):
    """A causal convolution with a gate: `phi(X * W_gate + b_gate) (x) psi(X * W_up + b_up)`.

    Position t sees positions t - kernel_size + 1 to t. Children: `gate_conv` (gated only) and
    `up_conv`, each a `torch.nn.Conv1d`. A variant without a gate gives `phi(X * W_up + b_up)`.

    Args:
        in_channels, out_channels: widths; out_channels None is in_channels.
        kernel_size: how many positions are seen.
        variant: a name of the table: "glu", "gtu", "bilinear", ...
        bias: whether the convolutions have biases.
        device, dtype: as in `torch.nn.Conv1d`.
        learnable, **parameters: as in `FeedForward`.

    Shapes: (batch, in_channels, length) to (batch, out_channels, length).

    Raises:
        UnknownVariant, ParameterError, SettingError: a wrong argument.
        ShapeError: an input that is not (batch, in_channels, length).

    Source: Dauphin et al. 2016 (arXiv 1612.08083), equation 1 and section 3.

    >>> GatedConv1d(8, 16, kernel_size=3)(torch.zeros(2, 8, 10)).shape
    torch.Size([2, 16, 10])
    """

    gate_conv: nn.Module
    up_conv: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int = 4,
        *,
        variant: str | Variant = "glu",
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        learnable: Learnable = None,
        **parameters: float,
    ) -> None:
        super().__init__()
        row = get_variant(variant)
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.kernel_size = kernel_size
        check_size("in_channels", in_channels)
        check_size("out_channels", self.out_channels)
        check_size("kernel_size", kernel_size)
        self._set_variant(row, parameters, learnable, self.out_channels, device, dtype)
        for name in self._convolutions():
            convolution = nn.Conv1d(
                in_channels, self.out_channels, kernel_size, bias=bias, device=device, dtype=dtype
            )
            self.add_module(name, convolution)
        self._reset_learned()

    def _convolutions(self) -> tuple[str, ...]:
        return tuple(name.replace("_proj", "_conv") for name in VARIANTS[self.variant].projections)

    def reset_parameters(self) -> None:
        """Draws every kernel anew, as `torch.nn.Conv1d` does, the gate's first."""
        for name in self._convolutions():
            getattr(self, name).reset_parameters()
        self._reset_learned()

    def forward(self, x: Tensor) -> Tensor:
        if not is_followed(x) and (
            x.dim() != 3 or x.shape[1] != self.in_channels or x.shape[2] == 0
        ):
            raise ShapeError(
                f"x is {tuple(x.shape)}: it must be (batch, {self.in_channels}, length), the "
                "length at least 1"
            )
        parameters = self.activation_parameters()
        for name, value in parameters.items():
            if not isinstance(value, float):
                parameters[name] = value.unsqueeze(-1)
        padded = F.pad(x, (self.kernel_size - 1, 0))
        up = self.up_conv(padded)
        if VARIANTS[self.variant].gated:
            return functional.gating(self.gate_conv(padded), up, self.variant, **parameters)
        return functional.activation(up, self.variant, **parameters)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels} -> {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, {self._describe()}"


class GatedConvStack(nn.Module):
    """Residual blocks of gated convolutions: `x + body(x)` each.

    Where a block changes the number of channels, `x` passes through a 1-wide convolution first.

    Args:
        in_channels: width of the input.
        blocks: for each block, (output channels, kernel width) of each of its layers.
        variant: a name of the table.
        bias: whether the convolutions have biases.
        device, dtype: as in `torch.nn.Conv1d`.
        learnable, **parameters: as in `FeedForward`.

    Shapes: (batch, in_channels, length) to (batch, channels of the last block, length).

    Raises:
        UnknownVariant, ParameterError, SettingError: a wrong argument.

    Source: Dauphin et al. 2016 (arXiv 1612.08083), section 2 and table 1; its networks are in
    `NETWORKS`.

    >>> stack = GatedConvStack(8, [[(8, 3)], [(4, 1), (16, 3)]])
    >>> stack(torch.zeros(2, 8, 10)).shape
    torch.Size([2, 16, 10])
    """

    def __init__(
        self,
        in_channels: int,
        blocks: Sequence[Sequence[tuple[int, int]]],
        *,
        variant: str | Variant = "glu",
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        learnable: Learnable = None,
        **parameters: float,
    ) -> None:
        super().__init__()
        if not blocks or not all(blocks):
            raise SettingError("blocks is empty, or one of them is: each needs a layer")
        self.in_channels = in_channels
        self.bodies = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        width = in_channels
        for block in blocks:
            start = width
            body = nn.Sequential()
            for channels, kernel_size in block:
                layer = GatedConv1d(
                    width,
                    channels,
                    kernel_size,
                    variant=variant,
                    bias=bias,
                    device=device,
                    dtype=dtype,
                    learnable=learnable,
                    **parameters,
                )
                body.append(layer)
                width = channels
            same = width == start
            self.bodies.append(body)
            self.shortcuts.append(
                nn.Identity()
                if same
                else nn.Conv1d(start, width, 1, bias=bias, device=device, dtype=dtype)
            )
        self.out_channels = width

    @property
    def receptive_field(self) -> int:
        """How many positions an output depends on, itself included."""
        layers = (layer for layer in self.modules() if isinstance(layer, GatedConv1d))
        return 1 + sum(layer.kernel_size - 1 for layer in layers)

    def reset_parameters(self) -> None:
        """Draws every kernel anew."""
        for module in self.modules():
            if isinstance(module, GatedConv1d):
                module.reset_parameters()
        for shortcut in self.shortcuts:
            if isinstance(shortcut, nn.Conv1d):
                shortcut.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        for body, shortcut in zip(self.bodies, self.shortcuts, strict=True):
            x = shortcut(x) + body(x)
        return x
