"""The layers: `FeedForward`, `GLU` and `Swish`; the convolutions are in `convolution.py`."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn import functional
from gatedffn.activations import Value
from gatedffn.errors import ParameterError, SettingError, ShapeError
from gatedffn.functional import ORDERS, Order, Save
from gatedffn.ops import sharded
from gatedffn.ops.checks import complete
from gatedffn.ops.feed_forward import Weights, check_options
from gatedffn.roles import (
    Affine,
    Path,
    Projection,
    Roles,
    at,
    hooked,
    is_untouched,
    read,
    values_of,
    widths,
)
from gatedffn.sizing import check_size, hidden_size
from gatedffn.variants import VARIANTS, Granularity, Parameter, Variant, get_variant

Learnable = bool | Granularity | None
Device = torch.device | str | None


class VariantModule(nn.Module):
    """A module that computes a row of the table, with its parameters fixed or learned.

    A learned parameter is an `nn.Parameter` under its own name. One with a lower bound is stored
    as the inverse softplus of its distance from the bound, as the authors of xIELU do.
    """

    variant: str
    _row: Variant

    def _set_variant(
        self,
        row: Variant,
        values: dict[str, float],
        learnable: Learnable,
        units: int | None,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        given: dict[str, object] = {**values}
        for name, value in given.items():
            if isinstance(value, Tensor):
                raise ParameterError(
                    f"{name} is a tensor: give its starting value as a number, and learnable= to "
                    "have it learned"
                )
        self.variant = row.name
        self._row = row  # what a process that unpickles this needs beside the name
        self._start = complete(row, {**values})
        self.learned = _granularity(row, learnable)
        if self.learned == "unit" and units is None:
            raise ParameterError(
                f"{type(self).__name__} does not know the number of hidden units: learn one "
                "parameter per layer, or use FeedForward"
            )
        size = units if self.learned == "unit" and units is not None else 1
        names = [p.name for p in row.parameters if p.learnable] if self.learned else []
        self._learned_at: Mapping[str, Path] = {name: (name,) for name in names}
        for name in names:
            raw = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, raw)

    def _learned_rows(self) -> list[Parameter]:
        return [p for p in VARIANTS[self.variant].parameters if p.name in self._learned_at]

    def _reset_learned(self) -> None:
        for parameter in self._learned_rows():
            start = float(self._start[parameter.name])
            if parameter.above is not None:
                distance = start - parameter.above
                start = distance + math.log(-math.expm1(-distance))
            *path, name = self._learned_at[parameter.name]
            with torch.no_grad():
                getattr(at(self, tuple(path)), name).fill_(start)

    def reset_parameters(self) -> None:
        """Sets every learned parameter to its starting value."""
        self._reset_learned()

    def activation_parameters(self) -> dict[str, Value]:
        """The parameters of the formula by name, as they are now."""
        return values_of(self.variant, self._start, self._learned_at, self)

    def why_own_forward(self) -> str | None:
        """Why another forward than this library's computes: of the class that was made of one."""
        kind = type(self)
        own = kind.forward.__module__.partition(".")[0] != __name__.partition(".")[0]
        return f"{kind.__name__} has its own" if own else None

    def _describe(self) -> str:
        row = VARIANTS[self.variant]
        learned = [p.name for p in self._learned_rows()]
        words = [f"variant={self.variant!r}"]
        words += [f"{name}={self._start[name]:g}" for name in row.defaults if name not in learned]
        words += [f"{name}=learned per {self.learned}" for name in learned]
        return ", ".join(words)


class FeedForward(VariantModule):
    """The feed-forward layer of a Transformer, for every variant of the table.

    Gated: `y = (phi(x W_gate^T + b_gate) * psi(x W_up^T + b_up)) W_down^T + b_down`.
    Not gated: `y = phi(x W_up^T + b_up) W_down^T + b_down`.

    Children: `gate_proj` (gated only), `up_proj` and `down_proj`, each a `torch.nn.Linear`, as in
    LLaMA-style checkpoints. Dropout acts on the hidden values.

    Args:
        d_model: width of the input, in features.
        d_hidden: width after gating, never rescaled. None is the width at equal parameters, see
            `hidden_size`.
        variant: a name of the table, or an alias.
        d_out: width of the output; None is d_model.
        bias: whether every projection has a bias.
        dropout: probability of dropping a hidden value while training.
        device, dtype: as in `torch.nn.Linear`.
        learnable: "layer" or True for one learned value of each learnable parameter, "unit" for
            one per hidden unit, False for none, None for what the variant's source does.
        save, tile, backend: what backward keeps, how many tokens it works on at a time, and the
            way that is taken; as in `functional.gated_linear`.
        **parameters: values of the variant's parameters (the starting values when learned).

    The children's weights are read by one operator. A child that is not a plain `nn.Linear` (a
    hook, an adapter, a quantised layer) is called instead, and so are all while dropout acts.

    Shapes: (..., d_model) to (..., d_out).

    Raises:
        UnknownVariant, ParameterError, SettingError: a wrong argument.
        ShapeError: an input whose last size is not d_model.

    Source: Shazeer 2020 (arXiv 2002.05202), equations 1 to 6.

    >>> layer = FeedForward(64, variant="swiglu")
    >>> layer(torch.zeros(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    >>> list(layer.state_dict())
    ['gate_proj.weight', 'up_proj.weight', 'down_proj.weight']
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    _shared_by = 1  # processes that share the hidden units

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        variant: str | Variant = "swiglu",
        d_out: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        learnable: Learnable = None,
        save: Save = "gate_up",
        tile: int | None = None,
        backend: str = "auto",
        **parameters: float,
    ) -> None:
        super().__init__()
        row = get_variant(variant)
        check_options(save, tile, backend)
        self.save: Save = save
        self.tile = tile
        self.backend = backend
        check_size("d_model", d_model)
        d_hidden = hidden_size(d_model, variant=row) if d_hidden is None else d_hidden
        d_out = d_model if d_out is None else d_out
        check_size("d_hidden", d_hidden)
        check_size("d_out", d_out)
        if not 0.0 <= dropout < 1.0:
            raise SettingError(f"dropout is {dropout}: it must be at least 0 and below 1")
        self.dropout = dropout
        self._set_variant(row, parameters, learnable, d_hidden, device, dtype)
        for name in row.projections:
            linear = nn.Linear(d_model, d_hidden, bias=bias, device=device, dtype=dtype)
            self.add_module(name, linear)
        self.down_proj = nn.Linear(d_hidden, d_out, bias=bias, device=device, dtype=dtype)
        self._roles = _own_roles(row, d_model, d_hidden, d_out)
        self._reset_learned()

    @property
    def d_model(self) -> int:
        """The width of the input, as the weights have it now."""
        return widths(self, self._roles.up)[0]

    @d_model.setter
    def d_model(self, value: object) -> None:
        raise _not_set("d_model", value)

    @property
    def d_hidden(self) -> int:
        """The width after gating, as the weights have it now."""
        width = widths(self, self._roles.up)[1]
        return width // 2 if self._roles.order else width

    @d_hidden.setter
    def d_hidden(self, value: object) -> None:
        raise _not_set("d_hidden", value)

    @property
    def d_out(self) -> int:
        """The width of the output, as the weights have it now."""
        down = self._roles.down
        return self.d_hidden if down is None else widths(self, down)[1]

    @d_out.setter
    def d_out(self, value: object) -> None:
        raise _not_set("d_out", value)

    def reset_parameters(self) -> None:
        """Draws every matrix anew, each as `torch.nn.Linear` does, gate, up, down in that order."""
        for projection in self._roles.projections:
            child: Any = at(self, projection.path)
            child.reset_parameters()
        self._reset_learned()

    def forward(self, x: Tensor) -> Tensor:
        roles = self._roles
        if roles.before:
            x = self._through(roles.before, x)
        followed = is_followed(x)
        weights = self._operands(followed)
        if not (followed or x.is_nested):
            d_model = self.d_model if isinstance(weights, str) else weights.gate.shape[-1]
            shape = x.shape
            if not shape or shape[-1] != d_model:
                raise ShapeError(f"x is {tuple(shape)}: its last size must be d_model, {d_model}")
        if isinstance(weights, str) or (followed and not all(map(_is_read_by_fx, weights))):
            y = self._by_modules(x)
        else:
            y = functional.layer(
                x,
                weights,
                self.variant,
                self.activation_parameters() if self._learned_at else self._start,
                self.save,
                self.tile,
                self.backend,
            )
        return self._through(roles.after, y) if roles.after else y

    def _operands(self, followed: bool = False, apart: bool = True) -> Weights | str:
        """What the operator reads by the roles, or why the projections are called instead.

        `followed` says that torch.fx writes a graph, in which dropout may act at another time.
        Without `apart` a weight that holds gate and up stands for both.
        """
        roles = self._roles
        if roles.dropout and self.dropout and (self.training or followed):
            return "dropout acts between the projections"
        if roles.gate_scale != 1.0 or roles.output_scale != 1.0:
            return "it has multipliers"
        if hooked():
            return "a hook on all modules is to see the projections called"
        for path in roles.hidden:
            if not _silent(at(self, path)):
                return f"{'.'.join(path)} acts between the projections"
        up = read(self, roles.up)
        if up is None:
            return _why_called(roles.up)
        gate: Affine | None = None
        if roles.gate is not None:
            gate = read(self, roles.gate)
            if gate is None:
                return _why_called(roles.gate)
        elif roles.order is not None:
            gate, up = halves(up, roles.order) if apart else (up, up)
        up_weight, up_bias = up
        down_weight = down_bias = None
        if roles.down is not None:
            down = read(self, roles.down)
            if down is None:
                return _why_called(roles.down)
            down_weight, down_bias = down
        if gate is None:
            return Weights(up_weight, None, down_weight, up_bias, None, down_bias)
        gate_weight, gate_bias = gate
        return Weights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)

    def _by_modules(self, x: Tensor) -> Tensor:
        roles = self._roles
        if self._shared_by > 1:
            _check_shared(self)
        gate: Tensor | None = None
        if roles.gate is not None:
            gate = at(self, roles.gate.path)(x)
        up: Tensor = at(self, roles.up.path)(x)
        parameters = self.activation_parameters()
        if self._learned_at or roles.order is not None:
            weight = sharded.sharded_matrix(at(self, roles.up.path).parameters())
            if weight is not None:
                outputs = int(roles.up.transposed)
                if roles.order is not None and not sharded.is_sharded(up):
                    _check_together(weight, outputs, roles.order, up.shape[-1])
                parameters = sharded.values_beside(parameters, up, weight, outputs)
        if roles.order is not None:
            gate, up = functional.split_packed(up, -1, roles.order)
        if gate is None:
            hidden = functional.activation(up, self.variant, **parameters)
        else:
            if roles.gate_scale != 1.0:
                gate = gate * roles.gate_scale
            hidden = functional.gating(gate, up, self.variant, **parameters)
        hidden = self._through(roles.hidden, hidden)
        if roles.dropout and self.dropout:
            training: Any = self.training
            if is_followed(x):  # whether the graph trains when it runs
                training = x.tracer.create_proxy("get_attr", "training", (), {})  # type: ignore[attr-defined]
            hidden = F.dropout(hidden, self.dropout, training)
        if roles.down is not None:
            hidden = at(self, roles.down.path)(hidden)
        return hidden if roles.output_scale == 1.0 else hidden * roles.output_scale

    def _through(self, paths: tuple[Path, ...], x: Tensor) -> Tensor:
        for path in paths:
            x = at(self, path)(x)
        return x

    def why_modules(self) -> str | None:
        """Why the children are called one by one; None when their weights are read instead."""
        found = self.why_own_forward() or self._operands(apart=False)
        return found if isinstance(found, str) else None

    def weights(self) -> Weights:
        """The children's weights and biases, in the roles that the operator has for them.

        Raises:
            SettingError: they cannot be read, see `why_modules`.
        """
        found = self._operands()
        if isinstance(found, str):
            raise SettingError(f"the weights cannot be read, call the layer instead: {found}")
        return found

    def extra_repr(self) -> str:
        sizes = f"{self.d_model} -> {self.d_hidden} -> {self.d_out}, {self._describe()}"
        return sizes + (f", dropout={self.dropout}" if self.dropout else "")


class GLU(VariantModule):
    """Gating over one packed input, `phi(gate) * psi(up)`; the default is `torch.nn.GLU`.

    Args:
        variant: a gated name.
        dim: the packed dimension.
        order: where the gate is: "up_gate" (second half, torch.nn.GLU's), "gate_up" (first half)
            or "interleaved".
        learnable: True for a learned value of each learnable parameter.
        **parameters: values of the variant's parameters.

    Shapes: an even size along `dim` becomes half of it.

    Raises:
        UnknownVariant, ParameterError: a wrong argument.
        ShapeError: an odd size along `dim`.

    Source: Dauphin et al. 2016 (arXiv 1612.08083), equation 1.

    >>> GLU()(torch.tensor([3.0, 0.0]))
    tensor([1.5000])
    """

    def __init__(
        self,
        variant: str | Variant = "glu",
        *,
        dim: int = -1,
        order: Order = "up_gate",
        learnable: Learnable = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **parameters: float,
    ) -> None:
        super().__init__()
        row = get_variant(variant)
        if not row.gated:
            raise ParameterError(f"{row.name!r} has no gate, so there is nothing packed to split")
        if order not in ORDERS:
            raise ParameterError(f"order is {order!r}: it must be one of {', '.join(ORDERS)}")
        self.dim = dim
        self.order: Order = order
        self._set_variant(row, parameters, learnable, None, device, dtype)
        self._reset_learned()

    def forward(self, x: Tensor) -> Tensor:
        return functional.glu(
            x, self.dim, variant=self.variant, order=self.order, **self.activation_parameters()
        )

    def extra_repr(self) -> str:
        return f"{self._describe()}, dim={self.dim}, order={self.order!r}"


class Swish(VariantModule):
    """`x sigmoid(beta x)`, beta fixed, learned, or learned per channel.

    Args:
        beta: its value, or its starting value.
        learnable: whether it is learned.
        num_parameters: how many are learned: 1, or the number of channels.
        dim: the dimension that holds the channels, 1 for images and sequences of convolutions.

    Shapes: any, unchanged; size `num_parameters` along `dim` if that is not 1.

    Raises:
        SettingError: several parameters that are not learned.
        ShapeError: an input without that many channels.

    Source: Ramachandran et al. 2017 (arXiv 1710.05941), section 4.

    >>> Swish()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7311])
    """

    def __init__(
        self,
        beta: float = 1.0,
        *,
        learnable: bool = False,
        num_parameters: int = 1,
        dim: int = -1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_parameters", num_parameters)
        if num_parameters > 1 and not learnable:
            raise SettingError(
                f"num_parameters is {num_parameters}, but beta is not learned: set learnable=True"
            )
        self.num_parameters = num_parameters
        self.dim = dim
        granularity: Literal["unit", False] = "unit" if learnable else False
        row = get_variant("swish")
        self._set_variant(row, {"beta": beta}, granularity, num_parameters, device, dtype)
        self._reset_learned()

    def forward(self, x: Tensor) -> Tensor:
        return functional.swish(x, self._beta(x))

    def _beta(self, x: Tensor) -> Value:
        """As it broadcasts against an input."""
        beta = self.activation_parameters()["beta"]
        if isinstance(beta, float):
            return beta
        return along_channels(beta, x, self.dim) if self.num_parameters > 1 else beta.squeeze(0)

    def extra_repr(self) -> str:
        if self.learned is None:
            return f"beta={self._start['beta']:g}"
        count = f", num_parameters={self.num_parameters}, dim={self.dim}"
        return f"beta=learned{count if self.num_parameters > 1 else ''}"


def is_followed(x: object) -> bool:
    """Whether torch.fx writes a graph: what stands there for a tensor has no shape yet.

    >>> is_followed(torch.ones(1))
    False
    """
    return not isinstance(x, Tensor)


def _is_read_by_fx(weight: Tensor | None) -> bool:
    """Whether a graph of torch.fx reads it anew; of a view of a weight it keeps the numbers."""
    return weight is None or isinstance(weight, nn.Parameter)


def along_channels(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Values for each channel, as they broadcast against an input with the channels along `dim`.

    Raises:
        ShapeError: it does not have that many channels.

    >>> along_channels(torch.ones(3), torch.ones(2, 3, 5), 1).shape
    torch.Size([3, 1])
    """
    count = values.numel()
    if not -x.dim() <= dim < x.dim() or x.size(dim) != count:
        shape = "nested" if x.is_nested else tuple(x.shape)
        raise ShapeError(
            f"x is {shape}: it must have {count} channels, one for each beta, along dim {dim}"
        )
    return values.reshape(-1, *[1] * (x.dim() - 1 - dim % x.dim()))


torch.fx.wrap(along_channels)  # to torch.fx it is one call


def _not_set(name: str, value: object) -> AttributeError:
    return AttributeError(
        f"{name} cannot be set to {value!r}: sizes are read from the weights; make another layer, "
        "or change the projections"
    )


def _why_called(projection: Projection) -> str:
    kind = "nn.Linear" if projection.kind is nn.Linear else projection.kind.__name__
    return f"{projection.name} is not a plain {kind}, or has a hook or a forward of its own"


def halves(packed: Affine, order: Order) -> tuple[Affine, Affine]:
    """The gate and the up part of a packed matrix and bias."""
    weight, bias = packed
    if sharded.is_sharded(weight):
        _check_together(weight, 0, order)
    gate, up = functional.split_packed(weight, 0, order)
    if bias is None:
        return (gate, None), (up, None)
    gate_bias, up_bias = functional.split_packed(bias, 0, order)
    return (gate, gate_bias), (up, up_bias)


def _check_together(weight: Any, dim: int, order: Order, width: int = 0) -> None:
    """Raises where gate and up of a unit, packed in a weight, are held by different processes.

    `width` is that of what a projection gave, which may have been put together again.

    Raises:
        SettingError: they are, so that a product of what is here would be of units that differ.
    """
    if width != weight.shape[dim] and sharded.cut_apart(weight, dim, order):
        raise SettingError(
            f"a weight that holds gate and up in the order {order!r} is split over processes as if "
            "it held one matrix, so that no process has both of a unit: use gatedffn.parallelize "
            "or gatedffn.parallel.FeedForwardParallel for this layer, which split each by itself"
        )


def _check_shared(layer: nn.Module) -> None:
    """Raises where a layer that processes share has got parameters that they do not.

    Raises:
        SettingError: it has, as adapters are added.
    """
    for name, parameter in layer.named_parameters():
        if not sharded.is_sharded(parameter):
            raise SettingError(
                f"{name} was added to a layer that processes share, and is a plain tensor: merge "
                "adapters before gatedffn.parallelize, or train them with fully_shard instead"
            )


def _silent(module: nn.Module) -> bool:
    """Whether a module on the hidden values changes nothing now."""
    if type(module) is nn.Dropout:
        return is_untouched(module, nn.Dropout) and not (module.training and module.p)
    return is_untouched(module, nn.Identity)


def _own_roles(row: Variant, d_model: int, d_hidden: int, d_out: int) -> Roles:
    """The roles of the children that `FeedForward` makes itself."""
    named = {name: Projection((name,), nn.Linear, d_model, d_hidden) for name in row.projections}
    return Roles(
        gate=named.get("gate_proj"),
        up=named["up_proj"],
        down=Projection(("down_proj",), nn.Linear, d_hidden, d_out),
        dropout=True,
    )


def _granularity(row: Variant, learnable: Learnable) -> Granularity | None:
    if learnable is None:
        return row.learned
    if learnable is False:
        return None
    if learnable not in (True, "layer", "unit"):
        raise ParameterError(
            f"learnable is {learnable!r}: it must be True, False, 'layer', 'unit' or None"
        )
    if not any(parameter.learnable for parameter in row.parameters):
        raise ParameterError(f"{row.name!r} has no learnable parameter: leave learnable out")
    return "unit" if learnable == "unit" else "layer"
