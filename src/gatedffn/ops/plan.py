"""Which way computes a call: decided once for equal calls, from one table, and kept with reasons.

A call runs its plan, and `explain` prints the same object.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedffn.errors import BackendError
from gatedffn.ops import measure
from gatedffn.ops.spec import Parameters, Spec, Tensors

log = logging.getLogger(__name__)

Run = Callable[..., Any]
Reason = Callable[[Spec], str | None]


def no_reason(_: Spec) -> None:
    """There is nothing against it."""


DEFINITION = "definition"
"""The way that takes everything, and that the others are held to."""


class Way(NamedTuple):
    """A row of an operator's table: one way to compute it.

    `hardware` is where it runs, empty for everywhere. `why_not` says why it cannot take a spec,
    `not_worth` why it is not worth a measurement. `bind` makes what runs: a function of tensors,
    with all that follows from the spec prepared.
    """

    name: str
    bind: Callable[[Spec], Run]
    hardware: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("inference", "forward", "backward")
    why_not: Reason = no_reason
    not_worth: Reason = no_reason


class Ways(NamedTuple):
    """All ways of an operator, and its definition, which takes everything.

    `definition` is a function of (tensors, variant, parameters, settings) in plain PyTorch, and
    `gradients` one of (grad, tensors, variant, parameters, settings, wanted) that can be
    differentiated in turn. `by_autograd` says that in training the definition is left to autograd:
    then it is not known what is kept. `why_definition` says why all others cannot take a spec.
    `order` puts those that can in the order of the rule, which takes the first where nothing is
    measured. `key` names what a measurement holds for.
    """

    ways: tuple[Way, ...]
    definition: Callable[..., Tensor]
    gradients: Callable[..., list[Tensor]]
    why_definition: Reason
    key: Callable[[Spec], str]
    by_autograd: bool = False
    order: Callable[[list[Way], Spec], list[Way]] = lambda ways, _: ways

    def of(self, spec: Spec) -> dict[str, Way]:
        """The ways of a stage on a device, by name."""
        ways = [
            way
            for way in self.ways
            if spec.stage in way.stages and (not way.hardware or spec.hardware in way.hardware)
        ]
        return {way.name: way for way in ways} | {DEFINITION: Way(DEFINITION, self._defined)}

    @property
    def names(self) -> tuple[str, ...]:
        """What `backend=` takes."""
        return (*dict.fromkeys(way.name for way in self.ways), DEFINITION)

    def _defined(self, spec: Spec) -> Run:
        variant, settings, wanted = spec.variant, spec.settings, spec.wanted

        def run(tensors: Any, parameters: Any) -> Any:
            made = self.definition(tensors, variant, parameters, settings)
            return (made,) if spec.stage == "forward" and not self.by_autograd else made

        def backward(grad: Tensor, _: Any, tensors: Any, parameters: Any) -> list[Tensor]:
            return self.gradients(grad, tensors, variant, parameters, settings, wanted)

        return backward if spec.stage == "backward" else run


def gradients_of(
    definition: Callable[..., Tensor], operands: Sequence[str]
) -> Callable[..., list[Tensor]]:
    """The gradients of a definition by differentiating it, so that they have such in turn."""

    def gradients(
        grad: Tensor,
        tensors: Tensors,
        variant: str,
        parameters: Parameters,
        settings: object,
        wanted: Sequence[str],
    ) -> list[Tensor]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # A view of its own for each role: one tensor may have several.
            sources: dict[str, Any] = {
                name: _source(t, create_graph) if isinstance(t, Tensor) else t
                for name, t in (*zip(operands, tensors, strict=True), *parameters.items())
            }
            given = [sources[name] for name in operands]
            y = definition(given, variant, {n: sources[n] for n in parameters}, settings)
            asked = [sources[name] for name in wanted]
        return list(torch.autograd.grad(y, asked, grad, create_graph=create_graph))

    return gradients


def _source(t: Tensor, create_graph: bool) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.view_as(t) if create_graph else t.detach().requires_grad_()


@dataclass(frozen=True, slots=True)
class Plan:
    """The way that computes a call, why, and what is against the others.

    `milliseconds` are those measured. `run` takes the tensors of the call.
    """

    stage: str
    chosen: str
    reason: str
    milliseconds: Mapping[str, float]
    against: Mapping[str, str]
    run: Run = field(repr=False, compare=False)
    by_autograd: bool = field(default=False, repr=False)
    """Whether autograd differentiates what runs, so that it has no backward here."""
    lasting: bool = field(default=True, repr=False)
    """Whether it holds for the next equal call: not what was taken because nothing could wait."""


_ran: set[tuple[object, ...]] = set()
"""The ways that have run by rule on a GPU, with what their kernels are compiled for."""


def plan(
    table: Ways,
    spec: Spec,
    backend: str,
    trial: Callable[[Run], Callable[[], object]],
    finish: Callable[[], None] | None = measure.nothing,
) -> Plan:
    """The plan for a spec.

    `trial` makes of a way's run one that can be timed; `finish` waits until a device is done.

    Raises:
        BackendError: the backend that was asked for cannot compute it.
    """
    ways = table.of(spec)
    definition = ways[DEFINITION]
    unfit = table.why_definition(spec)
    against: dict[str, str] = {}
    able: list[Way] = []
    for way in ways.values():
        if way is definition:
            continue
        reason = unfit or way.why_not(spec)
        if reason is not None or (
            way.name != backend and (reason := way.not_worth(spec)) is not None
        ):
            against[way.name] = reason
        else:
            able.append(way)

    def made(
        way: Way, reason: str, times: Mapping[str, float] | None = None, lasting: bool = True
    ) -> Plan:
        others = {} if unfit is not None else against
        run = bound.get(way.name) or way.bind(spec)
        by_autograd = way is definition and table.by_autograd and spec.stage != "backward"
        return Plan(spec.stage, way.name, reason, times or {}, others, run, by_autograd, lasting)

    bound: dict[str, Run] = {}

    def runs(way: Way) -> bool:
        """Whether it does, on a chip for which nobody may have compiled it. That is tried once."""
        kind = (way.bind, spec.stage, spec.variant, spec.x.dtype, spec.device)
        if spec.hardware != "gpu" or finish is None or not spec.x.numbers or kind in _ran:
            return True
        try:
            run = bound[way.name] = way.bind(spec)
            with torch.no_grad():  # it writes to memory of its own, which autograd does not follow
                trial(run)()
                finish()
        except Exception as error:  # Triton's own are no RuntimeError
            against[way.name] = f"it failed with: {error}"
            log.warning("%s is out, it failed with: %s", way.name, error)
            return False
        _ran.add(kind)
        return True

    # A name that has no way of its own in backward is for forward alone.
    if backend != "auto" and (backend in ways or spec.stage != "backward"):
        if backend not in ways:
            reason = f"it does not run on {spec.device.type}"
            if any(way.name == backend and spec.hardware in way.hardware for way in table.ways):
                reason = "it is not for training: it saves nothing"
        else:
            reason = against.get(backend, "")
        if reason:
            raise BackendError(f"backend {backend!r} cannot compute this call: {reason}")
        return made(ways[backend], "it was asked for")
    if not able:
        return made(definition, unfit or "nothing else computes it")
    able = table.order(able, spec)
    if len(able) == 1 or not spec.x.numbers or not measure.tuning():
        first = next(filter(runs, able), definition)
        alone = len(able) == 1 and first is not definition
        return made(first, "nothing else runs here" if alone else "the rule without measuring")
    names = [way.name for way in able]
    # Sizes that count as alike may have other ways, among which the choice is another.
    key = f"{table.key(spec)}: {' or '.join(names)}"
    known = measure.known(key)
    if finish is None and (known is None or known.chosen not in names):
        return made(able[0], "nothing can be measured while a graph is captured", lasting=False)

    def trials() -> dict[str, Callable[[], object]]:
        bound.update({way.name: way.bind(spec) for way in able})
        return {name: trial(run) for name, run in bound.items()}

    choice = measure.choose(key, names, trials, finish or measure.nothing)
    return made(ways[choice.chosen], choice.reason, choice.milliseconds)
