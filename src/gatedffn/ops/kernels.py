"""The compiled CPU kernels as Python functions of tensors: `cpu.cpp` and what it includes.

A kernel takes a level, one of `gatedffn.native.LEVELS`, so that a test can force each of them.
"""

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gatedffn import native
from gatedffn.activations import SCALARS, Value
from gatedffn.errors import BuildError, ShapeError
from gatedffn.variants import VARIANTS

SOURCE = Path(__file__).parent / "cpu.cpp"
DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of the kernels, by the number that `cpu.cpp` knows them by."""
PADDING = 64  # elements that a kernel may read beyond a parameter of one value a hidden unit
# Waking a second thread takes some microseconds, so each must have work for about ten of them.
ELEMENTS_PER_THREAD = 32768
MULTIPLY_ADDS_PER_THREAD = 1 << 19


class Parameter(ctypes.Structure):
    """`Parameter` of activations/cpu.h."""

    _fields_ = (("at", ctypes.c_void_p), ("step", ctypes.c_int64))


class Row(ctypes.Structure):
    """`Row` of ops/cpu.h."""

    _fields_ = (("phi", ctypes.c_int32), ("psi", ctypes.c_int32), ("parameters", Parameter * 3))


_long, _int, _pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_ROWS, _WEIGHT = (_pointer, _long), (_pointer, _long, _pointer)
_OPERAND = (_pointer, _long, _long)
_HEAD = (_int, _pointer)
SIGNATURES = {
    "gatedffn_gating": (*_HEAD, *_ROWS * 3, _long, _long, _int),
    "gatedffn_gating_backward": (*_HEAD, *_ROWS * 6, _pointer, _pointer, _long, _long, _int),
    "gatedffn_few": (*_HEAD, *_ROWS, *_WEIGHT * 3, *_ROWS, *[_long] * 4, _pointer, _int),
    "gatedffn_few_scratch": (_int, _long, _long, _long),
    "gatedffn_product": (*(_int, *_OPERAND * 2, *_ROWS, _int, _int, *[_long] * 3, _pointer, _int),),
    "gatedffn_product_scratch": (_int, _int, *[_long] * 3, _int),
    "gatedffn_blocks": (*_HEAD, *_ROWS, *_WEIGHT * 3, *_ROWS * 4, *[_long] * 4, _pointer, _int),
    "gatedffn_blocks_backward": (
        *(*_HEAD, *_ROWS, *_WEIGHT * 3, *_ROWS * 10, _pointer, _pointer, _int, _int, _int),
        *(*[_long] * 4, _pointer, _int),
    ),
    "gatedffn_blocks_scratch": (_int, *[_long] * 4, _int),
    "gatedffn_function": (ctypes.c_char_p,),
}
OF_TILES = {
    "gatedffn_tiles": (_pointer, *_ROWS, *_WEIGHT * 3, *_ROWS * 3, *[_long] * 5, _pointer, _int),
    "gatedffn_tiles_scratch": (*[_long] * 4, _int),
}
"""What a level with tile instructions has besides."""


@functools.cache
def library(level: str | None = None) -> ctypes.CDLL:
    """The kernels of a level; None is the machine's best.

    Raises:
        BuildError: they cannot be built.
    """
    loaded = native.load(SOURCE, level)
    tiles = (level or native.best(SOURCE)) in native.WITH_TILES
    for name, types in (SIGNATURES | (OF_TILES if tiles else {})).items():
        function = getattr(loaded, name)
        function.argtypes = types
        function.restype = _int if name == "gatedffn_function" else None
        if name.endswith("_scratch"):
            function.restype = _long
    return loaded


@functools.cache
def missing() -> str | None:
    """Why there are no compiled kernels; None when there are."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def level() -> str:
    """The level that the kernels are built for; empty where there are none."""
    return native.best(SOURCE) if missing() is None else ""


@functools.cache
def has_tiles() -> bool:
    """Whether that level multiplies tiles of bfloat16."""
    return level() in native.WITH_TILES


def _address(x: Tensor) -> int:
    """Where the numbers of a tensor are: to a kernel, no address says that there is no tensor."""
    at = x.data_ptr()
    if not at and x.numel():
        raise ShapeError(f"a tensor of shape {tuple(x.shape)} has no memory: {_EMPTIED}")
    return at


_EMPTIED = "its storage was made smaller; give it its memory back before the call"


def matrix(x: Tensor | None) -> tuple[int, int]:
    """A matrix, whose last stride is 1, as a kernel takes it: its address and row stride."""
    return (0, 0) if x is None else (_address(x), x.stride(0))


def operand(x: Tensor, deep: int) -> tuple[int, int, int]:
    """An operand of a product, one of its strides 1: its address, and the strides of what stays and
    of the dimension `deep`, which is summed over.
    """
    row, along = x.stride(1 - deep), x.stride(deep)
    if along == 1 or x.shape[deep] == 1:
        return _address(x), row, 1
    return _address(x), 1, along


def weight(w: Tensor | None, bias: Tensor | None) -> tuple[int, int, int]:
    """A projection, its rows contiguous and its bias too, as a kernel takes it.

    Raises:
        ShapeError: the memory of one does not hold it, as that of sharded weights between steps.
    """
    if w is None:
        return 0, 0, 0
    return _held(w), w.stride(0), 0 if bias is None else _held(bias)


def _held(w: Tensor) -> int:
    """The address of a tensor whose storage holds all of it."""
    last = sum((size - 1) * step for size, step in zip(w.shape, w.stride(), strict=True))
    needed = (w.storage_offset() + last + 1) * w.element_size() if w.numel() else 0
    held = w.untyped_storage().nbytes()
    if held < needed:
        raise ShapeError(
            f"a weight of shape {tuple(w.shape)} has {held} bytes of {needed}: {_EMPTIED}"
        )
    return w.data_ptr()


@functools.lru_cache(maxsize=1024)
def few_scratch(level: str | None, dtype: torch.dtype, *sizes: int) -> int:
    """The bytes of scratch memory of `gatedffn_few`."""
    size: int = library(level).gatedffn_few_scratch(DTYPES[dtype], *sizes)
    return size


@functools.lru_cache(maxsize=1024)
def tiles_scratch(level: str | None, *sizes: int) -> int:
    """The bytes of scratch memory of `gatedffn_tiles`."""
    size: int = library(level).gatedffn_tiles_scratch(*sizes)
    return size


@functools.lru_cache(maxsize=1024)
def blocks_scratch(level: str | None, dtype: torch.dtype, *sizes: int) -> int:
    """The bytes that `gatedffn_blocks` and its gradients pack into."""
    size: int = library(level).gatedffn_blocks_scratch(DTYPES[dtype], *sizes)
    return size


@functools.lru_cache(maxsize=1024)
def product_scratch(level: str | None, dtype: torch.dtype, *sizes: int) -> int:
    """The bytes that `gatedffn_product` packs into: of so many products, and their three sizes."""
    size: int = library(level).gatedffn_product_scratch(DTYPES[dtype], *sizes)
    return size


@functools.lru_cache(maxsize=1024)
def _functions(variant: str) -> tuple[int, int]:
    row = VARIANTS[variant]
    names = [row.phi] if row.psi is None else [row.phi, row.psi]
    numbers = [library().gatedffn_function(name.encode()) for name in names]
    assert min(numbers) >= 0, f"activations/cpu.h lacks one of {names}"
    return numbers[0], numbers[1] if len(numbers) > 1 else -1


class Described:
    """A row of the table with its parameters, in the form that the kernels take.

    `parameters` are numbers, or tensors of one value, or of one value a hidden unit.
    """

    def __init__(self, variant: str, parameters: Mapping[str, Value]) -> None:
        row = VARIANTS[variant]
        phi, psi = _functions(variant)
        self.row = Row(phi, psi)
        self._alive = []
        self.of_phi = SCALARS[row.phi].parameters
        places = list(enumerate(self.of_phi))
        if row.psi is not None:
            places += [(2, name) for name in SCALARS[row.psi].parameters]
        for place, name in places:
            value = parameters[name]
            count = value.numel() if isinstance(value, Tensor) else 1
            step = int(count > 1)
            held = torch.zeros(PADDING + count, dtype=torch.float32, device="cpu")
            held[:count] = value.detach().reshape(-1) if isinstance(value, Tensor) else value
            self._alive.append(held)
            self.row.parameters[place] = Parameter(held.data_ptr(), step)
        self.per_unit = any(self.row.parameters[place].step for place, _ in places)
        self.pointer = ctypes.addressof(self.row)


@functools.lru_cache(maxsize=1024)
def _fixed(variant: str, values: tuple[float, ...]) -> Described:
    return Described(variant, dict(zip(VARIANTS[variant].defaults, values, strict=True)))


def describe(variant: str, parameters: Mapping[str, Value]) -> Described:
    """The row as the kernels take it; made once for every set of fixed numbers."""
    values = tuple(parameters.values())
    if any(isinstance(value, Tensor) for value in values):
        return Described(variant, parameters)
    return _fixed(variant, values)


def threads(work: int, for_each: int = ELEMENTS_PER_THREAD) -> int:
    """How many threads are worth waking for so much work: at most PyTorch's own number."""
    return max(1, min(torch.get_num_threads(), work // for_each))
