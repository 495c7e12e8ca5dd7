"""How the fused kernels are cut into tiles, by chip and by class of shapes.

What a search has found on a chip is taken as it is. `python -m gatedffn.bench.gpu_search` runs
candidates on a GPU, records what they take, and prints the best as lines of SEARCHED. For every
other chip and class there is a table of candidates: tiles that are known to serve matrix products
there, and that the compiler, asked without a GPU, has room for in registers and shared memory. At
the first call of a class a few of them are compiled at once and raced, and the choice is kept as
that among the ways is. A kernel's `config` argument takes another.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gatedffn.errors import BackendError
from gatedffn.ops import gpu
from gatedffn.ops.gpu import Kind, kind_of

Kernel = Literal["hidden_values", "branch_gradients"]
Chip = Literal["sm_80", "sm_90", "sm_100", "other"]
Operands = Literal["pointers", "descriptors", "joined"]

RANKS: Mapping[Operands, int] = {"pointers": 0, "descriptors": 1, "joined": 2}
"""The ways to read the operands; who can be read in one of them can be read in those before it."""

FEW_TOKENS, SOME_TOKENS, NARROW = 64, 256, 2048
"""Tokens up to which, and hidden units up to which, a configuration is for its class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a kernel is cut.

    A tile is `tokens` rows by `units` hidden units of each branch, its products sum over `deep`
    elements at a time, in `warps` warps with `stages` steps in flight. A multiprocessor holds
    `for_each` programs; `group` rows of tiles are gone through together. `flatten` lets a program
    read its next tile while it finishes one, and the gate comes for `subtiles` parts of a tile one
    after the other, which need fewer registers. `specialize` gives the reading to warps of its own:
    Triton 3.6 does that on Hopper for kernels of four warps and a single part, whose operands are
    read as "descriptors".
    """

    tokens: int
    units: int
    deep: int
    warps: int
    stages: int
    group: int = 8
    for_each: int = 1
    subtiles: int = 1
    operands: Operands = "pointers"
    flatten: bool = False
    specialize: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """A configuration and what it is for: up to so many tokens or hidden units, None for any."""

    kernel: Kernel
    chip: Chip
    kind: Kind
    tokens: int | None
    units: int | None
    config: Config


def _fits(
    kernel: Kernel,
    chips: Iterable[Chip],
    kind: Kind,
    *,
    few: Config,
    narrow: Config,
    wide: Config,
) -> list[Fit]:
    return [
        Fit(kernel, chip, kind, tokens, units, config)
        for chip in chips
        for tokens, units, config in (
            (FEW_TOKENS, None, few),
            (SOME_TOKENS, None, narrow),
            (None, NARROW, narrow),
            (None, None, wide),
        )
    ]


# What Hopper and newer have in common: operands through descriptors, and the next tile read early.
_joined = partial(Config, operands="joined", flatten=True)
_alone = partial(Config, operands="descriptors", flatten=True)

TABLE: tuple[Fit, ...] = (
    # Hopper multiplies at its full rate in tiles of 128 x 256 by two groups of four warps, with
    # all of the shared memory for operands on their way. Where there would be too few of those
    # for every multiprocessor, smaller ones run two at a time.
    *_fits(
        "hidden_values",
        ("sm_90", "sm_100"),
        "half",
        few=_joined(tokens=64, units=64, deep=64, warps=4, stages=4, for_each=2),
        narrow=_joined(tokens=128, units=64, deep=64, warps=4, stages=3, for_each=2, subtiles=2),
        wide=_joined(tokens=128, units=128, deep=64, warps=8, stages=4, group=16, subtiles=2),
    ),
    *_fits(
        "hidden_values",
        ("sm_90",),
        "tf32",
        few=_joined(tokens=64, units=64, deep=32, warps=4, stages=4, for_each=2),
        narrow=_joined(tokens=128, units=64, deep=32, warps=4, stages=3, subtiles=2),
        wide=_joined(tokens=128, units=128, deep=32, warps=8, stages=3, group=16, subtiles=4),
    ),
    # Blackwell keeps a transposed copy of such tiles beside them.
    *_fits(
        "hidden_values",
        ("sm_100",),
        "tf32",
        few=_joined(tokens=64, units=64, deep=32, warps=4, stages=3),
        narrow=_joined(tokens=128, units=64, deep=32, warps=4, stages=3, subtiles=2),
        wide=_joined(tokens=128, units=128, deep=32, warps=8, stages=2, group=16, subtiles=4),
    ),
    # In the backward a tile has one sum, and five others meet it: in eight parts, so that they
    # find room in the registers.
    *_fits(
        "branch_gradients",
        ("sm_90", "sm_100"),
        "half",
        few=_alone(tokens=64, units=128, deep=64, warps=4, stages=3, for_each=2, subtiles=4),
        narrow=_alone(tokens=128, units=128, deep=64, warps=4, stages=3, for_each=2, subtiles=8),
        wide=_alone(tokens=128, units=256, deep=64, warps=8, stages=3, group=16, subtiles=8),
    ),
    *_fits(
        "branch_gradients",
        ("sm_90", "sm_100"),
        "tf32",
        few=_alone(tokens=64, units=128, deep=32, warps=4, stages=4, subtiles=4),
        narrow=_alone(tokens=128, units=128, deep=32, warps=8, stages=3, subtiles=8),
        wide=_alone(tokens=128, units=128, deep=32, warps=8, stages=3, group=16, subtiles=8),
    ),
    # Up to 64 KiB of shared memory and no descriptors: what every chip can run, and what each of
    # them takes for rows that are not aligned.
    *_fits(
        "hidden_values",
        ("sm_80", "other"),
        "half",
        few=Config(tokens=64, units=64, deep=64, warps=4, stages=3, for_each=2),
        narrow=Config(tokens=64, units=64, deep=64, warps=4, stages=3, for_each=2),
        wide=Config(tokens=128, units=64, deep=32, warps=8, stages=4),
    ),
    *_fits(
        "hidden_values",
        ("sm_80", "other"),
        "tf32",
        few=Config(tokens=64, units=64, deep=32, warps=4, stages=3, for_each=2),
        narrow=Config(tokens=64, units=64, deep=32, warps=4, stages=3, for_each=2),
        wide=Config(tokens=128, units=64, deep=32, warps=8, stages=3),
    ),
    *_fits(
        "branch_gradients",
        ("sm_80", "other"),
        "half",
        few=Config(tokens=64, units=128, deep=32, warps=4, stages=4, for_each=2, subtiles=4),
        narrow=Config(tokens=64, units=128, deep=32, warps=4, stages=4, for_each=2, subtiles=4),
        wide=Config(tokens=128, units=128, deep=32, warps=8, stages=4, subtiles=4),
    ),
    *_fits(
        "branch_gradients",
        ("sm_80", "other"),
        "tf32",
        few=Config(tokens=64, units=128, deep=32, warps=4, stages=3, for_each=2, subtiles=4),
        narrow=Config(tokens=64, units=128, deep=32, warps=4, stages=3, for_each=2, subtiles=4),
        wide=Config(tokens=128, units=128, deep=32, warps=8, stages=3, subtiles=4),
    ),
    # Exact float32 has no matrix units: multiply-adds of blocks in registers.
    *_fits(
        "hidden_values",
        ("sm_80", "sm_90", "sm_100", "other"),
        "float32",
        few=Config(tokens=64, units=32, deep=16, warps=8, stages=3, for_each=2),
        narrow=Config(tokens=64, units=32, deep=16, warps=8, stages=3, for_each=2),
        wide=Config(tokens=64, units=64, deep=16, warps=8, stages=3),
    ),
    *_fits(
        "branch_gradients",
        ("sm_80", "sm_90", "sm_100", "other"),
        "float32",
        few=Config(tokens=64, units=64, deep=16, warps=8, stages=3, for_each=2),
        narrow=Config(tokens=64, units=64, deep=16, warps=8, stages=3, for_each=2),
        wide=Config(tokens=64, units=64, deep=16, warps=8, stages=3, for_each=2),
    ),
)
"""The candidates; by rule the first that fits is taken."""

SEARCHED: tuple[Fit, ...] = ()
"""The best by a search: none has been run yet."""


def chip_of(device: torch.device) -> Chip:
    """The part of the table for a device; "other" where it names no such chip."""
    if gpu.interpreting() or torch.version.hip is not None:
        return "other"
    major, _ = torch.cuda.get_device_capability(device)
    chips: Mapping[int, Chip] = {8: "sm_80", 9: "sm_90", 10: "sm_100"}
    return chips.get(major, "other")


def pick(kernel: Kernel, chip: Chip, kind: Kind, tokens: int, units: int) -> Config:
    """The configuration of the table for a call."""
    return next(_fitting(TABLE, kernel, chip, kind, tokens, units))


def _fitting(
    table: Iterable[Fit], kernel: Kernel, chip: Chip, kind: Kind, tokens: int, units: int
) -> Iterator[Config]:
    for fit in table:
        of_tokens = fit.tokens is None or tokens <= fit.tokens
        of_units = fit.units is None or units <= fit.units
        if (fit.kernel, fit.chip, fit.kind) == (kernel, chip, kind) and of_tokens and of_units:
            yield fit.config


@functools.cache
def candidates(
    kernel: Kernel, chip: Chip, kind: Kind, allowed: Operands, tokens: int, units: int
) -> tuple[Config, ...]:
    """The configurations for a call, that of the rule first: the search's alone, or the table's
    for this chip, of all classes, and what every chip can run.
    """
    if allowed == "pointers":
        chip = "other"
    searched = next(_fitting(SEARCHED, kernel, chip, kind, tokens, units), None)
    if searched is not None:
        return (within(searched, allowed),)
    found = [pick(kernel, chip, kind, tokens, units), *_of_chip(kernel, chip, kind)]
    found.append(pick(kernel, "other", kind, tokens, units))
    if allowed == "pointers":
        found = [askew(config, kind) for config in found]
    return tuple(dict.fromkeys(within(config, allowed) for config in found))


def _of_chip(kernel: Kernel, chip: Chip, kind: Kind) -> list[Config]:
    return [fit.config for fit in TABLE if (fit.kernel, fit.chip, fit.kind) == (kernel, chip, kind)]


def _class_of(tokens: int, units: int) -> tuple[int, int]:
    """The sizes that stand for a class of the table."""
    for most in (FEW_TOKENS, SOME_TOKENS):
        if tokens <= most:
            return most, NARROW + 1
    return SOME_TOKENS + 1, NARROW if units <= NARROW else NARROW + 1


def within(config: Config, allowed: Operands) -> Config:
    """The configuration with the best operands that are allowed."""
    return config if RANKS[config.operands] <= RANKS[allowed] else replace(config, operands=allowed)


def askew(config: Config, kind: Kind) -> Config:
    """A configuration of a chip without descriptors, for rows that are not aligned to 16 bytes.

    They are read an element at a time, and each takes registers for its address: steps over 64
    bytes of a row, and parts of half the size, leave enough of them.
    """
    return replace(
        config, deep=min(config.deep, 32 if kind == "half" else 16), subtiles=2 * config.subtiles
    )


def chosen(
    kernel: Kernel,
    config: Config | None,
    allowed: Operands,
    x: Tensor,
    of: tuple[int, int],
    run: Callable[[Config], object],
) -> Config:
    """What a call runs with: what it asks for, or the best of the candidates by `run`, which may
    be called with any of them.

    Raises:
        BackendError: what it asks for wants other operands than are allowed.
    """
    if config is None:
        chip, kind, sizes = chip_of(x.device), kind_of(x.dtype), _class_of(*of)
        among = _named(candidates(kernel, chip, kind, allowed, *sizes))
        words = (
            f"tiles of {kernel}, {kind}, {allowed}, class of {sizes[0]} tokens, {sizes[1]} units"
        )
        return gpu.raced(words, among, run, x.device)[0]
    if RANKS[config.operands] > RANKS[allowed]:
        raise BackendError(
            f"the configuration reads {config.operands}, these tensors can be read as {allowed}: "
            "their rows are not aligned to 16 bytes, or lie too far apart or too near together"
        )
    return config


@functools.cache
def _named(among: tuple[Config, ...]) -> dict[str, Config]:
    return {", ".join(f"{n} {v}" for n, v in asdict(config).items()): config for config in among}
