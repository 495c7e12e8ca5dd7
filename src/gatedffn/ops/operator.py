"""An operator: what PyTorch is told of it, and the one path that a call takes to its plan.

Each is registered as `gatedffn::NAME`, `gatedffn::NAME_saving` where forward keeps more than its
operands, and `gatedffn::NAME_backward`, so that compilers, modes and profilers see it. The
parameters of a row travel there either all as numbers (`fixed`) or, when one of them is a tensor,
all as tensors (`learned`), in the order of the row: a schema has no list of tensors and numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack

from gatedffn.activations import Value
from gatedffn.errors import BackendError, SettingError, ShapeError
from gatedffn.ops import gpu, kernels, measure, plan, sharded
from gatedffn.ops.plan import Plan, Ways
from gatedffn.ops.spec import (
    PLAIN,
    Facts,
    Parameters,
    Spec,
    Tensors,
    batched,
    facts,
    matrices,
    named_values,
    own_functions,
    surroundings,
    traced,
    transformed,
    value_facts,
    watched,
    without_autocast,
)
from gatedffn.variants import VARIANTS, Variant


class Call(NamedTuple):
    """What a call is beside its tensors: `parameters` are all of the row, in its order."""

    row: Variant
    parameters: Parameters
    settings: tuple[Any, ...] = ()
    backend: str = "auto"


class Entry(NamedTuple):
    """What is kept for equal calls: the plan, and what to call with the tensors."""

    plan: Plan
    run: Callable[..., Any]


MOST_ENTRIES = 1 << 14  # calls, each of which takes a kilobyte or two
_entries: dict[Facts, Entry] = {}


def forget_plans() -> None:
    """Drops the plans of this process: each call is looked at again."""
    _entries.clear()


@contextmanager
def by_rule() -> Iterator[None]:
    """Until the end ways are taken by the rule, without measuring: in any process the same ones."""
    forget_plans()
    try:
        with measure.by_rule():
            yield
    finally:
        forget_plans()


def _keep(key: Facts, decided: Plan, run: Callable[..., Any]) -> Entry:
    entry = Entry(decided, run)
    if decided.lasting:
        if len(_entries) >= MOST_ENTRIES:
            _entries.clear()
        _entries[key] = entry
    return entry


class Unusual(Exception):
    """A call whose tensors are not PyTorch's own with their numbers in memory."""


_LIBRARY = torch.library.Library("gatedffn", "FRAGMENT")


class Operator:
    """An operator of the library.

    Args:
        name: in PyTorch's register.
        operands: names of the tensors, "?" behind those that may be missing.
        settings: the rest of its schema, such as "str save, int? tile".
        table: the ways to compute it.
        check: raises unless (tensors, call) fit together.
        result: an empty result of (tensors, call).
        formula: why a compiler is shown the definition in place of the operator, if it is.
        saved: empty tensors like those that forward keeps; None where it keeps its operands alone.
        rows: the operands of which every row is computed by itself; those of linear layers, whose
            operands autocast casts. None where there are no linear layers.
        uncast: the operands that autocast leaves as they are.
        saved_by_rows: whether the same holds of what is kept.
        unread: the operands whose numbers backward does not read where something is kept beside
            them, so that they may change meanwhile, as a bias may for PyTorch's linear layers.
        gradient: an empty gradient of an operand.
        of_a_part: the settings for a part of a nested tensor, from those for the whole.
        split: the rule by which processes share a call on DTensors.
    """

    def __init__(
        self,
        name: str,
        operands: str,
        settings: str,
        *,
        table: Ways,
        check: Callable[..., None],
        result: Callable[..., Tensor],
        formula: Callable[[Tensors, Call], str | None],
        saved: Callable[..., list[Tensor]] | None = None,
        rows: Sequence[str] = (),
        uncast: Sequence[str] = (),
        saved_by_rows: bool = True,
        unread: Sequence[str] = (),
        gradient: Callable[[Tensor], Tensor] = lambda t: t.new_empty(t.shape),
        of_a_part: Callable[..., tuple[Any, ...]] = lambda *settings: settings,
        split: sharded.Rule = sharded.whole,
    ) -> None:
        self.name, self.table, self.check = name, table, check
        self.operands = tuple(operand.rstrip("?") for operand in operands.split())
        self._formula, self._rows, self._of_a_part = formula, len(rows), of_a_part
        self._gradient, self._result, self._split = gradient, result, split
        self._unread = tuple(i for i, operand in enumerate(self.operands) if operand in unread)
        assert self.operands[: self._rows] == (*rows,), "operands by rows come first"
        self._cast_places = frozenset(
            i for i, operand in enumerate(self.operands) if operand not in uncast
        )
        of = [f"Tensor{'?' * n.endswith('?')} {n.rstrip('?')}" for n in operands.split()]
        given = ", ".join([*of, "Tensor[] learned, float[] fixed, str variant"])
        rest = ", ".join(filter(None, (settings, "str backend")))
        self._op = _register(
            f"{name}({given}, {rest}) -> Tensor",
            self._kernel,
            lambda *of: result(*self._opened(of)),
            self._over_rows,
        )
        _LIBRARY.impl(name, partial(self._autograd, False), "Autograd")
        self._backward_op = _register(
            f"{name}_backward(Tensor grad, Tensor[] saved, str[] wanted, {given}, {rest})"
            " -> Tensor[]",
            self._backward_kernel,
            self._fake_backward,
            _one_by_one,
        )
        _LIBRARY.impl(f"{name}_backward", self._autograd_backward, "Autograd")
        self._saving_op = None
        if saved is not None:
            self._saving_op = _register(
                f"{name}_saving({given}, {rest}) -> Tensor[]",
                self._saving_kernel,
                lambda *of: [result(*self._opened(of)), *saved(*self._opened(of))],
                self._over_rows if saved_by_rows else _one_by_one,
            )
            _LIBRARY.impl(f"{name}_saving", partial(self._autograd, True), "Autograd")

    # A call

    def __call__(self, tensors: Tensors, call: Call) -> Tensor:
        """The result; numbers among the parameters are floats."""
        under_modes = torch._C._len_torch_function_stack()
        if under_modes and _listening():
            raise _Asked(self, tensors, call)
        if watched() or transformed():
            return self._observed(tensors, call)
        if under_modes:
            # A default device or another mode has no say in how kernels get their memory.
            with torch._C.DisableTorchFunction():
                return self._direct(tensors, call)
        return self._direct(tensors, call)

    def _direct(self, tensors: Tensors, call: Call) -> Tensor:
        try:
            if self._rows and torch._C._is_any_autocast_enabled() and _casts(tensors):
                return self._autocast(tensors, call)
            return self._find(tensors, call).run(tensors, call.parameters)  # type: ignore[no-any-return]
        except (kernels.Unreadable, Unusual):
            return self._observed(tensors, call)

    def _find(self, tensors: Tensors, call: Call, trains: bool | None = None) -> Entry:
        """What was kept for equal calls, or is now decided. The key is all that a plan depends on;
        this is what small layers wait for. `trains` says whether autograd follows; None looks.
        """
        row, parameters, settings, backend = call
        values: tuple[Any, ...] = tuple(parameters.values())
        learned = [value for value in values if type(value) is not float]
        try:
            if trains is None:
                trains = torch.is_grad_enabled() and True in [
                    t is not None and t.requires_grad for t in (*tensors, *learned)
                ]
            key = (
                self.name, row.name, settings, backend, trains,
                value_facts(values) if learned else values, facts(tensors),
                *surroundings(tensors[0]),  # type: ignore[arg-type]
            )  # fmt: skip
            entry = _entries.get(key)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise Unusual from error  # sparse, nested; no tensor, or another mistake for `check`
        if entry is not None:
            return entry
        if not _plain((*tensors, *values)):
            raise Unusual
        self.check(tensors, call)
        decided = self._plan("forward" if trains else "inference", tensors, call)
        if not trains or decided.by_autograd:
            return _keep(key, decided, decided.run)
        return _keep(key, decided, _Trained.of(self, call, decided).run)

    def _find_backward(
        self,
        grad: Tensor,
        saved: Sequence[Tensor],
        tensors: Tensors,
        call: Call,
        wanted: tuple[str, ...],
    ) -> Entry:
        key = (
            self.name, call.row.name, call.settings, call.backend, wanted,
            value_facts(call.parameters.values()), facts((grad, *tensors, *saved)),
            *surroundings(grad),
        )  # fmt: skip
        entry = _entries.get(key)
        if entry is not None:
            return entry
        if not _plain((grad, *tensors, *saved, *call.parameters.values())):
            raise Unusual
        decided = self._plan("backward", tensors, call, wanted, (grad, *saved))
        return _keep(key, decided, decided.run)

    def _spec(
        self,
        stage: str,
        tensors: Tensors,
        call: Call,
        wanted: tuple[str, ...] = (),
        given: Sequence[Tensor] = (),
    ) -> Spec:
        x = tensors[0]
        assert x is not None
        return Spec(
            call.row.name,
            stage,
            x.device,
            "gpu" if gpu.takes(x) else x.device.type,
            matrices(facts(tensors)),
            named_values(value_facts(call.parameters.values())),
            call.settings,
            wanted,
            tuple(m for m in matrices(facts(given)) if m is not None),
            torch.get_num_threads(),
        )

    def _plan(
        self,
        stage: str,
        tensors: Tensors,
        call: Call,
        wanted: tuple[str, ...] = (),
        given: Sequence[Tensor] = (),
    ) -> Plan:
        spec = self._spec(stage, tensors, call, wanted, given)
        arguments: tuple[Any, ...] = (tensors, call.parameters)
        if stage == "backward":
            arguments = (given[0], given[1:], *arguments)
        finish: Callable[[], None] | None = measure.nothing
        if spec.hardware == "gpu":
            finish = None if gpu.capturing() else partial(gpu.finish, spec.device)
        return plan.plan(
            self.table, spec, call.backend, lambda run: partial(run, *arguments), finish
        )

    def plans(self, tensors: Tensors, call: Call, wanted: Sequence[str] = ()) -> dict[str, Plan]:
        """The plans that calls with these tensors use: in inference, and in a training step for
        the gradients that are wanted.

        Raises:
            SettingError: something takes such calls apart, so that no one plan computes them.
        """
        if self._rows and any(_shapeless(t) for t in tensors if t is not None):
            tensors = self._joined(tensors, call)
        try:
            return self._plans(tensors, call, wanted)
        except Unusual as error:
            reason = (
                self._why_definition(tensors, call) or "PyTorch's dispatcher changes them first"
            )
            raise SettingError(
                f"there is no plan for tensors like these: {reason}; explain takes those of "
                "PyTorch's own classes, in memory"
            ) from error

    def _plans(self, tensors: Tensors, call: Call, wanted: Sequence[str]) -> dict[str, Plan]:
        if self._rows and _casts(tensors):
            tensors = self._cast(tensors)
        tensors = [
            None if t is None else t.detach().requires_grad_(name in wanted)
            for name, t in zip(self.operands, tensors, strict=True)
        ]
        found = {}
        for stage in ("inference", "training, forward"):
            with torch.set_grad_enabled(stage != "inference"):
                found[stage] = self._find(tensors, call).plan
        forward = found["training, forward"]
        found["training, backward"] = forward
        if not forward.by_autograd:
            with torch.no_grad():
                y, *saved = forward.run(tensors, call.parameters)
                entry = self._find_backward(torch.ones_like(y), saved, tensors, call, (*wanted,))
                found["training, backward"] = entry.plan
        return found

    # A call that something sees or changes on its way

    def _observed(self, tensors: Tensors, call: Call) -> Tensor:
        if any(isinstance(t, Tensor) and _shapeless(t) for t in tensors):
            return self._in_parts(tensors, call)
        named = (*zip(self.operands, tensors, strict=True), *call.parameters.items())
        mesh = sharded.mesh_of(named)
        if mesh is not None:
            return self._shared(mesh, tensors, call)
        self.check(tensors, call)
        row, parameters, settings, backend = call
        reason = self._why_definition(tensors, call)
        if reason is not None:
            if backend not in ("auto", plan.DEFINITION):
                raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
            return self.table.definition(tensors, row.name, parameters, settings)
        if self._rows and _casts(tensors):
            tensors = self._cast(tensors)
        made: Tensor = self._op(*_closed(tensors, call))
        return made

    def _shared(self, mesh: Any, tensors: Tensors, call: Call) -> Tensor:
        """Of DTensors: the processes of their mesh compute together."""
        x = tensors[0]
        assert x is not None
        if self._rows and _casts(tensors):
            tensors = self._cast(tensors)
        shapes = [None if t is None else sharded.shape_of(t) for t in tensors]
        values = {
            name: sharded.shape_of(v) if isinstance(v, Tensor) else v
            for name, v in call.parameters.items()
        }
        self.check(shapes, call._replace(parameters=values))
        splits = [
            self._split(
                [None if t is None else t.placements[d] for t in tensors],  # type: ignore[attr-defined]
                tensors,
                call.settings,
            )
            for d in range(mesh.ndim)
        ]
        return sharded.compute(
            mesh,
            tensors,
            call.parameters,
            splits,
            self._result(shapes, call),
            x.dim(),
            lambda parts, values: self(parts, call._replace(parameters=values)),
        )

    def _in_parts(self, tensors: Tensors, call: Call) -> Tensor:
        """Of nested tensors that are no jagged ones, which few of PyTorch's functions take."""
        call = call._replace(settings=self._of_a_part(*call.settings))
        if self._rows:
            made = self(self._joined(tensors, call), call)
            x = tensors[0]
            assert x is not None
            sizes = [part.shape[:-1] for part in x.unbind()]
            split = made.split([size.numel() for size in sizes])
            width = made.shape[-1]
            found = [of.reshape(*size, width) for of, size in zip(split, sizes, strict=True)]
        else:
            none = (None,) * tensors.count(None)
            parts = _unbound([t for t in tensors if t is not None])
            found = [self((*of, *none), call) for of in parts]
        return torch.nested.as_nested_tensor(found)

    def _joined(self, tensors: Tensors, call: Call) -> Tensors:
        """All rows of nested tensors at once, so that the gradient of a weight is made once."""
        given, weights = tensors[: self._rows], tensors[self._rows :]
        parts = _unbound(given)
        if not parts:
            raise ShapeError(
                f"{self.operands[0]} is a nested tensor that holds no tensors: it must hold one "
                "at least, of (..., d_model)"
            )
        for part in parts:
            self.check((*part, *weights), call)
        joined = [
            torch.cat([t.reshape(-1, t.shape[-1]) for t in of]) for of in zip(*parts, strict=True)
        ]
        return (*joined, *weights)

    def _cast(self, tensors: Tensors) -> Tensors:
        """The tensors as autocast casts those of linear layers."""
        x = tensors[0]
        assert x is not None
        dtype = torch.get_autocast_dtype(x.device.type)
        by_cache = not (traced() or torch.is_inference_mode_enabled())
        return [
            t
            if t is None or t.dtype == torch.float64 or place not in self._cast_places
            else _cached_cast(t, dtype)
            if by_cache and _cacheable(t, x.device)
            else t.to(dtype)
            for place, t in enumerate(tensors)
        ]

    def _why_definition(self, tensors: Tensors, call: Call) -> str | None:
        if call.backend == plan.DEFINITION:
            return "it was asked for"
        if transformed():
            return "torch.func and forward-mode differentiation see through the definition alone"
        if torch.compiler.is_exporting():
            return "an exported graph holds PyTorch's own operators alone"
        if torch.compiler.is_compiling():
            if call.backend != "auto":
                return None
            return own_functions(call.row.name) or self._formula(tensors, call)
        if not _strided((*tensors, *call.parameters.values())):
            return "a tensor is sparse or nested"
        return self.table.why_definition(self._spec("inference", tensors, call))

    def _autocast(self, tensors: Tensors, call: Call) -> Tensor:
        if call.backend == plan.DEFINITION:
            return self._observed(tensors, call)
        tensors = self._cast(tensors)
        with _as_it_is(tensors):
            return self(tensors, call)

    # What the dispatcher calls

    def _opened(self, arguments: Sequence[Any]) -> tuple[list[Tensor | None], Call]:
        count = len(self.operands)
        learned, fixed, variant, *settings, backend = arguments[count:]
        row = VARIANTS[variant]
        parameters = join(tuple(row.defaults), learned, fixed)
        return list(arguments[:count]), Call(row, parameters, tuple(settings), backend)

    def _kernel(self, *arguments: Any) -> Tensor:
        tensors, call = self._opened(arguments)
        with _as_it_is(tensors):
            made: Tensor = self.found("inference", tensors, call).run(tensors, call.parameters)
        return made

    def _saving_kernel(self, *arguments: Any) -> list[Tensor]:
        tensors, call = self._opened(arguments)
        with _as_it_is(tensors):
            decided = self.found("forward", tensors, call)
            if decided.by_autograd:
                raise BackendError(f"nothing saves what backward needs: {decided.reason}")
            return list(decided.run(tensors, call.parameters))

    def _backward_kernel(
        self, grad: Tensor, saved: list[Tensor], wanted: Sequence[str], *arguments: Any
    ) -> list[Tensor]:
        tensors, call = self._opened(arguments)
        with _as_it_is(tensors):
            decided = self.found("backward", tensors, call, tuple(wanted), (grad, *saved))
            return list(decided.run(grad, saved, tensors, call.parameters))

    def found(
        self,
        stage: str,
        tensors: Tensors,
        call: Call,
        wanted: tuple[str, ...] = (),
        given: Sequence[Tensor] = (),
    ) -> Plan:
        """The plan of a stage: that which calls without the dispatcher take, where they do."""
        try:
            if stage == "backward":
                self.check(tensors, call)
                return self._find_backward(given[0], given[1:], tensors, call, wanted).plan
            return self._find(tensors, call, stage == "forward").plan
        except Unusual:
            self.check(tensors, call)
            return self._plan(stage, tensors, call, wanted, given)

    def _autograd(self, saving: bool, *arguments: Any) -> Any:
        """Of the operator and of its `_saving`: a graph that was traced below autograd holds
        that one, and may be differentiated in turn. What is saved has no gradient of its own.
        """
        tensors, call = self._opened(arguments)
        if transformed():
            if saving:
                raise BackendError(
                    f"{self.name}_saving in a graph has no rule for torch.func and forward mode: "
                    "trace the call under torch.no_grad(), or with backend='definition'"
                )
            row, parameters, settings, _ = call
            return self.table.definition(tensors, row.name, parameters, settings)
        if _followed((*tensors, *call.parameters.values())):
            trained = _Trained.of(self, call, None)._replace(saving=saving)
            made: Any = trained.run(tensors, call.parameters)
            return list(made) if saving else made
        with torch._C._AutoDispatchBelowAutograd():
            return (self._saving_op if saving else self._op)(*arguments)  # type: ignore[misc]

    def _over_rows(self, op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        """What `torch.vmap` calls for forward: to a linear operator a batch is rows like others."""
        count = self._rows
        others = [d for of in in_dims[count:] for d in (of if isinstance(of, list) else [of])]
        if count and all(dim is None for dim in others):
            rows = [
                t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim in zip(arguments[:count], in_dims[:count], strict=True)
            ]
            made = op(*rows, *arguments[count:])
            return made, 0 if isinstance(made, Tensor) else [0] * len(made)
        return _one_by_one(op, info, in_dims, *arguments)

    def _autograd_backward(
        self, grad: Tensor, saved: list[Tensor], wanted: Sequence[str], *arguments: Any
    ) -> list[Tensor]:
        tensors, call = self._opened(arguments)
        if _followed((grad, *tensors, *call.parameters.values())):
            return _Trained.of(self, call, None).run_backward(
                grad, saved, (*wanted,), tensors, call.parameters
            )
        with torch._C._AutoDispatchBelowAutograd():
            made: list[Tensor] = self._backward_op(grad, saved, wanted, *arguments)
            return made

    def _fake_backward(
        self, _grad: Tensor, _saved: list[Tensor], wanted: Sequence[str], *arguments: Any
    ) -> list[Tensor]:
        tensors, call = self._opened(arguments)
        of: dict[str, Any] = {**call.parameters, **dict(zip(self.operands, tensors, strict=True))}
        return [self._gradient(of[name]) for name in wanted]

    # Backward

    def backward(
        self,
        grad: Tensor,
        saved: Sequence[Tensor],
        tensors: Tensors,
        call: Call,
        wanted: tuple[str, ...],
        direct: bool,
    ) -> list[Tensor]:
        """The gradients that are wanted, in that order; autocast changes nothing of them."""
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(grad.device.type):
            with _as_it_is((grad,)):
                return self.backward(grad, saved, tensors, call, wanted, direct)
        if torch.is_grad_enabled() or batched(grad):
            row, parameters, settings, _ = call
            return self.table.gradients(grad, tensors, row.name, parameters, settings, wanted)
        if direct and not watched():
            try:
                with torch._C.DisableTorchFunction():
                    entry = self._find_backward(grad, saved, tensors, call, wanted)
                    made: list[Tensor] = entry.run(grad, saved, tensors, call.parameters)
                return made
            except (kernels.Unreadable, Unusual):
                pass  # the dispatcher's own fallbacks make them readable
        found: list[Tensor] = self._backward_op(grad, saved, wanted, *_closed(tensors, call))
        return found

    def check_unread(
        self,
        changed: Sequence[str],
        grad: Tensor,
        saved: Sequence[Tensor],
        tensors: Tensors,
        call: Call,
        wanted: tuple[str, ...],
    ) -> None:
        """Raises where backward computes anew with operands that were changed since forward.

        Raises:
            RuntimeError: it does, for second derivatives or by the definition.
        """
        anew = torch.is_grad_enabled() or batched(grad)
        if not anew:
            decided = self._plan("backward", tensors, call, wanted, (grad, *saved))
            anew = decided.chosen == plan.DEFINITION
        if anew:
            raise RuntimeError(
                f"{', '.join(changed)} has been modified by an inplace operation since forward, "
                "and these gradients are computed anew from it: change it after backward"
            )


def _register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], batching: Callable[..., Any]
) -> Any:
    """Tells PyTorch of an operator, and returns what calls it by its dispatcher."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"gatedffn::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.gatedffn, name).default
    torch.library.register_vmap(f"gatedffn::{name}", partial(batching, op), lib=_LIBRARY)
    return op


def _one_by_one(op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    """What `torch.vmap` calls for an operator: a call for each of the batch."""

    def at(place: int) -> Any:
        return [_taken(a, dim, place) for a, dim in zip(arguments, in_dims, strict=True)]

    made = [op(*at(place)) for place in range(info.batch_size)]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    stacked = [torch.stack(of) for of in zip(*made, strict=True)]
    return stacked, [0] * len(stacked)


def _taken(value: Any, dim: Any, place: int) -> Any:
    if isinstance(dim, list):
        return [_taken(v, d, place) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, place)


class _Trained(NamedTuple):
    """A call that autograd follows, without its tensors; `plan` where it goes by no dispatch.

    `names` are those of the learned parameters, which travel beside the operands. `saving` says
    that what is kept beside the operands is handed out too.
    """

    operator: Operator
    call: Call
    names: tuple[str, ...]
    plan: Plan | None
    saving: bool = False

    @classmethod
    def of(cls, operator: Operator, call: Call, decided: Plan | None) -> "_Trained":
        if not any(isinstance(value, Tensor) for value in call.parameters.values()):
            return cls(operator, call._replace(parameters=dict(call.parameters)), (), decided)
        return cls(operator, call._replace(parameters={}), tuple(call.row.defaults), decided)

    def run(self, tensors: Tensors, parameters: Parameters) -> Tensor:
        """The result, with its gradients known to autograd."""
        made: Tensor = _Differentiated.apply(self, *self._given(tensors, parameters))
        return made

    def run_backward(
        self,
        grad: Tensor,
        saved: list[Tensor],
        wanted: tuple[str, ...],
        tensors: Tensors,
        parameters: Parameters,
    ) -> list[Tensor]:
        """The gradients that are wanted, with theirs known to autograd."""
        given = self._given(tensors, parameters)
        return list(_DifferentiatedTwice.apply(self, saved, wanted, grad, *given))

    def _given(self, tensors: Tensors, parameters: Parameters) -> tuple[Tensor | None, ...]:
        if not self.names:
            return (*tensors,)
        return (*tensors, *learned_and_fixed(parameters, tensors[0])[0])

    def with_learned(self, learned: Sequence[Tensor]) -> Call:
        if not self.names:
            return self.call
        return self.call._replace(parameters=dict(zip(self.names, learned, strict=True)))

    def saved(self, tensors: Tensors, call: Call) -> tuple[Tensor, ...]:
        """The result and what is kept beside the operands."""
        operator = self.operator
        if self.plan is not None:
            made: tuple[Tensor, ...] = self.plan.run(tensors, call.parameters)
            return made
        given = _closed(tensors, call)
        with torch._C._AutoDispatchBelowAutograd():
            if operator._saving_op is None:
                return (operator._op(*given),)
            return tuple(operator._saving_op(*given))


class _Differentiated(torch.autograd.Function):
    """Saves the operands, the learned parameters, and what the operator says that it keeps."""

    @staticmethod
    def forward(ctx: Any, trained: _Trained, *arguments: Any) -> Any:
        count = len(trained.operator.operands)
        call = trained.with_learned(arguments[count:])
        y, *saved = trained.saved(arguments[:count], call)
        ctx.trained = trained
        apart = trained.operator._unread if saved else ()
        ctx.apart = [(i, t, t._version) for i in apart if (t := arguments[i]) is not None]
        if ctx.apart:
            arguments = tuple([None if i in apart else t for i, t in enumerate(arguments)])
        ctx.save_for_backward(*arguments, *saved)
        if not trained.saving:
            return y
        ctx.mark_non_differentiable(*saved)
        return (y, *saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_of_saved: Tensor) -> Any:
        operator, _, names, decided, _ = trained = ctx.trained
        # Read once: checkpointing hands each of them out a single time.
        held = [*ctx.saved_tensors]
        for i, t, _ in ctx.apart:
            held[i] = t
        count = len(operator.operands)
        end = count + len(names)
        needs = ctx.needs_input_grad[1:]
        of = zip((*operator.operands, *names), needs, strict=True)
        wanted = tuple([name for name, needed in of if needed])
        call = trained.with_learned(held[count:end])
        direct = decided is not None
        # A compiler cannot branch on a version.
        apart = () if torch.compiler.is_compiling() else ctx.apart
        changed = [operator.operands[i] for i, t, version in apart if t._version != version]
        if changed:
            operator.check_unread(changed, grad, held[end:], held[:count], call, wanted)
        made = operator.backward(grad, held[end:], held[:count], call, wanted, direct)
        gradients = iter(made)
        return (None, *[next(gradients) if needed else None for needed in needs])


class _DifferentiatedTwice(torch.autograd.Function):
    """Backward where a graph holds it as an operator. What was saved follows from the operands, so
    the derivatives with respect to them are all that there are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        trained: _Trained,
        saved: list[Tensor],
        wanted: tuple[str, ...],
        grad: Tensor,
        *arguments: Any,
    ) -> Any:
        ctx.trained, ctx.wanted = trained, wanted
        ctx.save_for_backward(grad, *arguments)
        operator, count = trained.operator, len(trained.operator.operands)
        given = _closed(arguments[:count], trained.with_learned(arguments[count:]))
        with torch._C._AutoDispatchBelowAutograd():
            return (*operator._backward_op(grad, saved, wanted, *given),)

    @staticmethod
    def backward(ctx: Any, *of_gradients: Tensor) -> Any:
        trained, needs = ctx.trained, ctx.needs_input_grad[3:]
        operator, count = trained.operator, len(trained.operator.operands)
        create_graph = torch.is_grad_enabled()
        held = [
            t if t is None else t.view_as(t) if create_graph else t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, needs, strict=True)
        ]
        grad, *arguments = held
        row, parameters, settings, _ = trained.with_learned(arguments[count:])
        with torch.enable_grad(), _as_it_is((grad,)):
            made = operator.table.gradients(
                grad, arguments[:count], row.name, parameters, settings, ctx.wanted
            )
        asked: list[Any] = [t for t, needed in zip(held, needs, strict=True) if needed]
        of = zip(made, of_gradients, strict=True)
        ends, starts = zip(*[(m, g) for m, g in of if m.requires_grad], strict=True)
        found = iter(
            torch.autograd.grad(ends, asked, starts, create_graph=create_graph, allow_unused=True)
        )
        return (None, None, None, *[next(found) if needed else None for needed in needs])


# Parameters


def learned_and_fixed(
    parameters: Parameters, like: Tensor | None
) -> tuple[list[Tensor], list[float]]:
    """The parameters, complete and in order, as (learned, fixed)."""
    values = list(parameters.values())
    fixed = [value for value in values if not isinstance(value, Tensor)]
    if len(fixed) == len(values):
        return [], fixed
    assert like is not None
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


def _closed(tensors: Tensors, call: Call) -> tuple[Any, ...]:
    """A call as the schema has it."""
    learned, fixed = learned_and_fixed(call.parameters, tensors[0])
    return (*tensors, learned, fixed, call.row.name, *call.settings, call.backend)


# What surrounds a call


class _Asked(Exception):
    """A call that somebody listens to, on its way to them: operator, tensors, call."""


class _Listening(BaseTorchFunctionMode):
    pass


def _listening() -> bool:
    return any(isinstance(mode, _Listening) for mode in _get_current_function_mode_stack())


def asked(function: Callable[[], object]) -> tuple[Operator, Tensors, Call]:
    """What a function asks first of an operator; there it ends, and nothing is computed.

    Raises:
        SettingError: it asks nothing of any.
    """
    try:
        with _Listening():
            function()
    except _Asked as call:
        return call.args
    raise SettingError("its forward calls no operator of this library")


def _plain(values: Sequence[Value | None]) -> bool:
    """Whether all tensors are PyTorch's own, with their numbers where their address says."""
    return _strided(values) and all(
        type(value) in PLAIN and not value.is_neg() and (value.is_cpu or value.is_cuda)
        for value in values
        if isinstance(value, Tensor)
    )


def _unbound(tensors: Tensors) -> list[tuple[Tensor, ...]]:
    """What nested tensors hold, those of one place together."""
    given = [t.unbind() for t in tensors]  # type: ignore[union-attr]
    if len({len(parts) for parts in given}) != 1:
        raise ShapeError(
            f"nested tensors hold {' and '.join(str(len(parts)) for parts in given)} "
            "tensors: they must hold as many"
        )
    return list(zip(*given, strict=True))


def _shapeless(x: Tensor) -> bool:
    """Whether it is a nested tensor without a shape: only the tensors in it have one."""
    return x.is_nested and x.layout is torch.strided


def _followed(values: Sequence[Value | None]) -> bool:
    """Whether autograd follows what is made of them."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )


def _strided(values: Sequence[Value | None]) -> bool:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return all(t.layout is torch.strided and not t.is_nested for t in tensors)


def _casts(tensors: Tensors) -> bool:
    """Whether autocast casts what a linear layer is given on this device."""
    x = tensors[0]
    assert x is not None
    return (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(x.device.type)


def _cacheable(t: Tensor, device: torch.device) -> bool:
    """Whether autocast may keep its cast, and `_cached_cast` can read it."""
    return (
        t.requires_grad
        and t.is_leaf
        and t.dtype == torch.float32
        and type(t) in PLAIN
        and t.layout is torch.strided
        and t.dim() in (1, 2)
        and t.device == device
    )


def _cached_cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf as autocast casts it once and keeps it until its outermost context ends; so it does
    not in inference mode.

    Only PyTorch's own operators reach what it keeps. So one is called, with no rows, and asked for
    what it saved: of its second operand that is the cast, with its way back to the leaf.
    """
    hooks: Any = nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda s: s, lambda s: s)  # not the user's
    with torch.enable_grad(), hooks:
        rows = torch.empty(0, len(t), dtype=dtype, device=t.device, requires_grad=True)
        try:
            product: Any = torch.matmul(rows, t).grad_fn
        except RuntimeError:  # it keeps one cast a leaf, here that of a context of another dtype
            return t.to(dtype)
        cast: Tensor = product._saved_mat2 if t.dim() == 2 else product._saved_vec
    return cast


def _as_it_is(tensors: Tensors) -> Any:
    """Without autocast: what an operator is given by its name, it takes as it is."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    x = tensors[0]
    assert x is not None
    return without_autocast(x)
