"""Widths at equal parameters, and what a feed-forward layer costs."""

from dataclasses import dataclass
from typing import Literal, overload

from gatedffn.errors import SettingError
from gatedffn.variants import Variant, get_variant

DEFAULT_MULTIPLE = 8
UNGATED_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Width:
    """A hidden width and how it was reached.

    `parameter_ratio` is the number of weights relative to the layer without a gate at 4 d_model,
    before `multiplier`: 1 is equal.
    """

    d_hidden: int
    steps: tuple[str, ...]
    parameter_ratio: float

    def __str__(self) -> str:
        return " -> ".join(self.steps)


@overload
def hidden_size(
    d_model: int,
    *,
    variant: str | Variant = ...,
    multiple_of: int = ...,
    multiplier: float = ...,
    explain: Literal[False] = ...,
) -> int: ...
@overload
def hidden_size(
    d_model: int,
    *,
    variant: str | Variant = ...,
    multiple_of: int = ...,
    multiplier: float = ...,
    explain: Literal[True],
) -> Width: ...
def hidden_size(
    d_model: int,
    *,
    variant: str | Variant = "swiglu",
    multiple_of: int = DEFAULT_MULTIPLE,
    multiplier: float = 1.0,
    explain: bool = False,
) -> int | Width:
    """The width d_hidden at which a variant has the parameters of an ungated layer of 4 d_model.

    Not gated: `4 d_model`. Gated: two thirds of it, since there are three matrices in place of
    two. Then times `multiplier`, each step rounded down, and last rounded up to a multiple: the
    rule of LLaMA's code, which with 256, or with its published multipliers, gives its widths.

    Args:
        d_model: width of the model, in features.
        variant: any name of the table; only whether it is gated matters.
        multiple_of: the width is rounded up to a multiple of this; 1 for no rounding.
        multiplier: LLaMA's ffn_dim_multiplier.
        explain: return a `Width` with each step and the parameter ratio, in place of the number.

    Raises:
        SettingError: a size that is not a positive whole number, or a multiplier not above 0.

    Source: Shazeer 2020 (arXiv 2002.05202), section 3.1; Touvron et al. 2023 (arXiv 2302.13971),
    section 2.2 and its code.

    >>> hidden_size(4096, multiple_of=256)
    11008
    >>> print(hidden_size(4096, multiple_of=256, explain=True))
    4 * 4096 = 16384 -> 2/3 of it: 10922 -> up to a multiple of 256: 11008 -> weights x 1.0078
    """
    row = get_variant(variant)
    check_size("d_model", d_model)
    check_size("multiple_of", multiple_of)
    if not multiplier > 0 or multiplier == float("inf"):
        raise SettingError(f"multiplier is {multiplier}: it must be a number above 0")
    width = UNGATED_FACTOR * d_model
    steps = [f"{UNGATED_FACTOR} * {d_model} = {width}"]
    if row.gated:
        width = 2 * width // 3
        steps.append(f"2/3 of it: {width}")
    if multiplier != 1.0:
        width = max(int(multiplier * width), 1)
        steps.append(f"times {multiplier:g}: {width}")
    if multiple_of > 1:
        width = multiple_of * -(-width // multiple_of)
        steps.append(f"up to a multiple of {multiple_of}: {width}")
    if not explain:
        return width
    ratio = weight_count(d_model, width, row) / weight_count(
        d_model, UNGATED_FACTOR * d_model, "relu"
    )
    return Width(width, (*steps, f"weights x {ratio:.4f}"), ratio)


def weight_count(
    d_model: int,
    d_hidden: int,
    variant: str | Variant = "swiglu",
    *,
    d_out: int | None = None,
    bias: bool = False,
) -> int:
    """The number of weights and biases of a layer, learnable activation parameters left out.

    >>> weight_count(768, 2048, "geglu") == weight_count(768, 3072, "relu")
    True
    """
    inputs = len(get_variant(variant).projections)
    d_out = d_model if d_out is None else d_out
    biases = (inputs * d_hidden + d_out) if bias else 0
    return inputs * d_model * d_hidden + d_hidden * d_out + biases


def flops_per_token(
    d_model: int, d_hidden: int, variant: str | Variant = "swiglu", *, d_out: int | None = None
) -> int:
    """Multiplications and additions of the matrix products of one forward pass, for one token.

    A training step does three times as many. The element-wise part is left out: it is less than
    a thousandth at usual widths.

    >>> flops_per_token(4096, 11008)
    270532608
    """
    return 2 * weight_count(d_model, d_hidden, variant, d_out=d_out)


def experts_touched(num_experts: int, slots: int, tokens: int) -> float:
    """How many experts tokens go through on average: `E (1 - (1 - K/E)^n)`.

    If each of the n tokens names K of the E experts at random: all alike, none twice, and
    whatever the others name. Routers come near to it where their loads are balanced.

    >>> round(experts_touched(128, 8, 8), 1)
    51.6
    """
    return float(num_experts * (1.0 - (1.0 - slots / num_experts) ** tokens))


def check_size(name: str, value: int) -> None:
    """Raises `SettingError` unless the value is a positive whole number."""
    if type(value) is not int or value < 1:
        raise SettingError(f"{name} is {value!r}: it must be a whole number of at least 1")
