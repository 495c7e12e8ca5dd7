"""The arithmetic of packing: where each hidden unit of a block lies in a tensor of a layout.

A `Placed` is a tensor of a block of some size. Both directions, whole tensors in memory and ranges
of files, use its `read` and `compose`, so there is one formula of the order: `positions`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (name, first element, number of elements) -> those elements of a stored tensor, flat
Fetch = Callable[[str, int, int], Tensor]
# (canonical name, expert, first row, last row, transposed) -> those rows of a role's matrix
Rows = Callable[[str, int, int, int, bool], Tensor]


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
        # Cut out first, then turned: a slice of a transpose is copied many times slower.
        return matrix[lo:hi].t().contiguous().t().contiguous()
