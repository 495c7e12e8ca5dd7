"""What is measured: which sizes, dtypes and kinds of work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from gatedffn.activations import OwnVariant, variant_named
from gatedffn.errors import SettingError
from gatedffn.sizing import hidden_size
from gatedffn.variants import VARIANTS, Variant, get_variant

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
SEED = 20_020_520
HEAD, VOCABULARY = 64, 32_000
"""Of a decoder: the width of an attention head, and how many words it knows."""
LARGE = 2**31
"""Bytes of hidden values from which on contestants do not fit beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A layer, how many tokens go through it, and whether it is trained.

    With `part="experts"` it is a stack of so many `experts`, of which each token goes through
    `slots`. With "decoder" it is a language model of so many `layers`, trained on one text of
    `tokens`, or asked for one token more after `past` others. With "gating" it is the gating
    alone, of (tokens, d_hidden) values, and with "packed" that of one tensor which holds both
    branches; `d_model` is then 0. `beta` is Swish's there, and `backward` leaves the forward pass
    of a training step out. With `graph` the step is launched as a CUDA graph; with `tile` this
    library works on so many tokens at a time and keeps the input alone.
    """

    tokens: int
    d_model: int
    d_hidden: int
    dtype: Dtype = "float32"
    training: bool = False
    variant: str = "swiglu"
    device: Device = "cpu"
    part: Literal["layer", "experts", "decoder", "gating", "packed"] = "layer"
    experts: int = 1
    slots: int = 1
    layers: int = 1
    past: int = 0
    backward: bool = False
    beta: float | None = None
    graph: bool = False
    tile: int | None = None
    file: str | None = None
    """Where a user's variant is read from, which a process must know beside its name."""

    def __post_init__(self) -> None:
        if self.file is not None:
            variant_named(self.file)
        get_variant(self.variant)

    @property
    def name(self) -> str:
        """What `--workload` finds it by, such as `training-512x768x2048-float32`."""
        words: list[str] = [] if self.part == "layer" else [self.part]
        if self.training:
            words.append("backward" if self.backward else "training")
        width = f"{self.d_model}x{self.d_hidden}" if self.d_model else f"{self.d_hidden}"
        words += [f"{self.tokens}x{width}", self.dtype]
        if self.part == "experts":
            words.insert(-1, f"{self.slots}of{self.experts}")
        if self.part == "decoder":
            words.insert(-1, f"{self.layers}layers")
        if self.past:
            words.insert(-1, f"past{self.past}")
        if self.variant != "swiglu":
            words.append(self.variant)
        if self.beta is not None:
            words.append(f"beta{self.beta:g}")
        if self.graph:
            words.append("graph")
        if self.tile:
            words.append(f"tile{self.tile}")
        return "-".join(words)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def parameters(self) -> dict[str, float]:
        """Of the variant's formula."""
        given = {} if self.beta is None else {"beta": self.beta}
        return {**VARIANTS[self.variant].defaults, **given}

    @property
    def weights(self) -> int:
        """How many numbers the matrices have, of experts those of one."""
        weights = (len(VARIANTS[self.variant].projections) + 1) * self.d_model * self.d_hidden
        if self.part != "decoder":
            return weights
        # Queries and outputs, keys and values; the embeddings are looked up, not multiplied.
        attention = 2 * self.d_model * HEAD * (self.heads + self.key_heads)
        return self.layers * (weights + attention) + VOCABULARY * self.d_model

    @property
    def heads(self) -> int:
        """Of a decoder's attention."""
        return self.d_model // HEAD

    @property
    def key_heads(self) -> int:
        """Of its keys and values: eight heads share one."""
        return max(1, self.heads // 8)

    @property
    def weight_bytes(self) -> int:
        """What a forward pass reads at least once: of experts those that tokens name."""
        return len({*self.index.flatten().tolist()}) * self.weights * self.torch_dtype.itemsize

    @property
    def index(self) -> torch.Tensor:
        """The experts of each token, (tokens, slots): by chance, the same for every process."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.rand(self.tokens, self.experts, generator=generator).topk(self.slots).indices

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
        if self.d_model:
            return self.weight_bytes
        branches = len(VARIANTS[self.variant].projections)
        forward, backward = branches + 1, 2 * branches + 1
        tensors = forward * (not self.backward) + backward * self.training
        return self.hidden_bytes * tensors

    @property
    def large(self) -> bool:
        """Whether only one contestant at a time fits into a GPU's memory."""
        return self.hidden_bytes * self.layers >= LARGE or self.part == "decoder"

    @property
    def flops(self) -> int:
        """Of the matrix products; each of forward's has two more in backward."""
        return (3 if self.training else 1) * 2 * self.tokens * self.slots * self.weights


_SIZES = ((1, 4096, 11008), (16, 2048, 5632), (512, 768, 2048), (2048, 1024, 2816))
_MEASURED: tuple[Dtype, ...] = ("float32", "bfloat16")

MAIN: tuple[Workload, ...] = (
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
    for workload in MAIN
    if workload.name
    in (
        "16x2048x5632-bfloat16",
        "512x768x2048-float32",
        "training-512x768x2048-float32",
    )
)
"""Few tokens, many tokens and a training step: what `--quick` measures."""

_SMALL = ((64, 172), (128, 344), (256, 688), (512, 1376))

SMALL: tuple[Workload, ...] = tuple(
    Workload(tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype, training=training)
    for training in (False, True)
    for dtype in _MEASURED
    for d_model, d_hidden in _SMALL
    for tokens in (1, 8, 64, 512)
)
"""Layers whose steps take from some microseconds to some milliseconds: what surrounds the
arithmetic counts."""

_ALONE: tuple[dict[str, Any], ...] = (
    {"part": "gating"},
    {"part": "packed"},
    {"part": "gating", "variant": "swish"},
    {"part": "gating", "variant": "swish", "beta": 1.5},
)

GATING: tuple[Workload, ...] = tuple(
    Workload(tokens=tokens, d_model=0, d_hidden=d_hidden, dtype=dtype, training=training, **what)
    for what in _ALONE
    for training in (False, True)
    for dtype in _MEASURED
    for tokens, d_hidden in ((1, 172), (64, 688), (512, 1376))
)
"""Gating alone at hidden sizes of the small layers: of two tensors, of one, and Swish without and
with a beta of its own."""

_MIXTURES = ((2048, 768, 128, 8), (2048, 4096, 8, 2))
_TRAINED = (2048, 768, 32, 8)


def _experts(
    tokens: int, sizes: tuple[int, int, int, int], dtype: Dtype, training: bool = False
) -> Workload:
    names = ("d_model", "d_hidden", "experts", "slots")
    of: dict[str, Any] = dict(zip(names, sizes, strict=True))
    return Workload(part="experts", tokens=tokens, dtype=dtype, training=training, **of)


EXPERTS: tuple[Workload, ...] = (
    *(
        _experts(tokens, sizes, dtype)
        for sizes in _MIXTURES
        for dtype in _MEASURED
        for tokens in (1, 8, 64, 512, 2048)
    ),
    *(
        _experts(tokens, _TRAINED, dtype, training=True)
        for dtype in _MEASURED
        for tokens in (64, 512, 2048)
    ),
)
"""Many narrow experts and a few wide ones, from one token to a prefill; training steps."""

EXPERTS_QUICK: tuple[Workload, ...] = tuple(
    workload
    for workload in EXPERTS
    if workload.name
    in (
        "experts-8x2048x768-8of128-bfloat16",
        "experts-512x2048x4096-2of8-bfloat16",
        "experts-training-64x2048x768-8of32-bfloat16",
    )
)
"""Few tokens, many tokens and a training step."""

_WIDE, _NARROW = (4096, 14336), (768, 2048)


def _on_gpu(
    tokens: int, sizes: tuple[int, int], dtype: Dtype = "bfloat16", **more: Any
) -> Workload:
    d_model, d_hidden = sizes
    return Workload(
        tokens=tokens, d_model=d_model, d_hidden=d_hidden, dtype=dtype, device="cuda", **more
    )


GPU_MAIN: tuple[Workload, ...] = (
    _on_gpu(16384, (0, 14336), part="gating"),
    _on_gpu(16384, (0, 14336), part="gating", training=True, backward=True),
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

GPU_QUICK: tuple[Workload, ...] = GPU_MAIN[:5]
"""Gating, many tokens, a training step and one token: what `--quick` measures on a GPU."""


GPU_EXPERTS: tuple[Workload, ...] = tuple(
    _on_gpu(8192, (2048, 768), part="experts", experts=128, slots=8, training=training)
    for training in (False, True)
)
"""Many narrow experts: a forward pass of many tokens, and a training step."""

GPU_DECODER: tuple[Workload, ...] = (
    _on_gpu(2048, (2048, 5632), part="decoder", layers=22, training=True),
    _on_gpu(1, (2048, 5632), part="decoder", layers=22, past=512),
)
"""A model of 1.1 billion parameters as Llama's are: a training step, and the next token."""

SUITES: Mapping[Device, Mapping[str, tuple[Workload, ...]]] = MappingProxyType(
    {
        "cpu": MappingProxyType(
            {"main": MAIN, "small": SMALL, "gating": GATING, "experts": EXPERTS}
        ),
        "cuda": MappingProxyType(
            {"main": GPU_MAIN, "experts": GPU_EXPERTS, "decoder": GPU_DECODER}
        ),
    }
)
"""What `--suite` chooses among."""

QUICKS: Mapping[tuple[Device, str], tuple[Workload, ...]] = MappingProxyType(
    {("cpu", "main"): QUICK, ("cpu", "experts"): EXPERTS_QUICK, ("cuda", "main"): GPU_QUICK}
)
"""Those of a suite that `--quick` measures; of the others it is all."""


def get_suite(name: str, device: Device) -> tuple[Workload, ...]:
    """The workloads of the suite of that name.

    Raises:
        SettingError: the device has no such suite.

    >>> len(get_suite("small", "cpu"))
    64
    """
    suites = SUITES[device]
    if name not in suites:
        raise SettingError(f"{device} has no suite {name!r}: it must be one of {', '.join(suites)}")
    return suites[name]


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
    names: Sequence[str], variant: str, *, quick: bool, device: Device = "cpu", suite: str = "main"
) -> tuple[Workload, ...]:
    """The workloads of a suite whose names hold one of these texts, all when there are none.

    A text that is a workload's whole name is for that one alone.
    They are of the variant, but Swish alone stays what it is, and what has no gate is not packed.

    Raises:
        SettingError: a suite that the device does not have, or a text that no name holds.
        UnknownVariant: no such variant.

    >>> [workload.name for workload in choose(["training-512"], "swiglu", quick=False)]
    ['training-512x768x2048-float32', 'training-512x768x2048-bfloat16']
    """
    workloads = get_suite(suite, device)
    if quick and not names:
        workloads = QUICKS.get((device, suite), workloads)
    for name in names:
        if not any(name in workload.name for workload in workloads):
            known = ", ".join(workload.name for workload in workloads)
            raise SettingError(f"no workload has {name!r} in its name; the workloads are {known}")
    whole = {workload.name for workload in workloads}
    chosen = [
        workload
        for workload in workloads
        if not names
        or any(name == workload.name if name in whole else name in workload.name for name in names)
    ]
    row = get_variant(variant)
    return tuple(
        workload
        if workload.variant == "swish"
        else replace(workload, variant=row.name, file=_file(row))
        for workload in chosen
        if row.gated or workload.part != "packed"
    )


def _file(row: Variant) -> str | None:
    return row.file if isinstance(row, OwnVariant) else None


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
    row = get_variant(variant)
    return Workload(
        tokens=tokens,
        d_model=d_model,
        d_hidden=hidden_size(d_model, variant=row) if d_hidden is None else d_hidden,
        dtype=known,
        training=training,
        variant=row.name,
        file=_file(row),
        device=device,
    )
