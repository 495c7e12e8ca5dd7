"""Which tensors a block of some size has in a layout: `sizes_of` from shapes, `tensors_of` back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from gatedffn.errors import LayoutError
from gatedffn.storage.arguments import check_arguments
from gatedffn.storage.arithmetic import Placed
from gatedffn.storage.model import PROJECTIONS, Extra, Layout, Role, Stored


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a block; `experts` is None where there are none, else their number."""

    d_hidden: int
    d_model: int
    d_out: int
    experts: int | None = None


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
    numbers = {n for name in shapes if (n := expert_of(layout, name)) is not None}
    if numbers and numbers != set(range(len(numbers))):
        raise LayoutError(f"experts {sorted(numbers)} are there: some miss")
    found: dict[str, tuple[int, str]] = {}

    def note(what: str, value: int, name: str) -> None:
        known, other = found.setdefault(what, (value, name))
        if known != value:
            raise LayoutError(
                f"{other} and {name} disagree in layout {layout.name!r}: {what} is {known} in the "
                f"one and {value} in the other"
            )

    check_arguments(experts=experts, d_hidden=d_hidden)
    for what, value in (("the number of experts", experts), ("d_hidden", d_hidden)):
        if value is not None:
            note(what, value, "what was asked")
    if numbers:
        note("the number of experts", len(numbers), "the names")
    if layout.flattened and "the number of experts" not in found:
        raise LayoutError(
            f"{layout.stored[0].name} of layout {layout.name!r} has the experts flattened into "
            "another axis: give their number"
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
    axes = stored.shape_axes.split()
    if len(axes) != len(shape):
        raise LayoutError(f"{name} is {shape}: it must have {len(axes)} axes, ({', '.join(axes)})")
    for axis, size in zip(axes, shape, strict=True):
        if size < 1:
            raise LayoutError(f"{name} is {shape}: it is empty")
        if axis in ("1", "2") and size != int(axis):
            raise LayoutError(f"{name} is {shape}: it must be ({', '.join(axes)})")
        if axis == "e":
            note("the number of experts", size, name)
        if axis in ("eh", "ed", "ep"):
            experts = found["the number of experts"][0]
            if size % experts:
                raise LayoutError(f"{name} is {shape}: {experts} experts do not divide {size}")
            size //= experts
        if axis[-1] == "d":
            for role in stored.roles:
                note("d_out" if role == "down" else "d_model", size, name)
        if axis in ("h", "eh"):
            note("d_hidden", size, name)
        if axis in ("p", "ep"):
            if size % 2:
                raise LayoutError(
                    f"{name} is {shape}: its packed axis holds two halves, so it is even"
                )
            note("d_hidden", size // 2, name)


def expert_of(layout: Layout, name: str) -> int | None:
    """The number of the expert in a name relative to the block, if it has one."""
    for stored in layout.stored:
        for pattern in (stored.name, stored.bias):
            if pattern is None or "{expert}" not in pattern:
                continue
            head, _, tail = pattern.partition("{expert}")
            middle = name[len(head) : len(name) - len(tail)]
            if (
                name.startswith(head)
                and name.endswith(tail)
                and middle.isascii()
                and middle.isdecimal()
            ):
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
    check_arguments(tp=tp)
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
    shown = stored.shape_axes.split() if kind == "weight" else words
    full = tuple(
        experts * length[word[1]] if word in ("eh", "ed", "ep") else length[word.strip("+")]
        for word in shown
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
