"""Stacked experts as a layer; which token goes through which is a router's to say."""

import math

import torch
from torch import Tensor, nn

from gatedffn import functional
from gatedffn.functional import Save, Weigh
from gatedffn.layers import Device, Learnable, VariantModule
from gatedffn.ops.experts import check_options
from gatedffn.sizing import check_size
from gatedffn.variants import Variant, get_variant


class Experts(VariantModule):
    """A stack of feed-forward layers of which each token goes through some.

    `y[s] = sum_k weights[s, k] FFN_index[s, k](x[s])`, each expert as `FeedForward` is.

    Parameters, as transformers stores them: `gate_up_proj` (num_experts, 2 * d_hidden, d_model),
    the gates first, or `up_proj` (num_experts, d_hidden, d_model) without a gate; `down_proj`
    (num_experts, d_model, d_hidden); with biases `gate_up_proj_bias` or `up_proj_bias` and
    `down_proj_bias`.

    Args:
        d_model: width of the input and the output, in features.
        d_hidden: width of each expert after gating.
        num_experts: how many there are.
        variant: a name of the table, or an alias.
        bias: whether every projection has a bias.
        device, dtype: as in `torch.nn.Linear`.
        learnable: as in `FeedForward`; what is learned is the same for all experts.
        weigh, save, backend: as in `functional.experts`.
        **parameters: values of the variant's parameters (the starting values when learned).

    Shapes: x (..., d_model), index and weights (..., slots), to (..., d_model).

    Raises:
        UnknownVariant, ParameterError, SettingError: a wrong argument.
        ShapeError: tensors that do not fit, or an expert below 0.

    Source: Shazeer et al. 2017 (arXiv 1701.06538).

    >>> layer = Experts(64, 48, 4)
    >>> index, weights = torch.tensor([[0, 3], [1, 0]]), torch.full((2, 2), 0.5)
    >>> layer(torch.zeros(2, 64), index, weights).shape
    torch.Size([2, 64])
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        variant: str | Variant = "swiglu",
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        learnable: Learnable = None,
        weigh: Weigh = "output",
        save: Save = "gate_up",
        backend: str = "auto",
        **parameters: float,
    ) -> None:
        super().__init__()
        row = get_variant(variant)
        check_options("", weigh, save, backend)
        self.weigh: Weigh = weigh
        self.save: Save = save
        self.backend = backend
        sizes = {"d_model": d_model, "d_hidden": d_hidden, "num_experts": num_experts}
        for name, size in sizes.items():
            check_size(name, size)
        self._set_variant(row, parameters, learnable, d_hidden, device, dtype)
        self._gated = row.gated
        self._first = "gate_up_proj" if row.gated else "up_proj"
        rows = {self._first: d_hidden * (1 + row.gated), "down_proj": d_model}
        columns = {self._first: d_model, "down_proj": d_hidden}
        for name, size in rows.items():
            weight = torch.empty(num_experts, size, columns[name], device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
            of_bias = nn.Parameter(weight.new_empty(num_experts, size)) if bias else None
            self.register_parameter(f"{name}_bias", of_bias)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """How many there are, as the weights have it now."""
        return len(self.down_proj)

    @property
    def d_model(self) -> int:
        """The width of the input and the output, as the weights have it now."""
        return self.down_proj.shape[1]

    @property
    def d_hidden(self) -> int:
        """The width of each expert after gating, as the weights have it now."""
        return self.down_proj.shape[2]

    def reset_parameters(self) -> None:
        """Draws every matrix anew, as `torch.nn.Linear` draws each of them."""
        for name in (self._first, "down_proj"):
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            bound = 1.0 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
        self._reset_learned()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        first, bias = getattr(self, self._first), getattr(self, f"{self._first}_bias")
        gated = self._gated
        return functional.experts(
            x,
            first if gated else None,
            None if gated else first,
            self.down_proj,
            index,
            weights,
            bias if gated else None,
            None if gated else bias,
            self.down_proj_bias,
            variant=self.variant,
            order="gate_up" if gated else None,
            weigh=self.weigh,
            save=self.save,
            backend=self.backend,
            **self.activation_parameters(),
        )

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts} x ({self.d_model} -> {self.d_hidden} -> {self.d_model})"
        return f"{sizes}, {self._describe()}"
