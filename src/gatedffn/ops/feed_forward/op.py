"""The layer as `torch.library` operators.

`gatedffn::feed_forward` computes it; `feed_forward_saving` also returns gate and up, which is what
training with `save="gate_up"` keeps besides the input; `feed_forward_backward` makes whichever
gradients are wanted. The parameters of a row travel as in `gatedffn.ops.gating.op`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.errors import BackendError, ShapeError
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward import decision, engine, reference, small
from gatedffn.ops.feed_forward.backward import backward
from gatedffn.ops.feed_forward.call import Call
from gatedffn.ops.feed_forward.cpu.ways import SMALL
from gatedffn.ops.feed_forward.decision import Decision
from gatedffn.ops.feed_forward.engine import ways_of
from gatedffn.ops.feed_forward.reference import Weights
from gatedffn.ops.feed_forward.weights import Known, find, readable, remember
from gatedffn.ops.gating.cpu import rows as rows_of
from gatedffn.ops.gating.cpu import unsuited_parameters
from gatedffn.ops.parameters import join, split
from gatedffn.ops.transforms import batched, transformed, watched
from gatedffn.variants import VARIANTS

_CALL = (
    "Tensor x, Tensor gate, Tensor? up, Tensor? down, Tensor? gate_bias, "
    "Tensor? up_bias, Tensor? down_bias, Tensor[] learned, float[] fixed, str variant"
)
BACKENDS = ("auto", "definition", *engine.BACKENDS)
_LIBRARY = torch.library.Library("gatedffn", "FRAGMENT")
_LIBRARY.define(f"feed_forward({_CALL}, str save, int tile, str backend) -> Tensor")
_LIBRARY.define(f"feed_forward_saving({_CALL}, str backend) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"feed_forward_backward(Tensor grad, Tensor? saved_gate, Tensor? saved_up, {_CALL}, "
    "str[] wanted, int tile, str backend) -> Tensor[]"
)
_forward = torch.ops.gatedffn.feed_forward.default
_saving = torch.ops.gatedffn.feed_forward_saving.default
_backward = torch.ops.gatedffn.feed_forward_backward.default


def feed_forward(
    x: Tensor,
    weights: Weights,
    variant: str,
    parameters: dict[str, Value],
    save: str = "gate_up",
    tile: int = 0,
    backend: str = "auto",
    seen: Known | None = None,
) -> Tensor:
    """The layer; `save` and `tile` say what backward keeps and how many tokens it takes at once.

    `seen` is what `known` says of the input and the weights.
    """
    if backend == "definition":
        return reference.feed_forward(x, weights, variant, parameters)
    look = remember
    if _autocast(x):
        x, weights = _as_autocast(x, weights)
        seen, look = None, Known  # the next call casts to tensors of its own
    reason = why_definition(x, weights, parameters, seen)
    if reason is not None:
        if backend != "auto":
            raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        return reference.feed_forward(x, weights, variant, parameters)
    held = weights if seen is None else ()
    if watched() or not all(map(readable, (x, *held, *parameters.values()))):
        learned, fixed = split(parameters, x)
        return _tensor(_forward(x, *weights, learned, fixed, variant, save, tile, backend))
    # The operator's own steps without its dispatch, which costs as much as a small layer.
    call = Call(x, weights, variant, parameters, seen or look(weights))
    if torch.is_grad_enabled() and _differentiable((x, *weights, *parameters.values())):
        if small.suits(call, save, tile, backend):
            return small.feed_forward(call)
        learned, fixed = split(parameters, x)
        settings = Settings(fixed, variant, save, tile, backend, call)
        return _tensor(_Layer.apply(x, *weights, settings, *learned))
    return ways_of(call).forward(call, False, backend)[0]


def known(x: Tensor, weights: Weights) -> Known | None:
    """What is known of weights that a call had before, and that decides about this input too."""
    if torch.compiler.is_compiling() or transformed():
        return None
    found = find(weights)
    return found if found is not None and found.takes(x) else None


def _tensor(made: Any) -> Tensor:
    """What PyTorch's own functions return without a type."""
    assert isinstance(made, Tensor)
    return made


def _differentiable(values: Sequence[Value | None]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def why_definition(
    x: Tensor, weights: Weights, parameters: Mapping[str, Value], seen: Known | None = None
) -> str | None:
    """Why a call is left to the definition; None when the operator takes it."""
    if seen is not None:
        return unsuited_parameters(parameters, seen.d_hidden)
    if transformed():
        return "torch.func and forward-mode differentiation see through the definition alone"
    if x.is_cuda:
        # Of a GPU that is only thought of, nothing else is known; `torch` takes what it lacks.
        missing = gpu.NO_TRITON if watched() else gpu.missing(x.device)
        if missing is not None:
            return missing
    elif not x.is_cpu:
        return f"there is no kernel for {x.device.type}"
    dtype, device = x.dtype, x.device
    for w in (x, *weights):
        if w is None:
            continue
        if w.dtype is not dtype or w.device != device:
            return f"x is {dtype} on {x.device}, a weight {w.dtype} on {w.device}"
        if w.layout is not torch.strided or w.is_nested:
            return "a tensor is sparse or nested"
    if 0 in weights.gate.shape or (weights.down is not None and 0 in weights.down.shape):
        return "a width is 0"
    unsuited = unsuited_parameters(parameters, weights.gate.shape[0])
    if unsuited is not None:
        return unsuited
    if torch.compiler.is_compiling() and _small(weights):
        return "it is small: a compiler joins the formula with what is around it"
    if torch.compiler.is_exporting():
        return "an exported graph holds PyTorch's own operators alone"
    return None


def decide(
    x: Tensor,
    weights: Weights,
    variant: str,
    parameters: dict[str, Value],
    save: str,
    tile: int | None,
    backend: str,
) -> dict[str, Decision]:
    """What `feed_forward` would take for inference and for training, decided as it does.

    In training the gradients are those of the input, of the weights that require one, and of the
    parameters that are tensors.
    """
    stages = ("inference", "training, forward", "training, backward")
    saving = save == "gate_up"
    trained = [n for n, w in weights._asdict().items() if w is not None and w.requires_grad]
    if backend != "definition" and _autocast(x):
        x, weights = _as_autocast(x, weights)
    reason = (
        "it was asked for" if backend == "definition" else why_definition(x, weights, parameters)
    )
    if reason is not None:
        return {stage: Decision("definition", reason, {}, {}) for stage in stages}
    call = Call(x, weights, variant, parameters)
    wanted = ["x", *trained, *(n for n, v in parameters.items() if isinstance(v, Tensor))]
    found = decision.decide(call, wanted, saving, tile or 0, backend)
    if small.suits(call, save, tile or 0, backend):
        found[1:] = (replace(each, chosen="torch", reason=small.REASON) for each in found[1:])
    return dict(zip(stages, found, strict=True))


def _small(weights: Weights) -> bool:
    # By the weights alone: a condition on the tokens would compile anew for another number.
    return weights.gate.numel() < SMALL


def _autocast(x: Tensor) -> bool:
    """Whether autocast casts what a linear layer is given on this device."""
    return (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(x.device.type)


def _as_autocast(x: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
    """The tensors as autocast casts those of a linear layer."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    return cast(x), Weights(*map(cast, weights))


def _call(arguments: Sequence[Any]) -> Call:
    """The arguments of `_CALL` as the ways to compute it take them."""
    x, *tensors, learned, fixed, variant = arguments
    weights = Weights(*tensors)
    seen = known(x, weights)
    if seen is None:
        _check(x, weights, variant)
    return Call(x, weights, variant, join(variant, learned, fixed), seen)


def _check(x: Tensor, weights: Weights, variant: str) -> None:
    """Raises unless the operands fit together: an operator may be called with anything."""
    d_hidden, d_model = weights.gate.shape
    d_out = None if weights.down is None else weights.down.shape[0]
    into = (d_hidden, d_model)
    sizes = (into, into, (d_out, d_hidden), (d_hidden,), (d_hidden,), (d_out,))
    # The kernels trust these sizes.
    given = [(t, size) for t, size in zip(weights, sizes, strict=True) if t is not None]
    if any(t.shape != size for t, size in given) or x.shape[-1] != d_model:
        raise ShapeError("the shapes of the operands do not fit together")
    if any(t.dtype != x.dtype for t, _ in given):
        raise ShapeError("the dtypes of the operands differ")
    if any(t.device != x.device for t, _ in given):
        raise ShapeError("the devices of the operands differ: move them to one")
    if (weights.up is None) == VARIANTS[variant].gated:
        raise ShapeError(f"{variant!r} is given the branches of another kind of variant")


def _width(x: Tensor, gate: Tensor, down: Tensor | None) -> list[int]:
    return [*x.shape[:-1], gate.shape[0] if down is None else down.shape[0]]


def _forward_kernel(*arguments: Any) -> Tensor:
    *given, _save, _tile, backend = arguments
    call = _call(given)
    return ways_of(call).forward(call, False, backend)[0]


def _saving_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    call = _call(given)
    y, gate, up = ways_of(call).forward(call, True, backend)
    assert gate is not None
    return y, gate, y.new_empty(0) if up is None else up


def _backward_kernel(grad: Tensor, *arguments: Any) -> list[Tensor]:
    saved_gate, saved_up, *call, wanted, tile, backend = arguments
    layer = _call(call)
    for tensor, width in (
        (grad, layer.d_out),
        (saved_gate, layer.d_hidden),
        (saved_up, layer.d_hidden),
    ):
        if tensor is None:
            continue
        if tensor.numel() != layer.tokens * width or tensor.dtype != layer.x.dtype:
            raise ShapeError("a gradient or a saved tensor does not fit to the operands")
    # Whoever hands saved tensors out again may have changed their strides.
    saved_gate, saved_up = (None if t is None else rows_of(t) for t in (saved_gate, saved_up))
    rows = rows_of(grad)
    made = backward(layer, rows, (saved_gate, saved_up), wanted, tile, backend)
    x = call[0]
    return [t.view(x.shape) if name == "x" else t for name, t in zip(wanted, made, strict=True)]


def _forward_autograd(*arguments: Any) -> Tensor:
    *call, save, tile, backend = arguments
    if torch.is_grad_enabled() and _differentiable((*call[:7], *call[7])):
        *tensors, learned, fixed, variant = call
        settings = Settings(fixed, variant, save, tile, backend, None)
        return _tensor(_Layer.apply(*tensors, settings, *learned))
    with torch._C._AutoDispatchBelowAutograd():
        return _tensor(_forward(*arguments))


class Settings(NamedTuple):
    """What a layer is called with besides tensors; `call` where it goes by no dispatch."""

    fixed: Sequence[float]
    variant: str
    save: str
    tile: int
    backend: str
    call: Call | None


class _Layer(torch.autograd.Function):
    """Saves the input and, with `save="gate_up"`, gate and up; nothing else of hidden size."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, settings, learned = arguments[:7], arguments[7], arguments[8:]
        fixed, variant, save, tile, backend, call = settings
        gate = up = None
        if call is not None:
            y, gate, up = ways_of(call).forward(call, save == "gate_up", backend)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                if save == "gate_up":
                    y, gate, up = _saving(*tensors, learned, fixed, variant, backend)
                    up = None if tensors[2] is None else up
                else:
                    y = _forward(*tensors, learned, fixed, variant, save, tile, backend)
        # The call holds tensors, which only what is saved may keep alive.
        ctx.settings = settings._replace(call=None)
        ctx.save_for_backward(*tensors, gate, up, *learned)
        return _tensor(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        fixed, variant, _, tile, backend, _ = ctx.settings
        # Read once: activation checkpointing hands each of them out a single time.
        saved = ctx.saved_tensors
        *tensors, gate, up = saved[:9]
        learned = list(saved[9:])
        names = ["x", *Weights._fields, *list(join(variant, learned, fixed))[: len(learned)]]
        needs = [*ctx.needs_input_grad[:7], *ctx.needs_input_grad[8:]]
        wanted = [name for name, needed in zip(names, needs, strict=True) if needed]
        if torch.is_grad_enabled() or batched(grad):
            made = _through_definition(grad, [*tensors, *learned], needs, fixed, variant)
        else:
            direct = not watched() and all(map(readable, (grad, *saved)))
            made = (_backward_kernel if direct else _backward)(
                grad, gate, up, *tensors, learned, fixed, variant, wanted, tile, backend
            )
        found = dict(zip(wanted, made, strict=True))
        gradients = [found.get(name) for name in names]
        return (*gradients[:7], None, *gradients[7:])


def _through_definition(
    grad: Tensor, tensors: list[Any], needs: list[bool], fixed: Sequence[float], variant: str
) -> list[Tensor]:
    """The gradients by differentiating the definition, so that they have derivatives in turn."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of its own for each role: one tensor may have several.
        views: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        x, rest = views[0], views[1:]
        parameters = join(variant, rest[6:], fixed)
        y = reference.feed_forward(x, Weights(*rest[:6]), variant, parameters)
    asked: list[Any] = [t for t, needed in zip([x, *rest], needs, strict=True) if needed]
    return list(torch.autograd.grad(y, asked, grad, create_graph=create_graph))


for _name, _kernel in (
    ("feed_forward", _forward_kernel),
    ("feed_forward_saving", _saving_kernel),
    ("feed_forward_backward", _backward_kernel),
):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _device)
_LIBRARY.impl("feed_forward", _forward_autograd, "Autograd")


@torch.library.register_fake("gatedffn::feed_forward", lib=_LIBRARY)
def _(*arguments: Any) -> Tensor:
    x, gate, _, down, *_ = arguments
    return _tensor(x.new_empty(_width(x, gate, down)))


@torch.library.register_fake("gatedffn::feed_forward_saving", lib=_LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, gate, up, down, *_ = arguments
    tokens, d_hidden = x.numel() // x.shape[-1], gate.shape[0]
    return (
        x.new_empty(_width(x, gate, down)),
        x.new_empty(tokens, d_hidden),
        x.new_empty(0) if up is None else x.new_empty(tokens, d_hidden),
    )


@torch.library.register_fake("gatedffn::feed_forward_backward", lib=_LIBRARY)
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    _, _, x, *weights, learned, fixed, variant, wanted, _tile, _backend = arguments
    sources: dict[str, Any] = join(variant, learned, fixed)
    sources |= {"x": x, **dict(zip(Weights._fields, weights, strict=True))}
    return [sources[name].new_empty(sources[name].shape) for name in wanted]
