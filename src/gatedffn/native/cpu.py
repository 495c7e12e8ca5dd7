"""The processor: who it is, and what it can do."""

import functools
import platform
from pathlib import Path

import torch

from gatedffn.native.instructions import LEVELS

MULTIPLIES = {
    "torch.bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "torch.float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""Any of these instruction sets of x86 or ARM multiplies numbers of that dtype."""


@functools.cache
def processor() -> str:
    """The processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def processor_name() -> str:
    """The name alone, for people; the architecture where the system knows no name."""
    for line in processor().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels that this processor and this system run, the fastest first."""
    return tuple(
        name
        for name, level in LEVELS.items()
        if all(getattr(torch.cpu, check, bool)() for check in level.checks)
    )


@functools.cache
def multiplies(dtype: str) -> bool:
    """Whether this processor has instructions for products in a dtype, as far as it says."""
    sets = set(processor().split())
    wanted = MULTIPLIES.get(dtype)
    return not wanted or not sets or bool(sets.intersection(wanted))
