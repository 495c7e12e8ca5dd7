"""The package's C++ as shared libraries: compiled at first use, or brought by a wheel.

One source makes a library for each instruction-set level, and the level is chosen at run time.
`library.py` has that; `compiler.py` and `wheel.py` are the two places that a library comes from.
"""

from gatedffn.files import alone
from gatedffn.native.cache import cache_folder
from gatedffn.native.compiler import Refused, enabled, find_compiler, source_version
from gatedffn.native.cpu import levels, multiplies, processor, processor_name
from gatedffn.native.instructions import LEVELS, WITH_TILES, Level
from gatedffn.native.library import best, load, openmp, state
from gatedffn.native.wheel import prebuilt

__all__ = [
    "LEVELS",
    "WITH_TILES",
    "Level",
    "Refused",
    "alone",
    "best",
    "cache_folder",
    "enabled",
    "find_compiler",
    "levels",
    "load",
    "multiplies",
    "openmp",
    "prebuilt",
    "processor",
    "processor_name",
    "source_version",
    "state",
]
