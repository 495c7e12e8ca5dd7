"""`explain`: which way a layer or a gate would be computed, and why not another."""

import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn import native
from gatedffn.activations import Value
from gatedffn.errors import SettingError, ShapeError
from gatedffn.layers import GLU, FeedForward, Swish, halves
from gatedffn.ops import kernels
from gatedffn.ops.feed_forward import Weights, feed_forward
from gatedffn.ops.operator import Call
from gatedffn.ops.plan import Plan
from gatedffn.ops.sharded import is_sharded
from gatedffn.roles import Affine, Projection, at
from gatedffn.variants import VARIANTS


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would run for a layer: the plan for inference and one for each half of training.

    `path` is "operator" when the children's weights are read; "modules" when the children are
    called; "own forward" when a replaced block computes as it did before, or a layer was given
    another forward; with the reason in `why`.
    `sharded` says how several processes share the layer, if they do; plans are for what this one
    computes in a step.
    `kernels` is what the operator has on a CPU: prebuilt or compiled here, or why there are none.
    """

    name: str
    layer: str
    path: str
    why: str | None
    plans: Mapping[str, Plan]
    kernels: str | None = None
    sharded: str | None = None

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(_data(self), indent=2)

    def __str__(self) -> str:
        return self._text(self.name)

    def _text(self, name: str) -> str:
        path = self.path + (f", since {self.why}" if self.why else "")
        path += f"; {self.sharded}" if self.sharded else ""
        lines = [f"{name} ({self.layer}): {path}"]
        for stage, plan in self.plans.items():
            lines.append(f"  {stage}: {plan.chosen} ({plan.reason})")
            for way, milliseconds in plan.milliseconds.items():
                lines.append(f"    {way}: {milliseconds:.3f} ms")
            for way, reason in plan.against.items():
                lines.append(f"    not {way}: {reason}")
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
    return {**words, "plans": plans}


class Explanations(list[Explanation]):
    """One for every layer that a model holds; prints as text, layers that are alike once."""

    def to_json(self) -> str:
        """All of them as JSON."""
        return json.dumps([_data(each) for each in self], indent=2)

    def __str__(self) -> str:
        alike: dict[str, list[Explanation]] = {}
        for each in self:
            alike.setdefault(each._text(""), []).append(each)
        return "\n".join(some[0]._text(_names(some)) for some in alike.values())


def _names(some: list[Explanation]) -> str:
    """The names of layers that are alike: the first and the last, and how many there are."""
    if len(some) < 3:
        return ", ".join(each.name for each in some)
    return f"{some[0].name} ... {some[-1].name}, {len(some)} alike"


def explain(module: nn.Module, x: Tensor | None = None, *, tokens: int = 1) -> Explanations:
    """Which way every `FeedForward` in a module would be computed, and the reasons.

    The plan is the one that a call runs, and is made as a call makes it: where a choice has not
    been measured yet, it is measured now. In training it is for the gradients of the input and of
    the weights that require one. In a module without a `FeedForward` it is every `GLU` and `Swish`.

    Args:
        module: a `FeedForward`, `GLU` or `Swish`, or a model that holds some.
        x: an input of the layers, (..., d_model). None is a random one, for a `FeedForward`.
        tokens: of the random input.

    Returns: a list with `str()` for people and `to_json()` for programs.

    Raises:
        SettingError: the module holds none of these, `tokens` is below 1, or a `GLU` or `Swish`,
            which takes any size, got no `x`.
        ShapeError: an `x` that does not fit to one of the layers, or is empty.

    >>> found = explain(FeedForward(8, variant="relu"))
    >>> found[0].path
    'operator'
    """
    if tokens < 1:
        raise SettingError(f"tokens is {tokens}: it must be at least 1")
    layers = {n: m for n, m in module.named_modules() if isinstance(m, FeedForward)}
    if layers:
        return Explanations(
            _layer(module, name, layer, x, tokens) for name, layer in layers.items()
        )
    gates = {n: m for n, m in module.named_modules() if isinstance(m, GLU | Swish)}
    if not gates:
        raise SettingError(
            f"{type(module).__name__} holds no FeedForward, GLU or Swish: there is nothing to say; "
            "gatedffn.replace puts FeedForward in the place of a model's own blocks"
        )
    if x is None:
        raise SettingError("a GLU or a Swish takes inputs of any size: give one as x")
    return Explanations(_gate(name, gate, x) for name, gate in gates.items())


def _own_forward(module: FeedForward | GLU | Swish) -> str | None:
    given = vars(module).get("forward")
    # A wrapper that says what it wraps, as those that move weights do, calls it.
    if given is not None and inspect.unwrap(given) != MethodType(type(module).forward, module):
        return "a forward was set on it"
    return module.why_own_forward()


def _gate(name: str, module: GLU | Swish, x: Tensor) -> Explanation:
    row = VARIANTS[module.variant]
    if (own := _own_forward(module)) is not None:
        name = name or type(module).__name__
        return Explanation(name, row.label, "own forward", own, {})
    with torch.enable_grad():
        operator, settings, parameters = module.gating_of(x)
    tensors = (x, None)[: len(operator.operands)]
    learned = [n for n, v in parameters.items() if isinstance(v, Tensor)]
    wanted = [operator.operands[0], *learned]
    plans = operator.plans(tensors, Call(row, parameters, settings), wanted)
    size = f"{row.label} of {' x '.join(map(str, x.shape))}"
    return _of_plans(name, module, size, plans, x)


def _of_plans(
    name: str,
    module: nn.Module,
    size: str,
    plans: Mapping[str, Plan],
    x: Tensor,
    shared: str | None = None,
) -> Explanation:
    had = native.state(kernels.SOURCE) if x.device.type == "cpu" else None
    return Explanation(name or type(module).__name__, size, "operator", None, plans, had, shared)


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


def _shared(model: nn.Module, name: str, layer: FeedForward) -> str | None:
    """How several processes share a layer."""
    words = []
    if layer._shared_by > 1:
        words.append(f"one of {layer._shared_by} parts of the hidden units")
    if _gathers(model, name):
        words.append("weights are sharded at rest and gathered in a step")
    return ", ".join(words) or None


def _layer(
    model: nn.Module, name: str, layer: FeedForward, x: Tensor | None, tokens: int
) -> Explanation:
    row = VARIANTS[layer.variant]
    size = f"{row.label}, {layer.d_model} -> {layer.d_hidden} -> {layer.d_out}"
    own = _own_forward(layer)
    if (reason := own or layer.why_modules()) is not None:
        path = "modules" if own is None else "own forward"
        return Explanation(name or type(layer).__name__, size, path, reason, {})
    held = [at(layer, p.path)._parameters["weight"] for p in layer._roles.projections]
    if any(is_sharded(w) or (w is not None and w.dim() != 2) for w in held):
        weights, parameters = _in_a_step(layer)
    else:
        weights = layer.weights()
        with torch.enable_grad():  # as a step of training makes them
            parameters = layer.activation_parameters()
    like = weights.gate
    if (
        x is not None
        and not x.is_nested
        and (x.dim() == 0 or x.shape[-1] != layer.d_model or not x.numel())
    ):
        raise ShapeError(
            f"x is {tuple(x.shape)}: its last size must be d_model, {layer.d_model}, and it must "
            "hold a token"
        )
    if x is None:
        x = torch.randn(tokens, layer.d_model, dtype=like.dtype, device=like.device)
    trained = [n for n, w in weights._asdict().items() if w is not None and w.requires_grad]
    wanted = ["x", *trained, *(n for n, v in parameters.items() if isinstance(v, Tensor))]
    call = Call(row, parameters, (layer.save, layer.tile), layer.backend)
    plans = feed_forward.plans((x, *weights), call, wanted)
    return _of_plans(name, layer, size, plans, x, _shared(model, name, layer))
