"""Where the layer's gradients are added up over tiles of tokens and parts of hidden units."""

import torch
from torch import Tensor

from gatedffn.ops.feed_forward.call import Call, some
from gatedffn.ops.feed_forward.products import ADDS_WIDER, Product
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.gating.engine import parameter_gradient


class Sums:
    """The gradients as they are added up: those of the weights and biases over tiles of tokens,
    in float32 unless there is a single tile; those of the parameters in float64.
    """

    def __init__(self, call: Call, wanted: frozenset[str], exact: bool) -> None:
        self._call, self.wanted, self.exact = call, wanted, exact
        self.learned = [name for name in call.parameters if name in wanted]
        self.beyond_down = bool(wanted - {"down", "down_bias"})
        self.x = call.x.new_empty(call.x.shape if "x" in wanted else 0)
        self._x_end = 0
        self._made: dict[str, Tensor] = {}
        kernel = call.described is not None
        self.parameters = {}
        for name in self.learned:
            value = call.parameters[name]
            assert isinstance(value, Tensor)
            shape = (call.d_hidden,) if kernel else value.shape
            self.parameters[name] = call.x.new_zeros(shape, dtype=torch.float64)

    def x_begun(self, rows: slice) -> bool:
        """Whether these tokens' gradient holds something already; from now on it does."""
        begun: bool = rows.stop <= self._x_end
        self._x_end = max(self._x_end, rows.stop)
        return begun

    def place(self, name: str) -> Tensor:
        if name not in self._made:
            like: Tensor = getattr(self._call.weights, name)
            wide = like.dtype if self.exact or like.dtype == torch.float64 else torch.float32
            written = self.exact and self._call.tokens and not name.endswith("_bias")
            make = like.new_empty if written else like.new_zeros
            self._made[name] = make(like.shape, dtype=wide)
        return self._made[name]

    def part(self, name: str, units: slice) -> Tensor:
        """The part of a weight's gradient that some hidden units have."""
        place = self.place(name)
        if name == "down":
            return some(place, slice(0, len(place)), units)
        return some(place, units)

    def product(self, name: str, units: slice, product: Product, a: Tensor, b: Tensor) -> None:
        """Adds `a @ b` to the part of a weight's gradient that some hidden units have."""
        place = self.part(name, units)
        if self.exact:
            product(a, b, place, False)
        elif place.dtype == a.dtype or product in ADDS_WIDER:
            product(a, b, place, True)
        else:
            place += product(a, b, None, False)

    def column_sums(self, name: str, part: slice, rows: Tensor) -> None:
        """Adds the sums over the tokens to a part of a bias's gradient."""
        place = self.place(name)[part]
        place += rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(place.dtype)

    def finished(self) -> dict[str, Tensor]:
        """Every gradient that was wanted, in the dtype of what it belongs to."""
        found = {"x": self.x} if "x" in self.wanted else {}
        for name in self.wanted & set(Weights._fields):
            found[name] = self.place(name).to(getattr(self._call.weights, name).dtype)
        for name, sums in self.parameters.items():
            found[name] = parameter_gradient(sums, self._call.parameters[name])
        return found
