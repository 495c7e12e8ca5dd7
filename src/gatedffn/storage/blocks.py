"""Finding the feed-forward blocks of a layout among the names and shapes of a checkpoint."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gatedffn.errors import LayoutError
from gatedffn.storage.arithmetic import Placed
from gatedffn.storage.model import Layout, Role
from gatedffn.storage.tensors import Sizes, extra_named, sizes_of, tensors_of

Shapes = Mapping[str, Sequence[int]]

LONGEST_PLACE = 200

# What a name says about a tensor that is no plain weight.
KINDS = {
    r"lora_|adapter": "it belongs to an adapter: merge the adapter into the weights first",
    r"scale|zero|q_?weight|g_idx|_blocks|packed|absmax|quant|SCB|codebook": "the weights are "
    "quantised: dequantise them first",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A feed-forward block of a checkpoint: its tensors with relative names, and where they are."""

    layout: Layout
    path: str
    layer: int | None
    place: str
    sizes: Sizes
    placed: Sequence[Placed]
    biases: tuple[Role, ...]
    extras: Mapping[str, tuple[int, ...]]

    def full(self, name: str) -> str:
        """The whole name of one of its tensors."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def names(self) -> list[str]:
        """The whole names of its tensors."""
        return [self.full(one.name) for one in self.placed]


@dataclass(slots=True)
class _Found:
    place: str
    layer: int | None
    known: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=1024)
def pattern(place: str) -> re.Pattern[str]:
    """What matches a name in a block at a place: the path, the layer, and the rest of the name.

    The place "" is the checkpoint itself.

    Raises:
        LayoutError: a place that names the layer twice, or numbers side by side.

    >>> pattern("h.{layer}.mlp").fullmatch("transformer.h.3.mlp.c_fc.weight")["layer"]
    '3'
    """
    # Numbers side by side could be read in many ways, and a hostile header could make that endless.
    beside = re.search(r"[0-9]\{|\}[0-9{]", place)
    short = len(place) <= LONGEST_PLACE and place.isprintable()
    if place.count("{layer}") > 1 or beside or not short:
        raise LayoutError(
            f"{place[:LONGEST_PLACE]!r} is no place: it is the end of a module's path, with "
            "{layer} once and other numbers as {n}, as in layers.{layer}.mlp"
        )
    if not place:
        return re.compile(r"(?P<path>)(?P<rest>.+)")
    words = (
        re.escape(place).replace(r"\{layer\}", r"(?P<layer>[0-9]+)").replace(r"\{n\}", r"[0-9]+")
    )
    return re.compile(rf"(?P<path>(?:.+\.)?{words})\.(?P<rest>.+)")


def is_at(path: str, places: Sequence[str]) -> bool:
    """Whether the path of a block's module is at one of the places.

    >>> is_at("model.layers.3.mlp", ["layers.{layer}.mlp"])
    True
    >>> is_at("model.layers.3.mlp.experts", ["layers.{layer}.mlp"])
    False
    """
    if not path:
        return "" in places
    found = (pattern(place).fullmatch(f"{path}.x") for place in places)
    return any(match is not None and match["path"] == path for match in found)


def block_of(
    layout: Layout,
    shapes: Shapes,
    *,
    path: str = "",
    layer: int | None = None,
    place: str = "",
    experts: int | None = None,
    d_hidden: int | None = None,
    tp: int = 1,
) -> Block:
    """The block that tensors with relative names make, all of which must belong to it.

    Raises:
        LayoutError: a tensor is missing, or is none of the layout's, or the shapes do not fit.
    """
    where = f" of {path}" if path else ""
    try:
        sizes = sizes_of(layout, shapes, experts=experts, d_hidden=d_hidden)
        there = set().union(*map(generic, shapes))
        biases = tuple(
            role for stored in layout.stored if stored.bias in there for role in stored.roles
        )
        extras = {
            extra.key: tuple(shapes[extra.name]) for extra in layout.extras if extra.name in shapes
        }
        placed = tensors_of(layout, sizes, biases=biases, extras=extras, tp=tp, shapes=shapes)
    except LayoutError as error:
        raise LayoutError(f"{error}{where}") from None
    for one in placed:
        if one.name not in shapes:
            raise LayoutError(f"{one.name} of layout {layout.name!r} is missing{where}")
        if tuple(shapes[one.name]) != one.shape:
            raise LayoutError(
                f"{one.name} is {tuple(shapes[one.name])}: the other tensors say {one.shape}{where}"
            )
    own = {one.name for one in placed} | set(layout.beside)
    left = [name for name in shapes if name not in own]
    if left:
        raise LayoutError(_stranger(layout, left[0], where))
    return Block(layout, path, layer, place, sizes, placed, biases, extras)


def find_blocks(
    layout: Layout,
    shapes: Shapes,
    *,
    at: Sequence[str] | None = None,
    experts: int | None = None,
    d_hidden: int | None = None,
    tp: int = 1,
) -> list[Block]:
    """Every block of a layout in a checkpoint, by layers.

    Args:
        shapes: the shape of every tensor by its name.
        at: places to look at instead of the layout's: ends of module paths, with `{layer}`.

    Raises:
        LayoutError: there is none, or one is incomplete, or holds what the layout does not know.
    """
    places = tuple(at) if at else layout.places
    # The longest place that a name fits to is its own: experts are in a module of another block.
    patterns = [(place, pattern(place)) for place in sorted(places, key=len, reverse=True)]
    found: dict[str, _Found] = {}
    for name, shape in shapes.items():
        for place, compiled in patterns:
            match = compiled.fullmatch(name)
            if match is None:
                continue
            layer = match.groupdict().get("layer")
            entry = _Found(place, None if layer is None else int(layer))
            entry = found.setdefault(match["path"], entry)
            if known(layout, match["rest"]):
                entry.known[match["rest"]] = tuple(shape)
                break
            entry.unknown.append(match["rest"])
    blocks = []
    for path, entry in found.items():
        strange = [rest for rest in entry.unknown if _near(layout, rest)]
        if strange:
            raise LayoutError(_stranger(layout, strange[0], f" of {path}"))
        if not any(_matrix(layout, rest) for rest in entry.known):
            continue
        if layout.alone and entry.unknown:
            strange = [r for r in entry.unknown if not _elsewhere(path, r, found)]
            if strange:
                raise LayoutError(_stranger(layout, strange[0], f" of {path}"))
        blocks.append(
            block_of(
                layout,
                entry.known,
                path=path,
                layer=entry.layer,
                place=entry.place,
                experts=experts,
                d_hidden=d_hidden,
                tp=tp,
            )
        )
    if not blocks:
        names = [f"{place}.{layout.stored[0].name}".lstrip(".") for place in places]
        raise LayoutError(
            f"no block of layout {layout.name!r} is here: nothing is called "
            f"{' or '.join(names)}; at= (--at) names another place"
        )
    return sorted(blocks, key=lambda block: _natural(block.path))


def generic(rest: str) -> set[str]:
    """A name relative to a block, and with {expert} for the number that it begins or ends with.

    >>> sorted(generic("3.fc1.weight")), sorted(generic("fc1.weight3"))
    (['3.fc1.weight', '{expert}.fc1.weight'], ['fc1.weight3', 'fc1.weight{expert}'])
    """
    numbers = (r"^[0-9]+(?=\.)", r"[0-9]+$")
    return {rest, *(re.sub(number, "{expert}", rest) for number in numbers)}


def _matrix(layout: Layout, rest: str) -> bool:
    names = generic(rest)
    return any(stored.name in names for stored in layout.stored)


def known(layout: Layout, rest: str) -> bool:
    """Whether a name relative to a block belongs to the layout, in the block or beside it."""
    names = generic(rest)
    return (
        any(not names.isdisjoint((stored.name, stored.bias)) for stored in layout.stored)
        or rest in layout.beside
        or extra_named(layout, rest) is not None
    )


def _near(layout: Layout, rest: str) -> bool:
    """Whether an unknown name belongs to one of the layout's matrices: an adapter, a scale."""
    for stored in layout.stored:
        stem = stored.name.removesuffix("{expert}")
        stem = stem.removesuffix(".weight").removesuffix(".kernel")
        for name in generic(rest):
            follows = name.removeprefix(stem)
            if follows != name and (
                follows.startswith(".") or re.match(r"_(blocks|scales?|zeros|inv|packed)", follows)
            ):
                return True
    return False


def _elsewhere(path: str, rest: str, found: Mapping[str, _Found]) -> bool:
    """Whether a name belongs to a block inside this one's module."""
    words = rest.split(".")
    return any(".".join((path, *words[:cut])) in found for cut in range(1, len(words)))


def _stranger(layout: Layout, name: str, where: str) -> str:
    kind = next((words for kind, words in KINDS.items() if re.search(kind, name)), None)
    return f"{name}{where} is no tensor of layout {layout.name!r}" + (
        f"; {kind}" if kind else ", and nothing of a block may be left behind"
    )


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in path.split(".")]
