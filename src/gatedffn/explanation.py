"""`explain`: which way a layer or a gate would be computed, and why not another."""

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gatedffn import native
from gatedffn.activations import Value
from gatedffn.errors import SettingError, ShapeError
from gatedffn.gain import Gain, closing, gain_of
from gatedffn.layers import GLU, FeedForward, Swish, halves
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import Weights, feed_forward
from gatedffn.ops.operator import Call, Operator, asked
from gatedffn.ops.plan import Plan
from gatedffn.ops.sharded import is_sharded
from gatedffn.ops.spec import PLAIN, Tensors
from gatedffn.roles import Affine, Projection, at, together
from gatedffn.sizing import check_size, experts_touched
from gatedffn.variants import VARIANTS

SLOTS = 2
"""Experts of a token, unless said."""


SIZES: list[Callable[[nn.Module], "tuple[str, int, int, int, int] | None"]] = []
"""What tells the `Sizes` of modules of other libraries that are computed here; None of others."""


@dataclass(frozen=True, slots=True)
class Touched:
    """How many experts tokens go through on average, if each names its own at random, all experts
    alike and each once.
    """

    tokens: int
    slots: int
    experts: int
    mean: float

    def __str__(self) -> str:
        tokens = f"{self.tokens:,} token{'s' * (self.tokens > 1)}"
        return (
            f"{tokens} of {self.slots} experts each go through {self.mean:.1f} of {self.experts} "
            "on average, if all are alike and chosen independently"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would run for a layer: the plan for inference and one for each half of training.

    `path` is "operator" when the children's weights are read; "modules" when the children are
    called; "own forward" when a replaced block computes as it did before, or a layer was given
    another forward; with the reason in `why`.
    `sharded` says how several processes share the layer, if they do; plans are for what this one
    computes in a step.
    `gain` is the time in inference beside that of the code which computed it before, or of the
    layer as one writes it in PyTorch.
    `kernels` is what the operator has on a CPU: prebuilt or compiled here, or why there are none.
    """

    name: str
    layer: str
    path: str
    why: str | None
    plans: Mapping[str, Plan]
    kernels: str | None = None
    touched: Touched | None = None
    sharded: str | None = None
    gain: Gain | None = None

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(_data(self), indent=2)

    def __str__(self) -> str:
        return self._text(self.name)

    def _text(self, name: str) -> str:
        path = self.path + (f", since {self.why}" if self.why else "")
        path += f"; {self.sharded}" if self.sharded else ""
        lines = [f"{name} ({self.layer}): {path}"]
        if self.touched:
            lines.append(f"  {self.touched}")
        for stage, plan in self.plans.items():
            lines.append(f"  {stage}: {plan.chosen} ({plan.reason})")
            for way, milliseconds in plan.milliseconds.items():
                lines.append(f"    {way}: {milliseconds:.3f} ms")
            against: dict[str, list[str]] = {}
            for way, reason in plan.against.items():
                against.setdefault(reason, []).append(way)
            for reason, ways in against.items():
                lines.append(f"    not {', '.join(ways)}: {reason}")
        if self.gain:
            lines.append(f"  {self.gain}")
        if self.kernels:
            lines.append(f"  kernels: {self.kernels}")
        return "\n".join(lines)


def _data(explanation: Explanation) -> dict[str, Any]:
    """As JSON has it: of a plan what it says, and not what it runs."""
    of_plan = ("chosen", "reason", "milliseconds", "against")
    plans = {
        stage: {name: getattr(plan, name) for name in of_plan}
        for stage, plan in explanation.plans.items()
    }
    words = {
        name: getattr(explanation, name)
        for name in ("name", "layer", "path", "why", "kernels", "sharded")
    }
    parts = {
        name: None if (part := getattr(explanation, name)) is None else asdict(part)
        for name in ("touched", "gain")
    }
    return {**words, "plans": plans, **parts}


class Explanations(list[Explanation]):
    """One for every layer that a model holds; prints as text, layers that are alike once."""

    def to_json(self) -> str:
        """All of them as JSON."""
        return json.dumps([_data(each) for each in self], indent=2)

    def __str__(self) -> str:
        alike: dict[str, list[Explanation]] = {}
        for each in self:
            alike.setdefault(each._text(""), []).append(each)
        lines = [some[0]._text(together([each.name for each in some])) for some in alike.values()]
        gains = [each.gain for each in self if each.gain]
        return "\n".join([*lines, *([closing(gains)] if len(self) > 1 and gains else [])])


def explain(
    module: nn.Module, x: Tensor | None = None, *, tokens: int = 1, slots: int | None = None
) -> Explanations:
    """Which way every `FeedForward` and `Experts` in a module would be computed, and the reasons.

    The plan is the one that a call runs, and is made as a call makes it: where a choice has not
    been measured yet, it is measured now. In training it is for the gradients of the input, of
    routing weights, and of the weights that require one. In a module without such layers it is
    every `GLU` and `Swish`. Of experts it also says how many a batch goes through on average.

    Args:
        module: a layer, a `GLU` or `Swish`, or a model that holds some.
        x: an input of the layers, (..., d_model). None is a random one.
        tokens: of the random input.
        slots: how many experts a token goes through, chosen at random; None is 2, or all where
            there are less.

    Returns: a list with `str()` for people and `to_json()` for programs.

    Raises:
        SettingError: the module holds none of these, `tokens` or `slots` is below 1, there are
            less experts than `slots`, or a `GLU` or `Swish`, which takes any size, got no `x`; or
            experts that `experts_implementation="gatedffn"` refuses when they are called.
        ShapeError: an `x` that does not fit to one of the layers, or is empty.

    >>> from gatedffn import FeedForward
    >>> found = explain(FeedForward(8, variant="relu"))
    >>> found[0].path
    'operator'
    """
    if not isinstance(module, nn.Module):
        raise SettingError(
            f"module is {type(module).__name__}: give a layer, or a model that holds some"
        )
    for name, value in (("tokens", tokens), ("slots", slots)):
        if value is not None:
            check_size(name, value)
    layers = {n: m for n, m in module.named_modules() if _sizes(m) is not None}
    if layers:
        gains: dict[str, Gain | None] = {}
        return Explanations(
            _explained(module, name, layer, _inputs(layer, x, tokens, slots), gains)
            for name, layer in layers.items()
        )
    gates = {n: m for n, m in module.named_modules() if isinstance(m, GLU | Swish)}
    if not gates:
        raise SettingError(
            f"{type(module).__name__} holds no FeedForward, Experts, GLU or Swish: there is "
            "nothing to say; gatedffn.replace has a model's own blocks computed as such"
        )
    if x is None:
        raise SettingError("a GLU or a Swish takes inputs of any size: give one as x")
    return Explanations(_explained(module, name, gate, [x]) for name, gate in gates.items())


class Sizes(NamedTuple):
    """What a layer is, in words and widths."""

    variant: str
    d_model: int
    d_hidden: int
    d_out: int
    experts: int | None = None

    def __str__(self) -> str:
        many = "" if self.experts is None else f"{self.experts} experts of "
        return f"{many}{self.d_model} -> {self.d_hidden} -> {self.d_out}"


def _sizes(module: Any) -> Sizes | None:
    """Those of a layer of this library, or of a module that was made one; None of others."""
    if (told := getattr(module, "_gatedffn_sizes", None)) is not None:
        return Sizes(*told())
    if (found := next(filter(None, (tell(module) for tell in SIZES)), None)) is not None:
        return Sizes(*found)
    if not (hasattr(module, "why_own_forward") and hasattr(type(module), "d_hidden")):
        return None
    d_out = getattr(module, "d_out", module.d_model)
    count = getattr(module, "num_experts", None)
    return Sizes(module.variant, module.d_model, module.d_hidden, d_out, count)


def _inputs(layer: Any, x: Tensor | None, tokens: int, slots: int | None) -> list[Tensor]:
    """What a layer is called with: `x` or a random one, and experts by chance."""
    sizes = _sizes(layer)
    assert sizes is not None
    d_model, count = sizes.d_model, sizes.experts
    if x is None:
        like = next(layer.parameters())
        x = torch.randn(tokens, d_model, dtype=like.dtype, device=like.device)
    elif not x.is_nested and (x.dim() == 0 or x.shape[-1] != d_model or not x.numel()):
        raise ShapeError(
            f"x is {tuple(x.shape)}: its last size must be d_model, {d_model}, and it must hold a "
            "token"
        )
    if count is None:
        return [x]
    slots = min(SLOTS, count) if slots is None else slots
    if slots > count:
        raise SettingError(f"slots is {slots}: there are {count} experts")
    odds = torch.rand(*x.shape[:-1], count, device=x.device)
    return [x, odds.topk(slots).indices, torch.full((*x.shape[:-1], slots), 1.0 / slots).to(x)]


def _explained(
    model: nn.Module,
    name: str,
    module: Any,
    inputs: list[Tensor],
    gains: dict[str, Gain | None] | None = None,
) -> Explanation:
    """Of one layer; `gains` has what was measured for those that are alike."""
    x, *routing = inputs
    sizes, touched = _sizes(module), None
    row = VARIANTS[module.variant if sizes is None else sizes.variant]
    size = row.label + (f" of {' x '.join(map(str, x.shape))}" if sizes is None else f", {sizes}")
    if routing:
        assert sizes is not None
        assert sizes.experts is not None
        *batch, slots = routing[0].shape
        tokens = torch.Size(batch).numel()
        mean = experts_touched(sizes.experts, slots, tokens)
        touched = Touched(tokens, slots, sizes.experts, mean)
    shared = _shared(model, name, module)
    name = name or type(module).__name__
    own = _own_forward(module)
    why_modules = getattr(module, "why_modules", None)
    if (reason := own or (why_modules and why_modules())) is not None:
        path = "modules" if own is None else "own forward"
        return Explanation(name, size, path, reason, {}, None, touched, shared)
    operator, tensors, call = _asked(module, inputs)
    named = {**dict(zip(operator.operands, tensors, strict=True)), **call.parameters}
    wanted = [n for n, t in named.items() if isinstance(t, Tensor) and t.requires_grad]
    plans = operator.plans(tensors, call, wanted)
    had = native.state(kernels.SOURCE) if x.device.type == "cpu" else None
    found = Explanation(name, size, "operator", None, plans, had, touched, shared)
    if gains is None or shared is not None or not _is_timed(plans, inputs):
        return found
    kind = f"{type(module).__name__} {x.shape} {x.dtype} {found._text('')}"
    if kind not in gains:
        gains[kind] = gain_of(module, inputs)
    return replace(found, gain=gains[kind])


def _is_timed(plans: Mapping[str, Plan], inputs: list[Tensor]) -> bool:
    """Whether times can be had of a layer, and are wanted: they are of its plans too."""
    plain = all(type(t) in PLAIN and not t.is_nested and (t.is_cpu or t.is_cuda) for t in inputs)
    return plain and any(plan.milliseconds for plan in plans.values())


def _asked(module: Any, inputs: list[Tensor]) -> tuple[Operator, Tensors, Call]:
    """What a module calls in a step of training."""
    given = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    with torch.enable_grad():
        if not isinstance(module, FeedForward):
            called = getattr(module, "_gatedffn_computed", module.forward)
            return _experts_in_a_step(module, *asked(partial(called, *given)))
        # By its weights: a block that was taken over may take more than `x`.
        held = [at(module, p.path)._parameters["weight"] for p in module._roles.projections]
        if any(is_sharded(w) or (w is not None and w.dim() != 2) for w in held):
            weights, parameters = _in_a_step(module)
        else:
            weights, parameters = module.weights(), module.activation_parameters()
    row, settings = VARIANTS[module.variant], (module.save, module.tile)
    return feed_forward, (*given, *weights), Call(row, parameters, settings, module.backend)


def _own_forward(module: Any) -> str | None:
    given = vars(module).get("forward")
    # A wrapper that says what it wraps, as those that move weights do, calls it.
    if given is not None and inspect.unwrap(given) != MethodType(type(module).forward, module):
        return "a forward was set on it"
    why: Callable[[], str | None] | None = getattr(module, "why_own_forward", None)
    return None if why is None else why()


def _gathers(model: nn.Module, name: str) -> bool:
    """Whether a module, or one that it is in, has its weights gathered for a step."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it nobody has wrapped anything
    if fsdp is None:
        return False
    names = name.split(".") if name else []
    outer = [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return any(isinstance(module, kinds) for module in outer)


def _in_a_step(layer: FeedForward) -> tuple[Weights, dict[str, Value]]:
    """What a process computes with in a step, of any numbers: at rest it holds other parts."""
    roles, units = layer._roles, layer.d_hidden // layer._shared_by

    def like(projection: Projection, d_in: int, d_out: int) -> Affine:
        own, bias = (at(layer, projection.path)._parameters[name] for name in ("weight", "bias"))
        assert own is not None
        shape = (d_in, d_out) if projection.transposed else (d_out, d_in)
        made = torch.randn(shape, dtype=own.dtype, device=own.device)
        made.requires_grad_(own.requires_grad)
        zeros = None if bias is None else made.new_zeros(d_out).requires_grad_(bias.requires_grad)
        return made.t() if projection.transposed else made, zeros

    last = like(roles.up, layer.d_model, units * (1 if roles.order is None else 2))
    first: Affine = last
    second: Affine | None = None
    if roles.gate is not None:
        first, second = like(roles.gate, layer.d_model, units), last
    elif roles.order is not None:
        first, second = halves(last, roles.order)
    down = None if roles.down is None else like(roles.down, units, layer.d_out)
    (gate, gate_bias), none = first, (None, None)
    (up, up_bias), (down_weight, down_bias) = second or none, down or none
    weights = Weights(gate, up, down_weight, gate_bias, up_bias, down_bias)
    values: dict[str, Value] = {**layer._start}
    for name, path in layer._learned_at.items():
        raw = getattr(at(layer, path[:-1]), path[-1])
        by_unit = getattr(layer, "learned", None) == "unit" or raw.numel() == layer.d_hidden
        ones = torch.ones(units if by_unit else 1, dtype=raw.dtype, device=raw.device)
        values[name] = ones.requires_grad_()
    return weights, values


def _experts_in_a_step(
    module: Any, operator: Operator, tensors: Tensors, call: Call
) -> tuple[Operator, Tensors, Call]:
    """A call of what is no `FeedForward`, with what a process computes with in a step."""
    parts = getattr(module, "_shared_by", 1)
    by_experts, by_units = (parts, 1) if getattr(module, "_shares_experts", False) else (1, parts)
    units = {"gate": 1, "up": 1, "down": 2, "gate_bias": 1, "up_bias": 1}

    def held(name: str, t: Tensor | None) -> Tensor | None:
        if t is None or not is_sharded(t):
            return t
        shape = [*t.shape]
        shape[0] //= by_experts
        if name in units:
            shape[units[name]] //= by_units
        made = torch.randn(shape, dtype=t.dtype, device=t.device)
        return made.requires_grad_(t.requires_grad)

    def value(v: Value) -> Value:
        if not isinstance(v, Tensor) or not is_sharded(v):
            return v
        size = v.numel() // (1 if v.numel() == 1 else by_units)
        return torch.ones(size, dtype=v.dtype, device=v.device).requires_grad_(v.requires_grad)

    given = [held(name, t) for name, t in zip(operator.operands, tensors, strict=True)]
    values = {name: value(v) for name, v in call.parameters.items()}
    return operator, given, call._replace(parameters=values)


def _shared(model: nn.Module, name: str, layer: Any) -> str | None:
    """How several processes share a layer."""
    words = []
    if (parts := getattr(layer, "_shared_by", 1)) > 1:
        what = "experts" if getattr(layer, "_shares_experts", False) else "hidden units"
        words.append(f"one of {parts} parts of the {what}")
    if _gathers(model, name):
        words.append("weights are sharded at rest and gathered in a step")
    return ", ".join(words) or None
