"""The compiled CPU kernels as Python functions of tensors: `cpu.cpp` and what it includes.

A kernel takes a level, one of `gatedffn.native.LEVELS`, so that a test can force each of them.
"""

import ctypes
import functools
import logging
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedffn import native
from gatedffn.activations import SCALARS, Value
from gatedffn.errors import BuildError, ShapeError
from gatedffn.ops.spec import Matrix, Spec
from gatedffn.variants import VARIANTS

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpu.cpp"
DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of the kernels, by the number that `cpu.cpp` knows them by."""
PADDING = 64  # elements that a kernel may read beyond a parameter of one value a hidden unit
# Waking a second thread takes some microseconds, so each must have work for about ten of them.
ELEMENTS_PER_THREAD = 32768
MULTIPLY_ADDS_PER_THREAD = 1 << 19


_FORMULA = struct.Struct("ii" + 3 * "Pq")  # `Formula` of ops/cpu.h


class Kernel:
    """A C function that takes one struct: addresses, then facts.

    An address is 0 for what is not given or not wanted; a fact is a number that stays the same
    while a call is repeated. `cpu.cpp` has the same names in the same order.
    """

    def __init__(self, name: str, addresses: str, facts: str) -> None:
        self.name = name
        self.addresses, self.facts = tuple(addresses.split()), tuple(facts.split())
        self._pack = struct.Struct(f"{len(self.addresses)}Q").pack
        self._pack_facts = struct.Struct(f"{len(self.facts)}q").pack

    def bind(self, level: str | None = None, /, **facts: int) -> Callable[..., None]:
        """The kernel for these facts: a function of the addresses, in order."""
        function = getattr(library(level), f"gatedffn_{self.name}")
        pack, tail = self._pack, self._tail(facts)

        def run(*addresses: int) -> None:
            function(pack(*addresses) + tail)

        return run

    def scratch(self, level: str | None = None, /, **facts: int) -> int:
        """The bytes of scratch memory that it needs for these facts."""
        function = getattr(library(level), f"gatedffn_{self.name}_scratch")
        size: int = function(bytes(8 * len(self.addresses)) + self._tail(facts))
        return size

    def declare(self, loaded: ctypes.CDLL) -> None:
        """Tells ctypes what the functions of a library take and return.

        Raises:
            BuildError: its struct has another size.
        """
        _check(loaded, self.name, 8 * (len(self.addresses) + len(self.facts)))
        for suffix, returned in (("", None), ("_scratch", ctypes.c_int64)):
            function = getattr(loaded, f"gatedffn_{self.name}{suffix}", None)
            if function is not None:
                function.argtypes, function.restype = (ctypes.c_char_p,), returned

    def _tail(self, facts: Mapping[str, int]) -> bytes:
        if len(facts) == len(self.facts):
            try:
                return self._pack_facts(*[facts[name] for name in self.facts])
            except KeyError:
                pass
        missing = ", ".join(name for name in self.facts if name not in facts)
        unknown = ", ".join(name for name in facts if name not in self.facts)
        raise TypeError(
            f"{self.name} takes other facts: missing {missing or 'none'}, "
            f"unknown {unknown or 'none'}"
        )


_LAYER = "row x gate up down gate_bias up_bias down_bias y saved_gate saved_up scratch"
_OF_LAYER = (
    "x_stride gate_stride up_stride down_stride y_stride saved_gate_stride saved_up_stride"
    " tokens d_model d_hidden d_out dtype threads"
)
GATING = Kernel(
    "gating",
    "row gate up hidden",
    "gate_stride up_stride hidden_stride rows columns dtype threads",
)
GATING_BACKWARD = Kernel(
    "gating_backward",
    "row grad gate up d_gate d_up hidden sums0 sums1",
    "grad_stride gate_stride up_stride d_gate_stride d_up_stride hidden_stride"
    " rows columns dtype threads",
)
FEW = Kernel("few", _LAYER, _OF_LAYER)
BLOCKS = Kernel("blocks", _LAYER, f"{_OF_LAYER} tile")
TILES = Kernel("tiles", _LAYER, f"{_OF_LAYER} tile")
"""Only in the levels with tile instructions."""
_BACKWARD = (
    "row x gate up down gate_bias up_bias grad saved_gate saved_up"
    " sum_x sum_gate sum_up sum_down sum_gate_bias sum_up_bias sum_down_bias sums0 sums1 scratch"
)
_OF_BACKWARD = (
    "x_stride gate_stride up_stride down_stride grad_stride saved_gate_stride saved_up_stride"
    " sum_x_stride sum_gate_stride sum_up_stride sum_down_stride"
    " wide tokens d_model d_hidden d_out dtype threads tile units places"
)
FEW_BACKWARD = Kernel("few_backward", _BACKWARD, _OF_BACKWARD)
BLOCKS_BACKWARD = Kernel("blocks_backward", _BACKWARD, _OF_BACKWARD)
PRODUCT = Kernel(
    "product",
    "a b out scratch",
    "a_row a_deep b_row b_deep out_stride wide add rows columns deep dtype threads",
)
_OF_EXPERTS = (
    "x_stride gate_expert gate_row gate_deep up_expert up_row up_deep down_expert"
    " down_row down_deep gate_bias_expert gate_bias_step up_bias_expert up_bias_step"
    " down_bias_expert weigh_input tokens slots experts"
    " d_model d_hidden d_out dtype threads"
)
_EXPERTS = "row x gate up down gate_bias up_bias down_bias index weights"
EXPERTS = Kernel("experts", f"{_EXPERTS} y saved_gate saved_up scratch", _OF_EXPERTS)
EXPERTS_BACKWARD = Kernel(
    "experts_backward",
    f"{_EXPERTS} grad saved_gate saved_up sum_x sum_gate sum_up sum_down"
    " sum_gate_bias sum_up_bias sum_down_bias sum_weights sums0 sums1 scratch",
    f"{_OF_EXPERTS} grad_stride saved_gate_stride saved_up_stride sum_x_stride sum_gate_expert"
    " sum_gate_row sum_up_expert sum_up_row sum_down_expert sum_down_row few saved",
)
KERNELS = (
    *(GATING, GATING_BACKWARD, FEW, BLOCKS, TILES, FEW_BACKWARD, BLOCKS_BACKWARD, PRODUCT),
    *(EXPERTS, EXPERTS_BACKWARD),
)


@functools.cache
def library(level: str | None = None) -> ctypes.CDLL:
    """The kernels of a level; None is the machine's best.

    Raises:
        BuildError: they cannot be built, or are not those that are described here.
    """
    loaded = native.load(SOURCE, level)
    return declared(loaded, (level or native.best(SOURCE)) in native.WITH_TILES)


def declared(loaded: ctypes.CDLL, with_tiles: bool) -> ctypes.CDLL:
    """The same library, with what its functions take and return.

    Raises:
        BuildError: they are not those that are described here.
    """
    absent = [n for n in ("function", "size") if not hasattr(loaded, f"gatedffn_{n}")]
    if absent:
        raise BuildError(f"{loaded._name} has no gatedffn_{absent[0]}: delete it")
    loaded.gatedffn_function.argtypes = loaded.gatedffn_size.argtypes = (ctypes.c_char_p,)
    loaded.gatedffn_size.restype = ctypes.c_int64
    _check(loaded, "formula", _FORMULA.size)
    for kernel in KERNELS:
        if with_tiles or kernel is not TILES:
            kernel.declare(loaded)
    return loaded


def _check(loaded: ctypes.CDLL, name: str, size: int) -> None:
    there = loaded.gatedffn_size(name.encode())
    if there != size:
        raise BuildError(
            f"{SOURCE.name} has {there} bytes for what {name} takes, kernels.py {size}: one of the "
            "two is of another version; install gatedffn again"
        )


@functools.cache
def missing() -> str | None:
    """Why there are no compiled kernels; None when there are."""
    try:
        library()
    except BuildError as error:
        # Where there is no compiler, or they are switched off, this is as it should be.
        usual = isinstance(error, native.Refused) or not native.enabled()
        log.log(logging.INFO if usual else logging.WARNING, "there are no kernels: %s", error)
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


class Unreadable(ShapeError):
    """A tensor whose numbers are not where its address says."""


def address(x: Tensor, end: int = 0) -> int:
    """Where the numbers of a tensor are; `end` is how many bytes from there must be its own.

    Raises:
        Unreadable: it has no memory, which a kernel would take for no tensor, or its storage does
            not hold it, as that of sharded weights between steps.
    """
    at: int = x.data_ptr()
    there = x.untyped_storage().nbytes()
    needed = x.storage_offset() * x.element_size() + end
    if there < needed or not (at or not x.numel()):
        raise Unreadable(
            f"a tensor of shape {tuple(x.shape)} has {there} bytes of {needed}: its storage was "
            "made smaller; give it its memory back before the call"
        )
    return at


class Laid:
    """How matrices lie, each as rows of its last dimension, and where they are in a call.

    Those whose rows lie unevenly apart are copied.
    """

    def __init__(self, matrices: Sequence[Matrix | None]) -> None:
        self.strides = [0] * len(matrices)
        self._copied: list[int] = []
        # Of those that are there: the place, the bytes that must be its own, and those of a number.
        self._given: list[tuple[int, int, int]] = []
        for place, matrix in enumerate(matrices):
            if matrix is None:
                continue
            step, size, end = matrix.row_stride, matrix.dtype.itemsize, matrix.end
            if step is None:
                self._copied.append(place)
                step, end = matrix.shape[-1], matrix.numbers * size
            self.strides[place] = step
            self._given.append((place, end, size))

    def addresses(self, tensors: Sequence[Any]) -> tuple[list[int], Any]:
        """Where they are, 0 for those that are missing; and what must live while they are read.

        Raises:
            Unreadable: as `address`.
        """
        held: Any = None
        if self._copied:
            tensors = held = list(tensors)
            for place in self._copied:
                held[place] = held[place].contiguous()
        found = [0] * len(tensors)
        # `address` for all of them, written out: a call of it takes as long as all that it asks.
        for place, end, size in self._given:
            x = tensors[place]
            at = x.data_ptr()
            if not at or x.untyped_storage().nbytes() < x.storage_offset() * size + end:
                at = address(x, end)
            found[place] = at
        return found, held


KEPT_BYTES = 64 << 20  # bytes that a thread keeps of each for its next call
_held = threading.local()


def scratch(size: int, purpose: str = "layer") -> Tensor:
    """At least so many bytes, aligned; valid until this thread asks again for that purpose.

    It is used again: a fresh page costs more than the arithmetic that is done on it.
    """
    held: Tensor | None = getattr(_held, purpose, None)
    if held is None or held.numel() < size:
        with torch.inference_mode(mode=False):  # it outlives the mode that is on
            held = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= KEPT_BYTES:
            setattr(_held, purpose, held)
    return held


@functools.lru_cache(maxsize=1024)
def _functions(variant: str) -> tuple[int, int]:
    row = VARIANTS[variant]
    names = [row.phi] if row.psi is None else [row.phi, row.psi]
    numbers = [library().gatedffn_function(name.encode()) for name in names]
    assert min(numbers) >= 0, f"activations/scalars.h lacks one of {names}"
    return numbers[0], numbers[1] if len(numbers) > 1 else -1


class Formula:
    """phi, psi and their parameters, in the form that the kernels take.

    `parameters` are numbers, or tensors of one value, or of one value a hidden unit.
    """

    def __init__(self, variant: str, parameters: Mapping[str, Value]) -> None:
        row = VARIANTS[variant]
        self._alive = []
        self.of_phi = SCALARS[row.phi].parameters
        places = list(enumerate(self.of_phi))
        if row.psi is not None:
            places += [(2, name) for name in SCALARS[row.psi].parameters]
        given = [0] * 6  # where each of the three is, and the step to the next hidden unit's
        for place, name in places:
            value = parameters[name]
            count = value.numel() if isinstance(value, Tensor) else 1
            copy = torch.zeros(PADDING + count, dtype=torch.float32, device="cpu")
            copy[:count] = value.detach().reshape(-1) if isinstance(value, Tensor) else value
            self._alive.append(copy)
            given[2 * place : 2 * place + 2] = copy.data_ptr(), int(count > 1)
        self.per_unit = any(given[1::2])
        self._memory = ctypes.create_string_buffer(
            _FORMULA.pack(*_functions(variant), *given), _FORMULA.size
        )
        self.pointer = ctypes.addressof(self._memory)


@functools.lru_cache(maxsize=1024)
def _fixed(variant: str, values: tuple[float, ...]) -> Formula:
    return Formula(variant, dict(zip(VARIANTS[variant].defaults, values, strict=True)))


def describe(variant: str, parameters: Mapping[str, Value]) -> Formula:
    """The row as the kernels take it; made once for every set of fixed numbers."""
    values = tuple(parameters.values())
    if any(isinstance(value, Tensor) for value in values):
        return Formula(variant, parameters)
    return _fixed(variant, values)


def threads(work: int, for_each: int = ELEMENTS_PER_THREAD) -> int:
    """How many threads are worth waking for so much work: at most PyTorch's own number."""
    return max(1, min(torch.get_num_threads(), work // for_each))


def formulas(
    describe: Callable[[str, Mapping[str, Value]], Any], spec: Spec
) -> Callable[[Mapping[str, Value]], Any]:
    """What makes of a call's parameters the form that kernels take; numbers are in it already."""
    if any(isinstance(value, Matrix) for value in spec.parameters):
        return functools.partial(describe, spec.variant)
    names = VARIANTS[spec.variant].defaults
    fixed = describe(spec.variant, dict(zip(names, spec.parameters, strict=True)))  # type: ignore[arg-type]
    return lambda _: fixed
