"""The arithmetic of packing: where each hidden unit of a block lies in the tensors of a layout.

`tensors_of` says which tensors a block of some size has in a layout, and `Placed` is one of them.
Both directions, whole tensors in memory and ranges of files, use `Placed.read` and
`Placed.compose`, so there is one formula of the order: `positions`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gatedffn.errors import LayoutError
from gatedffn.layouts.model import PROJECTIONS, Extra, Layout, Role, Stored

# (name, first element, number of elements) -> those elements of a stored tensor, flat
Fetch = Callable[[str, int, int], Tensor]
# (canonical name, expert, first row, last row, transposed) -> those rows of a role's matrix
Rows = Callable[[str, int, int, int, bool], Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a block; `experts` is None where there are none, else their number."""

    d_hidden: int
    d_model: int
    d_out: int
    experts: int | None = None


def positions(start: int, stop: int, second: bool, block: int) -> Tensor:
    """Where the hidden units start to stop of the first or second role lie on a packed axis.

    A block of units of the first role, then as many of the second, and so on: `block` is 1 for
    interleaved, the hidden width for one after the other, and their part of it for ranks.

    >>> positions(0, 4, False, 2), positions(0, 4, True, 2)
    (tensor([0, 1, 4, 5]), tensor([2, 3, 6, 7]))
    """
    unit = torch.arange(start, stop)
    return unit // block * (2 * block) + unit % block + second * block


def before(position: int, second: bool, block: int) -> int:
    """How many units of a role lie before a position of a packed axis."""
    whole, rest = divmod(position, 2 * block)
    return whole * block + min(max(rest - second * block, 0), block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor of a block: `experts` times `planes` matrices of `rows` by `cols`, in that order.

    `keys` are the canonical names of what it holds: one a plane, or two that share the `packed`
    axis (0 rows, 1 columns). A `transposed` one holds the canonical matrices' transposes. `first`
    is the expert that it begins with; `start` is where its part of the axis begins.
    """

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    rows: int
    cols: int
    experts: int = 1
    first: int = 0
    planes: int = 1
    packed: int | None = None
    block: int = 1
    transposed: tuple[bool, ...] = (False,)
    start: tuple[int, int] = (0, 0)

    def read(self, fetch: Fetch, key: str, expert: int, lo: int, hi: int) -> Tensor:
        """Rows lo to hi of what it holds under a canonical name, as they are oriented here."""
        slot = self.keys.index(key)
        down, right = self.start
        plane = (expert - self.first) * self.planes + (slot if self.planes > 1 else 0)

        def rows(a: int, b: int) -> Tensor:
            full = self.cols + right
            begin = (plane * (self.rows + down) + down + a) * full
            return fetch(self.name, begin, (b - a) * full).view(b - a, full)[:, right:]

        if self.packed is None:
            return rows(lo, hi)
        if self.packed == 1:
            return rows(lo, hi)[:, positions(0, self.cols // 2, slot == 1, self.block)]
        place = positions(lo, hi, slot == 1, self.block)
        a, b = int(place[0]), int(place[-1]) + 1
        return rows(a, b)[place - a] if b - a > hi - lo else rows(a, b)

    def size(self, key: str) -> int:
        """How many rows `read` has for a canonical name."""
        del key  # both halves are of one size
        return self.rows // 2 if self.packed == 0 else self.rows

    def compose(self, rows: Rows, expert: int, plane: int, lo: int, hi: int) -> Tensor:
        """Rows lo to hi of one of its matrices, from the rows of what it holds."""
        if self.packed is None:
            return rows(self.keys[plane], expert, lo, hi, self.transposed[plane])
        parts: list[tuple[Tensor, Tensor]] = []
        for slot, key in enumerate(self.keys):
            second = slot == 1
            if self.packed == 1:
                place = positions(0, self.cols // 2, second, self.block)
                parts.append((place, rows(key, expert, lo, hi, self.transposed[0])))
                continue
            a, b = before(lo, second, self.block), before(hi, second, self.block)
            if a < b:
                place = positions(a, b, second, self.block) - lo
                parts.append((place, rows(key, expert, a, b, self.transposed[0])))
        composed = parts[0][1].new_empty(hi - lo, self.cols)
        for place, part in parts:
            composed.index_copy_(self.packed, place, part)
        return composed


def sizes_of(
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
    *,
    experts: int | None = None,
    d_hidden: int | None = None,
) -> Sizes:
    """The sizes of a block from the shapes of its matrices, whose axes the layout names.

    Raises:
        LayoutError: a matrix is missing, has other axes, or disagrees with another.
    """
    numbers = {expert_of(layout, name) for name in shapes} - {None}
    if numbers and numbers != set(range(len(numbers))):
        raise LayoutError(f"experts {sorted(map(int, filter(None, numbers)))} are there: some miss")
    found: dict[str, tuple[int, str]] = {}

    def note(what: str, value: int, name: str) -> None:
        known, other = found.setdefault(what, (value, name))
        if known != value:
            raise LayoutError(
                f"{other} and {name} disagree in layout {layout.name!r}: {what} is {known} in the "
                f"one and {value} in the other"
            )

    if experts is not None:
        note("the number of experts", experts, "what was asked")
    if d_hidden is not None:
        note("d_hidden", d_hidden, "what was asked")
    if numbers:
        note("the number of experts", len(numbers), "the names")
    flat = [s for s in layout.stored if s.axes.split()[0] in ("eh", "ed")]
    if flat and "the number of experts" not in found:
        raise LayoutError(
            f"{flat[0].name} of layout {layout.name!r} has the experts flattened into another "
            "axis: give their number"
        )
    for stored in layout.stored:
        name = stored.name.replace("{expert}", "0")
        if name not in shapes:
            raise LayoutError(f"{name} of layout {layout.name!r} is missing")
        _note_axes(stored, name, tuple(shapes[name]), found, note)
    if "d_hidden" not in found:
        raise LayoutError(f"layout {layout.name!r} is fused with attention: give d_hidden")
    values = {what: value for what, (value, _) in found.items()}
    d_model = values["d_model"]
    return Sizes(values["d_hidden"], d_model, values["d_out"], values.get("the number of experts"))


def _note_axes(
    stored: Stored,
    name: str,
    shape: tuple[int, ...],
    found: Mapping[str, tuple[int, str]],
    note: Callable[[str, int, str], None],
) -> None:
    axes = stored.axes.split()
    if len(axes) != len(shape):
        raise LayoutError(f"{name} is {shape}: it must have {len(axes)} axes, ({', '.join(axes)})")
    for axis, size in zip(axes, shape, strict=True):
        if size < 1:
            raise LayoutError(f"{name} is {shape}: it is empty")
        if axis in ("1", "2") and size != int(axis):
            raise LayoutError(f"{name} is {shape}: it must be ({', '.join(axes)})")
        if axis == "p" and size % 2:
            raise LayoutError(f"{name} is {shape}: its packed axis holds two halves, so it is even")
        if axis == "e":
            note("the number of experts", size, name)
        if axis in ("eh", "ed"):
            experts = found["the number of experts"][0]
            if size % experts:
                raise LayoutError(f"{name} is {shape}: {experts} experts do not divide {size}")
            size //= experts
        if axis[-1] == "d":
            for role in stored.roles:
                note("d_out" if role == "down" else "d_model", size, name)
        if axis in ("h", "eh"):
            note("d_hidden", size, name)
        if axis == "p":
            note("d_hidden", size // 2, name)


def expert_of(layout: Layout, name: str) -> int | None:
    """The number of the expert in a name relative to the block, if it has one."""
    for stored in layout.stored:
        for pattern in (stored.name, stored.bias):
            if pattern is None or "{expert}" not in pattern:
                continue
            head, _, tail = pattern.partition("{expert}")
            middle = name[len(head) : len(name) - len(tail)]
            if name.startswith(head) and name.endswith(tail) and middle.isdecimal():
                return int(middle)
    return None


def tensors_of(
    layout: Layout,
    sizes: Sizes,
    *,
    biases: Collection[Role] = (),
    extras: Mapping[str, Sequence[int]] | None = None,
    tp: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Placed]:
    """The tensors that a block has in a layout, with names relative to the block.

    Args:
        biases: the projections that have a bias.
        extras: canonical names and shapes of what else the block has.
        tp: tensor-parallel ranks, one after the other.
        shapes: of the tensors that are there; needed where one is shared with something else.

    Raises:
        LayoutError: the layout has no place for what the block has, or the sizes do not divide.
    """
    check_ranks(layout, sizes.d_hidden, tp)
    if (sizes.experts is not None) != layout.has_experts:
        has, lacks = ("experts", "none") if sizes.experts is not None else ("no experts", "some")
        raise LayoutError(f"the block has {has}, and layout {layout.name!r} stores {lacks}")
    placed = []
    for stored in layout.stored:
        block = stored.block or (sizes.d_hidden // tp if layout.per_rank else sizes.d_hidden)
        if sizes.d_hidden % block or (stored.block and sizes.d_hidden // tp % block):
            ranks = f" on each of {tp} ranks" if tp > 1 else ""
            raise LayoutError(
                f"layout {layout.name!r} alternates blocks of {block}: the hidden width, "
                f"{sizes.d_hidden}, must be a multiple of it{ranks}"
            )
        for number in _experts(stored.name, sizes):
            name = stored.name.replace("{expert}", str(number))
            shape = None if shapes is None else shapes.get(name)
            placed.append(_place(stored, name, stored.axes, "weight", sizes, block, number, shape))
            if _with_bias(layout, stored, biases):
                bias = (stored.bias or "").replace("{expert}", str(number))
                axes = stored.axes_of_bias()
                placed.append(_place(stored, bias, axes, "bias", sizes, block, number, None))
    return placed + [_extra(layout, key, shape) for key, shape in (extras or {}).items()]


def check_ranks(layout: Layout, d_hidden: int, tp: int) -> None:
    """Raises unless `tp` ranks can share a block of that width in that layout.

    Raises:
        LayoutError: with the reason.
    """
    if tp < 1:
        raise LayoutError(f"tp is {tp}: it must be a positive number of ranks")
    if tp == 1:
        return
    packed = next((stored for stored in layout.stored if stored.halves), None)
    if packed is not None and not layout.per_rank:
        raise LayoutError(
            f"layout {layout.name!r} holds all of {packed.roles[0]} before all of "
            f"{packed.roles[1]} in {packed.name}: a plain split over {tp} ranks would give the "
            f"first ranks rows of {packed.roles[0]} only. Take a layout whose ranks each hold "
            "both, such as megatron or vllm"
        )
    if d_hidden % tp:
        raise LayoutError(f"{tp} ranks do not divide the hidden width, {d_hidden}")


def _experts(name: str, sizes: Sizes) -> range:
    return range(sizes.experts or 1) if "{expert}" in name else range(1)


def _with_bias(layout: Layout, stored: Stored, biases: Collection[Role]) -> bool:
    there = [role for role in stored.roles if role in biases]
    if not there and not stored.needs_bias:
        return False
    if stored.bias is None:
        raise LayoutError(
            f"the block has a bias of {' and '.join(there)}, and layout {layout.name!r} has no "
            "place for it"
        )
    if len(there) < len(stored.roles):
        missing = next(role for role in stored.roles if role not in there)
        raise LayoutError(
            f"layout {layout.name!r} stores {stored.bias} with {stored.name}, and the block has "
            f"no bias of {missing}"
        )
    return True


def _place(
    stored: Stored,
    name: str,
    axes: str,
    kind: str,
    sizes: Sizes,
    block: int,
    number: int,
    shape: Sequence[int] | None,
) -> Placed:
    words = axes.split()
    experts = sizes.experts or 1
    flattened = words[0] in ("eh", "ed")
    d = sizes.d_out if stored.roles == ("down",) else sizes.d_model
    length = {"h": sizes.d_hidden, "p": 2 * sizes.d_hidden, "d": d, "1": 1, "2": 2, "e": experts}
    full = tuple(
        experts * length[word[1]] if word in ("eh", "ed") else length[word.strip("+")]
        for word in words
    )
    if any("+" in word for word in words):
        # What stands before the block's part of the axis is known from the tensor alone.
        full = tuple(shape) if shape is not None else full
    matrix = [word[1] if word in ("eh", "ed") else word for word in words]
    batch = experts if (flattened or words[0] == "e") else 1
    if words[0] == "e":
        matrix = matrix[1:]
    planes = 2 if matrix[0] == "2" else 1
    if planes == 2:
        matrix = matrix[1:]
    matrix = [word for word in matrix if word != "1"] or ["1"]
    if "2" in matrix:
        # An axis of two after h alternates unit by unit; before h, it is two halves.
        at, unit = matrix.index("2"), matrix.index("h")
        block = 1 if unit < at else sizes.d_hidden
        matrix[min(at, unit)] = "p"
        del matrix[max(at, unit)]
    matrix += ["1"] * (2 - len(matrix))
    rows, cols = (length[word.strip("+")] for word in matrix)
    start = (0, 0)
    if any("+" in word for word in words):
        start = (full[-2] - rows, full[-1] - cols)
        if min(start) < 0:
            raise LayoutError(f"{name} is {full}: it is too small for a block of {rows} by {cols}")
    packed = next((i for i, word in enumerate(matrix) if word.strip("+") == "p"), None)
    wide = matrix[0].strip("+") in ("h", "p")
    return Placed(
        name=name,
        shape=full,
        keys=tuple(f"{PROJECTIONS[role]}.{kind}" for role in stored.roles),
        rows=rows,
        cols=cols,
        experts=batch,
        first=number,
        planes=planes,
        packed=packed,
        block=block,
        transposed=tuple(kind == "weight" and wide == (role == "down") for role in stored.roles),
        start=start,
    )


def _extra(layout: Layout, key: str, shape: Sequence[int]) -> Placed:
    known = next((extra for extra in layout.extras if extra.key == key), None)
    if known is None:
        raise LayoutError(f"the block has a {key}, and layout {layout.name!r} has no place for it")
    return Placed(name=known.name, shape=tuple(shape), keys=(key,), rows=prod(shape), cols=1)


def extra_named(layout: Layout, name: str) -> Extra | None:
    """The extra of that name, if the layout has it."""
    return next((extra for extra in layout.extras if extra.name == name), None)


def assemble(placed: Placed, rows: Rows) -> Tensor:
    """A whole tensor of a block, contiguous, from the rows of what it holds."""
    parts = [
        placed.compose(rows, placed.first + expert, plane, 0, placed.rows)
        for expert in range(placed.experts)
        for plane in range(placed.planes)
    ]
    joined = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return joined.view(placed.shape)


class Source:
    """The rows of a block's matrices, read from the tensors that hold them."""

    def __init__(self, placed: Sequence[Placed], fetch: Fetch) -> None:
        self.fetch = fetch
        self.holders = {
            (key, one.first + expert): one
            for one in placed
            for key in one.keys
            for expert in range(one.experts)
        }
        self.turned: dict[tuple[str, int], Tensor] = {}

    def rows(self, key: str, expert: int, lo: int, hi: int, transposed: bool) -> Tensor:
        """Rows of a matrix as canonical, or of its transpose.

        Where it is stored the other way round the whole matrix is read once, and kept until two
        others were: gate and up are asked for in turns.
        """
        one = self.holders[key, expert]
        slot = one.keys.index(key)
        turned = one.transposed[min(slot, len(one.transposed) - 1)]
        if turned == transposed:
            return one.read(self.fetch, key, expert, lo, hi)
        matrix = self.turned.get((key, expert))
        if matrix is None:
            if len(self.turned) > 1:
                del self.turned[next(iter(self.turned))]
            matrix = one.read(self.fetch, key, expert, 0, one.size(key)).t()
            self.turned[key, expert] = matrix
        return matrix[lo:hi]
