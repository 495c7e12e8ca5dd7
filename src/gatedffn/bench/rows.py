"""The rows of the table: which sizes, dtypes and kinds of work are measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gatedffn.errors import SettingError
from gatedffn.sizing import hidden_size
from gatedffn.variants import VARIANTS, get_variant

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: a layer, how many tokens go through it, and whether it is trained."""

    tokens: int
    d_model: int
    d_hidden: int
    dtype: Dtype = "float32"
    training: bool = False
    variant: str = "swiglu"

    @property
    def name(self) -> str:
        """What `--row` finds it by, such as `training-512x768x2048-float32`."""
        kind = "training-" if self.training else ""
        variant = "" if self.variant == "swiglu" else f"-{self.variant}"
        return f"{kind}{self.tokens}x{self.d_model}x{self.d_hidden}-{self.dtype}{variant}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def weights(self) -> int:
        """How many numbers the matrices have."""
        return (len(VARIANTS[self.variant].projections) + 1) * self.d_model * self.d_hidden

    @property
    def weight_bytes(self) -> int:
        """What has to be read at least once in a forward pass."""
        return self.weights * self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the matrix products; each of forward's has two more in backward."""
        return (3 if self.training else 1) * 2 * self.tokens * self.weights


_SIZES = ((1, 4096, 11008), (16, 2048, 5632), (512, 768, 2048), (2048, 1024, 2816))
_MEASURED: tuple[Dtype, ...] = ("float32", "bfloat16")

TABLE: tuple[Row, ...] = (
    *(
        Row(tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype)
        for dtype in _MEASURED
        for tokens, d_model, d_hidden in _SIZES
    ),
    *(
        Row(tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype, training=True)
        for dtype in _MEASURED
        for tokens, d_model, d_hidden in _SIZES[2:]
    ),
)
"""Decoding, a small batch, and two lengths of prefill, in both dtypes; two training steps."""

QUICK: tuple[Row, ...] = tuple(
    row
    for row in TABLE
    if row.name
    in (
        "16x2048x5632-bfloat16",
        "512x768x2048-float32",
        "training-512x768x2048-float32",
    )
)
"""Few tokens, many tokens and a training step: what `--quick` measures."""


def choose(names: Sequence[str], variant: str, *, quick: bool) -> tuple[Row, ...]:
    """The rows whose names hold one of these texts, all of them when there are none.

    Raises:
        SettingError: a text that no name holds.
        UnknownVariant: no such variant.

    >>> [row.name for row in choose(["training-512"], "swiglu", quick=False)]
    ['training-512x768x2048-float32', 'training-512x768x2048-bfloat16']
    """
    rows = QUICK if quick and not names else TABLE
    for name in names:
        if not any(name in row.name for row in rows):
            known = ", ".join(row.name for row in rows)
            raise SettingError(f"no row has {name!r} in its name; the rows are {known}")
    chosen = [row for row in rows if not names or any(name in row.name for name in names)]
    return tuple(replace(row, variant=get_variant(variant).name) for row in chosen)


def own_row(
    *,
    tokens: int,
    d_model: int,
    d_hidden: int | None,
    dtype: str,
    training: bool,
    variant: str,
) -> Row:
    """A row of the user's own sizes; without `d_hidden` the width at equal parameters.

    Raises:
        SettingError: a size below 1, or an unknown dtype.
        UnknownVariant: no such variant.

    >>> own_row(
    ...     tokens=8, d_model=64, d_hidden=None, dtype="float32", training=False, variant="relu"
    ... ).name
    '8x64x256-float32-relu'
    """
    for name, size in (("tokens", tokens), ("d_model", d_model), ("d_hidden", d_hidden)):
        if size is not None and size < 1:
            raise SettingError(f"{name} is {size}: it must be at least 1")
    known = next((known for known in DTYPES if known == dtype), None)
    if known is None:
        raise SettingError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    name = get_variant(variant).name
    return Row(
        tokens=tokens,
        d_model=d_model,
        d_hidden=hidden_size(d_model, variant=name) if d_hidden is None else d_hidden,
        dtype=known,
        training=training,
        variant=name,
    )
