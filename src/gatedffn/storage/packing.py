"""From the tensors of a layout to those of `FeedForward` and back: `unpack` and `pack`."""

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

from gatedffn.errors import LayoutError
from gatedffn.storage.arguments import check_arguments, check_tensors
from gatedffn.storage.arithmetic import Fetch, Source, assemble
from gatedffn.storage.blocks import Block, block_of, find_blocks
from gatedffn.storage.model import PROJECTIONS, Layout, Role
from gatedffn.storage.rows import LAYOUTS
from gatedffn.storage.tensors import Sizes, tensors_of


def get_layout(name: str | Layout) -> Layout:
    """The row of a layout.

    Raises:
        LayoutError: no layout has that name; the message lists the nearest ones.

    >>> get_layout("phi3").stored[0].roles
    ('gate', 'up')
    """
    if isinstance(name, Layout):
        return name
    row = LAYOUTS.get(str(name))
    if row is not None:
        return row
    near = difflib.get_close_matches(str(name), LAYOUTS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "see gatedffn.storage.LAYOUTS"
    raise LayoutError(f"no layout is called {name!r}; {hint}")


def unpack(
    tensors: Mapping[str, Tensor],
    layout: str | Layout,
    *,
    layer: int | str | None = None,
    expert: int | None = None,
    tp: int = 1,
    experts: int | None = None,
    d_hidden: int | None = None,
) -> dict[str, Tensor]:
    """A block's tensors under the names and in the order of `FeedForward`'s state dict.

    `gate_proj.weight` and `up_proj.weight` are (d_hidden, d_model), `down_proj.weight` is
    (d_out, d_hidden). The tensors may share memory with those that came.

    Args:
        tensors: a block's, under names relative to it; with `layer`, a model's.
        layout: its name.
        layer: the number of a layer, or the whole path of a block's module.
        expert: one expert of those that the block holds; None is all of them, on an axis in front.
        tp: the ranks whose parts a packed matrix holds one after the other.
        experts, d_hidden: where the shapes do not say them: flattened, or fused with attention.

    Raises:
        LayoutError: no such layout; a tensor is missing or left over; the shapes do not fit.

    >>> packed = {"gate_up_proj.weight": torch.arange(8.0).view(4, 2)}
    >>> packed["down_proj.weight"] = torch.ones(2, 2)
    >>> unpack(packed, "phi3")["gate_proj.weight"]
    tensor([[0., 1.],
            [2., 3.]])
    """
    check_arguments(layer=layer, expert=expert, tp=tp, experts=experts, d_hidden=d_hidden)
    check_tensors(tensors)
    row = get_layout(layout)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if layer is None:
        block = block_of(row, shapes, experts=experts, d_hidden=d_hidden, tp=tp)
    else:
        found = find_blocks(row, shapes, experts=experts, d_hidden=d_hidden, tp=tp)
        block = choose(found, layer)
    flat = {one.name: tensors[block.full(one.name)].reshape(-1) for one in block.placed}
    return canonical(block, lambda name, first, count: flat[name][first : first + count], expert)


def choose(blocks: list[Block], layer: int | str) -> Block:
    """The block of a layer, by its number or its path.

    Raises:
        LayoutError: there is none, or several.
    """
    found = [b for b in blocks if layer in ((b.path,) if isinstance(layer, str) else (b.layer,))]
    if len(found) == 1:
        return found[0]
    paths = ", ".join(block.path for block in (found or blocks)[:8])
    if found:
        raise LayoutError(f"layer {layer} is not one block: name one of {paths} by its path")
    raise LayoutError(f"there is no layer {layer}; the blocks are {paths}")


def canonical(block: Block, fetch: Fetch, expert: int | None = None) -> dict[str, Tensor]:
    """All matrices and vectors of a block, read by `fetch`; of one expert, or of all stacked.

    Raises:
        LayoutError: there is no such expert, or none at all.
    """
    count = block.sizes.experts
    if expert is not None and not (count is not None and 0 <= expert < count):
        raise LayoutError(f"there is no expert {expert}: the block has {count or 'none'}")
    source = Source(block.placed, fetch)
    chosen = range(count or 1) if expert is None else (expert,)
    found = {}
    for key in dict.fromkeys(key for one in block.placed for key in one.keys):
        if key in block.extras:
            holder = source.holders[key, 0]
            found[key] = source.rows(key, 0, 0, holder.rows, False).reshape(holder.shape)
            continue
        shape = shape_of(key, block.sizes)
        parts = [source.rows(key, e, 0, shape[0], False).reshape(shape) for e in chosen]
        found[key] = torch.stack(parts) if count is not None and expert is None else parts[0]
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(key: str) -> tuple[int, str]:
    projection, _, kind = key.partition(".")
    known = list(PROJECTIONS.values())
    at = known.index(projection) if projection in known else len(known)
    return at, "" if kind == "weight" else key


def shape_of(key: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a canonical matrix or bias of a block of these sizes.

    >>> shape_of("down_proj.weight", Sizes(8, 3, 3))
    (3, 8)
    """
    projection, _, kind = key.partition(".")
    down = projection == PROJECTIONS["down"]
    out = sizes.d_out if down else sizes.d_hidden
    return (out, sizes.d_hidden if down else sizes.d_model) if kind == "weight" else (out,)


def pack(
    weights: Mapping[str, Tensor], layout: str | Layout, *, tp: int = 1, path: str = ""
) -> dict[str, Tensor]:
    """The inverse of `unpack`: a block's tensors as a layout stores them, contiguous.

    Where that is how they came, they share memory with those that came.

    Args:
        weights: under the names of `FeedForward`'s state dict; experts on an axis in front.
        layout: its name.
        tp: the ranks whose parts a packed matrix shall hold one after the other.
        path: put before the names, as in "model.layers.0.mlp".

    Raises:
        LayoutError: no such layout; it cannot express the block; the shapes do not fit.

    >>> eye = torch.eye(2)
    >>> weights = {"gate_proj.weight": eye, "up_proj.weight": 2 * eye, "down_proj.weight": eye}
    >>> pack(weights, "quack")["fc1.weight"][:, 0]
    tensor([1., 2., 0., 0.])
    """
    check_arguments(tp=tp, path=path)
    check_tensors(weights)
    row = get_layout(layout)
    sizes, biases, extras = _measure(weights, row)
    if row.fused:
        raise LayoutError(
            f"layout {row.name!r} shares a matrix with attention, whose part is not here"
        )
    placed = tensors_of(row, sizes, biases=biases, extras=extras, tp=tp)
    held = {key for one in placed for key in one.keys}
    left = [key for key in weights if key not in held]
    if left:
        raise LayoutError(f"the block has {left[0]}, and layout {row.name!r} has no place for it")
    stacked = sizes.experts is not None

    def rows(key: str, expert: int, lo: int, hi: int, transposed: bool) -> Tensor:
        whole = weights[key][expert] if stacked and key not in extras else weights[key]
        matrix = whole.reshape(-1, 1) if key in extras or whole.dim() == 1 else whole
        return (matrix.t() if transposed else matrix)[lo:hi]

    return {(f"{path}." if path else "") + one.name: assemble(one, rows) for one in placed}


def _measure(
    weights: Mapping[str, Tensor], row: Layout
) -> tuple[Sizes, tuple[Role, ...], dict[str, tuple[int, ...]]]:
    """The sizes of a block under canonical names, its biases and what else it has."""
    for role in PROJECTIONS:
        key = f"{PROJECTIONS[role]}.weight"
        if (key in weights) != (role in row.roles):
            has = "has" if key in weights else "has no"
            raise LayoutError(f"the block {has} {key}, and layout {row.name!r} stores otherwise")
    down, up = weights["down_proj.weight"], weights["up_proj.weight"]
    if down.dim() not in (2, 3) or up.dim() != down.dim():
        raise LayoutError(
            f"up_proj.weight is {tuple(up.shape)} and down_proj.weight {tuple(down.shape)}: they "
            "must be (d_hidden, d_model) and (d_out, d_hidden), experts in front of both"
        )
    experts = down.shape[0] if down.dim() == 3 else None
    sizes = Sizes(up.shape[-2], up.shape[-1], down.shape[-2], experts)
    front = () if experts is None else (experts,)
    extras: dict[str, tuple[int, ...]] = {}
    biases: list[Role] = []
    roles = {name: role for role, name in PROJECTIONS.items()}
    for key, tensor in weights.items():
        projection, _, kind = key.partition(".")
        if projection not in PROJECTIONS.values() or kind not in ("weight", "bias"):
            extras[key] = tuple(tensor.shape)
            continue
        wanted = (*front, *shape_of(key, sizes))
        if tuple(tensor.shape) != wanted:
            raise LayoutError(f"{key} is {tuple(tensor.shape)}: the others say {wanted}")
        if kind == "bias":
            biases.append(roles[projection])  # type: ignore[index]
    kinds = {tensor.dtype for tensor in weights.values()}
    if len(kinds) > 1:
        raise LayoutError(f"the block has {', '.join(sorted(map(str, kinds)))}: it must have one")
    return sizes, tuple(biases), extras
