"""The instruction-set levels that the C++ is compiled for."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"),
    *("-mfma", "-mf16c", "-mbmi2"),
)


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set: what the compiler is told, and PyTorch's checks that it can run here."""

    flags: tuple[str, ...]
    checks: tuple[str, ...]


LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "amx": Level(
            # Compilers disagree on the name of the macro that says so.
            (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DGATEDFFN_TILES"),
            ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_init_amx"),
        ),
        "avx512_bf16": Level((*AVX512, "-mavx512bf16"), ("_is_avx512_bf16_supported",)),
        "avx512": Level(AVX512, ("_is_avx512_supported",)),
        "avx2": Level(("-mavx2", "-mfma", "-mf16c", "-mbmi2"), ("_is_avx2_supported",)),
        "portable": Level((), ()),
    }
)
"""Every level by name, the fastest first; the last runs everywhere."""

WITH_TILES = ("amx",)
"""The levels that multiply tiles of bfloat16."""
