"""What is measured: which sizes, dtypes and kinds of work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from gatedffn.errors import SettingError
from gatedffn.sizing import hidden_size
from gatedffn.variants import VARIANTS, get_variant

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
LARGE = 2**31
"""Bytes of hidden values from which on contestants do not fit beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A layer, how many tokens go through it, and whether it is trained.

    With `part="gating"` it is the gating alone, of (tokens, d_hidden) values; `d_model` is then 0
    and training means its backward alone. With `graph` the step is launched as a CUDA graph; with
    `tile` this library works on so many tokens at a time and keeps the input alone.
    """

    tokens: int
    d_model: int
    d_hidden: int
    dtype: Dtype = "float32"
    training: bool = False
    variant: str = "swiglu"
    device: Device = "cpu"
    part: Literal["layer", "gating"] = "layer"
    graph: bool = False
    tile: int | None = None

    @property
    def name(self) -> str:
        """What `--workload` finds it by, such as `training-512x768x2048-float32`."""
        variant = "" if self.variant == "swiglu" else f"-{self.variant}"
        if self.part == "gating":
            kind = "gating-backward-" if self.training else "gating-"
            return f"{kind}{self.tokens}x{self.d_hidden}-{self.dtype}{variant}"
        kind = "training-" if self.training else ""
        ends = f"{variant}{'-graph' if self.graph else ''}{f'-tile{self.tile}' * bool(self.tile)}"
        return f"{kind}{self.tokens}x{self.d_model}x{self.d_hidden}-{self.dtype}{ends}"

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
    def hidden_bytes(self) -> int:
        """Of one tensor of hidden values."""
        return self.tokens * self.d_hidden * self.torch_dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """What has to be moved at least: of a layer its weights, of gating each of its tensors.

        Gating reads its branches and writes one tensor; its backward also reads a gradient, and
        writes one for each branch.
        """
        if self.part == "layer":
            return self.weight_bytes
        branches = len(VARIANTS[self.variant].projections)
        return self.hidden_bytes * (2 * branches + 1 if self.training else branches + 1)

    @property
    def large(self) -> bool:
        """Whether only one contestant at a time fits into a GPU's memory."""
        return self.hidden_bytes >= LARGE

    @property
    def flops(self) -> int:
        """Of the matrix products; each of forward's has two more in backward."""
        return (3 if self.training else 1) * 2 * self.tokens * self.weights


_SIZES = ((1, 4096, 11008), (16, 2048, 5632), (512, 768, 2048), (2048, 1024, 2816))
_MEASURED: tuple[Dtype, ...] = ("float32", "bfloat16")

TABLE: tuple[Workload, ...] = (
    *(
        Workload(tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype)
        for dtype in _MEASURED
        for tokens, d_model, d_hidden in _SIZES
    ),
    *(
        Workload(tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype, training=True)
        for dtype in _MEASURED
        for tokens, d_model, d_hidden in _SIZES[2:]
    ),
)
"""Decoding, a small batch, and two lengths of prefill, in both dtypes; two training steps."""

QUICK: tuple[Workload, ...] = tuple(
    workload
    for workload in TABLE
    if workload.name
    in (
        "16x2048x5632-bfloat16",
        "512x768x2048-float32",
        "training-512x768x2048-float32",
    )
)
"""Few tokens, many tokens and a training step: what `--quick` measures."""

_WIDE, _NARROW = (4096, 14336), (768, 2048)


def _on_gpu(
    tokens: int, sizes: tuple[int, int], dtype: Dtype = "bfloat16", **more: Any
) -> Workload:
    d_model, d_hidden = sizes
    return Workload(
        tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype, device="cuda", **more
    )


GPU_TABLE: tuple[Workload, ...] = (
    _on_gpu(16384, (0, 14336), part="gating"),
    _on_gpu(16384, (0, 14336), part="gating", training=True),
    _on_gpu(8192, _WIDE),
    _on_gpu(8192, _WIDE, training=True),
    _on_gpu(1, _WIDE, graph=True),
    _on_gpu(16, _WIDE, graph=True),
    _on_gpu(262144, _WIDE, training=True, tile=8192),
    _on_gpu(1, _WIDE),
    _on_gpu(16, _WIDE),
    _on_gpu(4096, _NARROW, training=True),
    _on_gpu(4096, _NARROW),
    _on_gpu(512, (2048, 5632)),
    _on_gpu(4096, _NARROW, "float32"),
)
"""The most telling first, since GPUs are lent by the minute; few tokens with and without a graph,
which takes the cost of launching away."""

GPU_QUICK: tuple[Workload, ...] = GPU_TABLE[:5]
"""Gating, many tokens, a training step and one token: what `--quick` measures on a GPU."""


def get_device(name: str) -> Device:
    """The device of that name.

    Raises:
        SettingError: there is no such device.

    >>> get_device("cpu")
    'cpu'
    """
    known = next((device for device in DEVICES if device == name), None)
    if known is None:
        raise SettingError(f"device is {name!r}: it must be one of {', '.join(DEVICES)}")
    return known


def choose(
    names: Sequence[str], variant: str, *, quick: bool, device: Device = "cpu"
) -> tuple[Workload, ...]:
    """The workloads whose names hold one of these texts, all of them when there are none.

    Raises:
        SettingError: a text that no name holds.
        UnknownVariant: no such variant.

    >>> [workload.name for workload in choose(["training-512"], "swiglu", quick=False)]
    ['training-512x768x2048-float32', 'training-512x768x2048-bfloat16']
    """
    table, few = (TABLE, QUICK) if device == "cpu" else (GPU_TABLE, GPU_QUICK)
    workloads = few if quick and not names else table
    for name in names:
        if not any(name in workload.name for workload in workloads):
            known = ", ".join(workload.name for workload in workloads)
            raise SettingError(f"no workload has {name!r} in its name; the workloads are {known}")
    chosen = [
        workload
        for workload in workloads
        if not names or any(name in workload.name for name in names)
    ]
    return tuple(replace(workload, variant=get_variant(variant).name) for workload in chosen)


def own_workload(
    *,
    tokens: int,
    d_model: int,
    d_hidden: int | None,
    dtype: str,
    training: bool,
    variant: str,
    device: Device = "cpu",
) -> Workload:
    """A workload of the user's own sizes; without `d_hidden` the width at equal parameters.

    Raises:
        SettingError: a size below 1, or an unknown dtype.
        UnknownVariant: no such variant.

    >>> own_workload(
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
    return Workload(
        tokens=tokens,
        d_model=d_model,
        d_hidden=hidden_size(d_model, variant=name) if d_hidden is None else d_hidden,
        dtype=known,
        training=training,
        variant=name,
        device=device,
    )
