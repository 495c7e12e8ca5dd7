"""An operator: what PyTorch is told of it, and the one path that a call takes to its plan.

Each is registered as `gatedffn::NAME`, `gatedffn::NAME_saving` where forward keeps more than its
operands, and `gatedffn::NAME_backward`, so that compilers, modes and profilers see it. The
parameters of a row travel there either all as numbers (`fixed`) or, when one of them is a tensor,
all as tensors (`learned`), in the order of the row: a schema has no list of tensors and numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.errors import BackendError
from gatedffn.ops import gpu, kernels, measure, plan
from gatedffn.ops.plan import Plan, Table
from gatedffn.ops.spec import (
    PLAIN,
    Facts,
    Spec,
    batched,
    facts,
    matrices,
    named_values,
    transformed,
    values_of,
    watched,
)
from gatedffn.variants import VARIANTS, Variant

Tensors = Sequence[Tensor | None]
Parameters = Mapping[str, Value]
_LIBRARY = torch.library.Library("gatedffn", "FRAGMENT")
_DEVICES = ("CPU", "CUDA")


class Entry(NamedTuple):
    """What is kept for equal calls: the plan, and what to call with the tensors."""

    plan: Plan | None
    run: Callable[..., Any]


KEPT = 1 << 14  # calls, each of which takes a kilobyte or two
_entries: dict[Facts, Entry] = {}


def forget_plans() -> None:
    """Drops the plans of this process: each call is looked at again."""
    _entries.clear()


class Operator:
    """An operator of the library.

    Args:
        name: in PyTorch's register.
        operands: names of the tensors, "?" behind those that may be missing.
        settings: the rest of its schema, such as "str save, int? tile".
        table: the ways to compute it.
        definition: the same in plain PyTorch, a function of (tensors, row, parameters, settings).
        gradients: the gradients that are wanted by differentiable formulas, a function of (grad,
            tensors, row, parameters, settings, wanted).
        check: raises unless the tensors, parameters and settings fit together.
        result: an empty result.
        saved: empty tensors like those that forward keeps; None where it keeps its operands alone.
        autocasts: whether autocast casts its operands, as it does those of a linear layer.
        formula: why a compiler is shown the definition in place of the operator, if it is.
    """

    def __init__(
        self,
        name: str,
        operands: str,
        settings: str,
        *,
        table: Table,
        definition: Callable[..., Tensor],
        gradients: Callable[..., list[Tensor]],
        check: Callable[..., None],
        result: Callable[..., Tensor],
        formula: Callable[[Tensors], str | None],
        saved: Callable[..., list[Tensor]] | None = None,
        autocasts: bool = False,
    ) -> None:
        self.name, self.table, self.check = name, table, check
        self.definition, self.gradients = definition, gradients
        self.operands = tuple(operand.rstrip("?") for operand in operands.split())
        self._formula, self._autocasts = formula, autocasts
        self._keeps = saved
        given = ", ".join(
            f"Tensor{'?' * o.endswith('?')} {o.rstrip('?')}" for o in operands.split()
        )
        given += ", Tensor[] learned, float[] fixed, str variant"
        rest = ", ".join(filter(None, (settings, "str backend")))
        _LIBRARY.define(f"{name}({given}, {rest}) -> Tensor")
        _LIBRARY.define(
            f"{name}_backward(Tensor grad, Tensor[] saved, {given}, str[] wanted, {rest}) "
            "-> Tensor[]"
        )
        register = partial(torch.library.register_fake, lib=_LIBRARY)
        for device in _DEVICES:
            _LIBRARY.impl(name, self._kernel, device)
            _LIBRARY.impl(f"{name}_backward", self._backward_kernel, device)
        _LIBRARY.impl(name, self._autograd, "Autograd")
        register(f"gatedffn::{name}", partial(self._fake, result))
        register(f"gatedffn::{name}_backward", self._fake_backward)
        self._op = getattr(torch.ops.gatedffn, name).default
        self._backward_op = getattr(torch.ops.gatedffn, f"{name}_backward").default
        self._saving_op = None
        if saved is not None:
            _LIBRARY.define(f"{name}_saving({given}, {rest}) -> Tensor[]")
            for device in _DEVICES:
                _LIBRARY.impl(f"{name}_saving", self._saving_kernel, device)
            register(f"gatedffn::{name}_saving", partial(self._fake_saving, result, saved))
            self._saving_op = getattr(torch.ops.gatedffn, f"{name}_saving").default

    # A call

    def __call__(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...] = (),
        backend: str = "auto",
    ) -> Tensor:
        """The result; `parameters` are all of the row, in order, numbers as floats."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, row, parameters, settings, backend)
        try:
            if transformed() or watched():
                return self._observed(tensors, row, parameters, settings, backend)
            if self._autocasts and torch._C._is_any_autocast_enabled() and _casts(tensors):
                return self._autocast(tensors, row, parameters, settings, backend)
            key, needs = self._key(tensors, row, parameters, settings, backend)
            entry = _entries.get(key)
            if entry is None:
                entry = self._entry(key, needs, tensors, row, parameters, settings, backend)
            return entry.run(tensors, parameters)  # type: ignore[no-any-return]
        except (kernels.Unreadable, _Unusual):
            return self._observed(tensors, row, parameters, settings, backend)

    def _key(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
    ) -> tuple[Facts, tuple[bool, ...]]:
        """All that a plan depends on, and of which tensors a gradient is needed."""
        values = tuple(parameters.values())
        learned = [value for value in values if isinstance(value, Tensor)]
        needs: tuple[bool, ...] = ()
        if torch.is_grad_enabled():
            needs = tuple([t is not None and t.requires_grad for t in (*tensors, *learned)])
            if True not in needs:
                needs = ()
        try:
            key = (
                self.name, row.name, tensors[0].device, facts(tensors),  # type: ignore[union-attr]
                values_of(parameters) if learned else values, needs, settings, backend,
                torch.get_num_threads(), torch._C._get_deterministic_algorithms(),
            )  # fmt: skip
        except (RuntimeError, AttributeError) as error:  # sparse, nested; no tensor at all
            raise _Unusual from error
        return key, needs

    def _entry(
        self,
        key: Facts,
        needs: tuple[bool, ...],
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
    ) -> Entry:
        self.check(tensors, row, parameters, settings, backend)
        if not _plain((*tensors, *parameters.values())):
            raise _Unusual
        stage = "forward" if needs else "inference"
        decided = self._plan(stage, tensors, row, parameters, settings, backend)
        run = decided.run
        if needs and not decided.differentiable:
            fixed, names = _fixed(parameters), tuple(row.defaults)
            run = _Call(self, row, names, fixed, settings, backend, decided).run
        entry = Entry(decided, run)
        if decided.lasting:
            if len(_entries) >= KEPT:
                _entries.clear()
            _entries[key] = entry
        return entry

    def _spec(
        self,
        stage: str,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        wanted: tuple[str, ...] = (),
        given: Sequence[Tensor] = (),
    ) -> Spec:
        x = tensors[0]
        assert x is not None
        return Spec(
            row.name,
            stage,
            x.device,
            "gpu" if gpu.takes(x) else x.device.type,
            matrices(facts(tensors)),
            named_values(values_of(parameters)),
            settings,
            wanted,
            tuple(m for m in matrices(facts(given)) if m is not None),
            torch.get_num_threads(),
        )

    def _plan(
        self,
        stage: str,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
        wanted: tuple[str, ...] = (),
        given: Sequence[Tensor] = (),
    ) -> Plan:
        spec = self._spec(stage, tensors, row, parameters, settings, wanted, given)
        arguments = (tensors, parameters)
        if stage == "backward":
            arguments = (given[0], given[1:], *arguments)  # type: ignore[assignment]
        finish: Callable[[], None] | None = measure.nothing
        if spec.place == "gpu":
            finish = None if gpu.capturing() else partial(gpu.finish, spec.device)
        return plan.plan(self.table, spec, backend, lambda run: partial(run, *arguments), finish)

    def plans(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...] = (),
        backend: str = "auto",
        wanted: Sequence[str] = (),
    ) -> dict[str, Plan]:
        """The plans that calls with these tensors use: in inference, and in a training step for
        the gradients that are wanted.
        """
        if self._autocasts and _casts(tensors):
            tensors = _cast(tensors)
        tensors = [
            None if t is None else t.detach().requires_grad_(name in wanted)
            for name, t in zip(self.operands, tensors, strict=True)
        ]
        found = {}
        for stage in ("inference", "training, forward"):
            with torch.set_grad_enabled(stage != "inference"):
                key, needs = self._key(tensors, row, parameters, settings, backend)
                entry = _entries.get(key)
                if entry is None:
                    entry = self._entry(key, needs, tensors, row, parameters, settings, backend)
            assert entry.plan is not None
            found[stage] = entry.plan
        forward = found["training, forward"]
        found["training, backward"] = forward
        if not forward.differentiable:
            with torch.no_grad():
                y, *saved = forward.run(tensors, parameters)
                names = tuple(w for w in wanted if w in self.operands or w in parameters)
                found["training, backward"] = self._backward_entry(
                    torch.ones_like(y), saved, tensors, row, parameters, names, settings, backend
                ).plan  # type: ignore[assignment]
        return found

    # A call that something sees or changes on its way

    def _traced(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
    ) -> Tensor:
        """What a compiler is shown."""
        self.check(tensors, row, parameters, settings, backend)
        reason = self._formula(tensors)
        if torch.compiler.is_exporting():
            reason = "an exported graph holds PyTorch's own operators alone"
        if backend == "definition" or (reason is not None and backend == "auto"):
            return self.definition(tensors, row, parameters, settings)
        if reason is not None and torch.compiler.is_exporting():
            raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        return self._dispatched(tensors, row, parameters, settings, backend)

    def _observed(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
    ) -> Tensor:
        self.check(tensors, row, parameters, settings, backend)
        reason = self._why_definition(tensors, row, parameters, settings)
        if reason is not None and backend not in ("auto", "definition"):
            raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        if reason is not None or backend == "definition":
            return self.definition(tensors, row, parameters, settings)
        if self._autocasts and _casts(tensors):
            tensors = _cast(tensors)
        return self._dispatched(tensors, row, parameters, settings, backend)

    def _why_definition(
        self, tensors: Tensors, row: Variant, parameters: Parameters, settings: tuple[Any, ...]
    ) -> str | None:
        if transformed():
            return "torch.func and forward-mode differentiation see through the definition alone"
        if torch.compiler.is_exporting():
            return "an exported graph holds PyTorch's own operators alone"
        try:
            return self.table.why_definition(
                self._spec("inference", tensors, row, parameters, settings)
            )
        except RuntimeError:
            return "a tensor is sparse or nested"

    def _autocast(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
    ) -> Tensor:
        device = tensors[0].device.type  # type: ignore[union-attr]
        if backend == "definition":
            return self._observed(tensors, row, parameters, settings, backend)
        tensors = _cast(tensors)
        with torch.autocast(device, enabled=False):
            return self(tensors, row, parameters, settings, backend)

    def _dispatched(
        self,
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        settings: tuple[Any, ...],
        backend: str,
    ) -> Tensor:
        """The call through PyTorch's dispatcher."""
        learned, fixed = split(parameters, tensors[0])  # type: ignore[arg-type]
        made: Tensor = self._op(*tensors, learned, fixed, row.name, *settings, backend)
        return made

    # What the dispatcher calls

    def _opened(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        count = len(self.operands)
        learned, fixed, variant, *settings, backend = arguments[count:]
        row = VARIANTS[variant]
        parameters = join(tuple(row.defaults), learned, fixed)
        return list(arguments[:count]), row, parameters, tuple(settings), backend

    def _kernel(self, *arguments: Any) -> Tensor:
        tensors, row, parameters, settings, backend = self._opened(arguments)
        self.check(tensors, row, parameters, settings, backend)
        with _as_it_is(tensors[0]):
            decided = self._plan("inference", tensors, row, parameters, settings, backend)
            made: Tensor = decided.run(tensors, parameters)
        return made

    def _saving_kernel(self, *arguments: Any) -> list[Tensor]:
        tensors, row, parameters, settings, backend = self._opened(arguments)
        self.check(tensors, row, parameters, settings, backend)
        with _as_it_is(tensors[0]):
            decided = self._plan("forward", tensors, row, parameters, settings, backend)
            made = decided.run(tensors, parameters)
        if decided.differentiable:
            assert self._keeps is not None
            raise BackendError(f"nothing here saves what backward needs: {decided.reason}")
        return list(made)

    def _backward_kernel(self, grad: Tensor, saved: list[Tensor], *arguments: Any) -> list[Tensor]:
        count = len(self.operands) + 3
        wanted = tuple(arguments[count])
        given = (*arguments[:count], *arguments[count + 1 :])
        tensors, row, parameters, settings, backend = self._opened(given)
        self.check(tensors, row, parameters, settings, backend)
        with _as_it_is(tensors[0]):
            decided = self._plan(
                *("backward", tensors, row, parameters, settings, backend, wanted),
                (grad, *saved),
            )
            return list(decided.run(grad, saved, tensors, parameters))

    def _autograd(self, *arguments: Any) -> Tensor:
        tensors, row, parameters, settings, backend = self._opened(arguments)
        if torch.is_grad_enabled() and _differentiable((*tensors, *parameters.values())):
            names, fixed = tuple(row.defaults), _fixed(parameters)
            call = _Call(self, row, names, fixed, settings, backend, None)
            return call.run(tensors, parameters)
        with torch._C._AutoDispatchBelowAutograd():
            made: Tensor = self._op(*arguments)
            return made

    def _fake(self, result: Callable[..., Tensor], *arguments: Any) -> Tensor:
        tensors, _, _, settings, _ = self._opened(arguments)
        return result(tensors, settings)

    def _fake_saving(
        self,
        result: Callable[..., Tensor],
        saved: Callable[..., list[Tensor]],
        *arguments: Any,
    ) -> list[Tensor]:
        tensors, _, _, settings, _ = self._opened(arguments)
        return [result(tensors, settings), *saved(tensors, settings)]

    def _fake_backward(self, _grad: Tensor, _saved: list[Tensor], *arguments: Any) -> list[Tensor]:
        count = len(self.operands) + 3
        tensors, _, parameters, _, _ = self._opened((*arguments[:count], *arguments[count + 1 :]))
        sources: dict[str, Any] = {**parameters, **dict(zip(self.operands, tensors, strict=True))}
        return [sources[name].new_empty(sources[name].shape) for name in arguments[count]]

    # Backward

    def _backward_entry(
        self,
        grad: Tensor,
        saved: Sequence[Tensor],
        tensors: Tensors,
        row: Variant,
        parameters: Parameters,
        wanted: tuple[str, ...],
        settings: tuple[Any, ...],
        backend: str,
    ) -> Entry:
        key = (
            self.name, row.name, tensors[0].device, facts((grad, *tensors, *saved)),  # type: ignore[union-attr]
            values_of(parameters), wanted, settings, backend,
            torch.get_num_threads(), torch._C._get_deterministic_algorithms(),
        )  # fmt: skip
        entry = _entries.get(key)
        if entry is None:
            if not _plain((grad, *tensors, *saved, *parameters.values())):
                raise _Unusual
            decided = self._plan(
                *("backward", tensors, row, parameters, settings, backend, wanted),
                (grad, *saved),
            )
            entry = Entry(decided, decided.run)
            if decided.lasting:
                _entries[key] = entry
        return entry

    def backward(
        self,
        call: "_Call",
        grad: Tensor,
        saved: Sequence[Tensor],
        tensors: Tensors,
        parameters: Parameters,
        wanted: tuple[str, ...],
    ) -> list[Tensor]:
        """The gradients that are wanted, in that order."""
        _, row, _, _, settings, backend, decided = call
        if torch.is_grad_enabled() or batched(grad):
            return self.gradients(grad, tensors, row, parameters, settings, wanted)
        if decided is not None and not watched():
            try:
                entry = self._backward_entry(
                    grad, saved, tensors, row, parameters, wanted, settings, backend
                )
                made: list[Tensor] = entry.run(grad, saved, tensors, parameters)
                return made
            except (kernels.Unreadable, _Unusual):
                pass  # the dispatcher's own fallbacks make them readable
        learned, fixed = split(parameters, grad)
        found: list[Tensor] = self._backward_op(
            grad, list(saved), *tensors, learned, fixed, row.name, list(wanted), *settings, backend
        )
        return found


class _Unusual(Exception):
    """A call whose tensors are not PyTorch's own with their numbers in memory."""


class _Call(NamedTuple):
    """A call that autograd follows, without its tensors; `plan` where it goes by no dispatch."""

    operator: Operator
    row: Variant
    names: tuple[str, ...]
    fixed: tuple[float, ...]
    settings: tuple[Any, ...]
    backend: str
    plan: Plan | None

    def run(self, tensors: Tensors, parameters: Parameters) -> Tensor:
        """The result, with its gradients known to autograd."""
        learned = () if self.fixed else split(parameters, tensors[0])[0]  # type: ignore[arg-type]
        made: Tensor = _Differentiated.apply(self, *tensors, *learned)
        return made

    def saved(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The result and what is kept beside the operands."""
        operator, row, _, _, settings, backend, decided = self
        count = len(operator.operands)
        tensors, learned = arguments[:count], list(arguments[count:])
        if decided is not None:
            made: tuple[Tensor, ...] = decided.run(tensors, join(self.names, learned, self.fixed))
            return made
        given = (*tensors, learned, list(self.fixed), row.name, *settings, backend)
        with torch._C._AutoDispatchBelowAutograd():
            if operator._saving_op is None:
                return (operator._op(*given),)
            return tuple(operator._saving_op(*given))


class _Differentiated(torch.autograd.Function):
    """Saves the operands, the learned parameters, and what the operator says that it keeps."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *arguments: Any) -> Tensor:
        y, *saved = call.saved(arguments)
        ctx.call = call
        ctx.save_for_backward(*arguments, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: _Call = ctx.call
        held = ctx.saved_tensors  # read once: checkpointing hands each of them out a single time
        count = len(call.operator.operands)
        tensors = held[:count]
        learned = held[count : count + (0 if call.fixed else len(call.names))]
        saved = held[count + len(learned) :]
        needs = ctx.needs_input_grad[1:]
        names = (*call.operator.operands, *call.names[: len(learned)])
        wanted = tuple([name for name, needed in zip(names, needs, strict=True) if needed])
        parameters = join(call.names, learned, call.fixed)
        made = call.operator.backward(call, grad, saved, tensors, parameters, wanted)
        gradients = iter(made)
        return (None, *[next(gradients) if needed else None for needed in needs])


# Parameters, autocast


def split(parameters: Parameters, like: Tensor) -> tuple[list[Tensor], list[float]]:
    """The parameters, complete and in order, as (learned, fixed)."""
    values = list(parameters.values())
    fixed = [value for value in values if not isinstance(value, Tensor)]
    if len(fixed) == len(values):
        return [], fixed
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    learned = [
        # Filled there: a copy to a GPU could not be part of a CUDA graph.
        value
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=dtype, device=like.device)
        for value in values
    ]
    return learned, []


def join(
    names: Sequence[str], learned: Sequence[Tensor], fixed: Sequence[float]
) -> dict[str, Value]:
    """The parameters of a row by name."""
    return dict(zip(names, learned or fixed, strict=True))


def _fixed(parameters: Parameters) -> tuple[float, ...]:
    """The parameters where all are numbers."""
    values = tuple(parameters.values())
    if any(isinstance(value, Tensor) for value in values):
        return ()
    return values  # type: ignore[return-value]


def _differentiable(values: Sequence[Value | None]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _plain(values: Sequence[Value | None]) -> bool:
    """Whether all tensors are PyTorch's own, with their numbers where their address says."""
    return all(
        type(value) in PLAIN and not value.is_neg() and (value.is_cpu or value.is_cuda)
        for value in values
        if isinstance(value, Tensor)
    )


def _casts(tensors: Tensors) -> bool:
    """Whether autocast casts what a linear layer is given on this device."""
    x = tensors[0]
    assert x is not None
    return (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(x.device.type)


def _cast(tensors: Tensors) -> Tensors:
    """The tensors as autocast casts those of a linear layer."""
    x = tensors[0]
    assert x is not None
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _as_it_is(x: Tensor) -> Any:
    """Without autocast: what an operator is given by its name, it takes as it is."""
    return torch.autocast(x.device.type, enabled=False)
