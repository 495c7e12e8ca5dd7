"""The table of the ways to compute gating, of two branches or of a tensor that packs both.

kernels     one pass over memory, by the kernels of the device
definition  the formula in plain PyTorch
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedffn.ops import kernels
from gatedffn.ops.gating import device_of, parameter_gradient, reference
from gatedffn.ops.gating.reference import branches
from gatedffn.ops.plan import Run, Way, Ways
from gatedffn.ops.spec import Matrix, Parameters, Spec, Tensors, facts, matrices
from gatedffn.variants import VARIANTS

FORWARD, BACKWARD = ("inference", "forward"), ("backward",)


def branches_of(tensors: Tensors, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """The gate and the up branch of a call; `settings` say how one tensor packs them."""
    first = tensors[0]
    assert first is not None
    return branches(first, *settings) if settings else (first, tensors[1])


def why_definition(spec: Spec) -> str | None:
    """Why the kernels cannot take a call; None when they can."""
    if spec.hardware not in ("cpu", "gpu"):
        return f"there is no kernel for {spec.hardware}"
    device = device_of(spec.hardware)
    gate, up = _branches(spec)
    if gate.dtype not in device.DTYPES:
        return f"there is no kernel for {gate.dtype}"
    if up is not None and (up.dtype is not gate.dtype or up.device != gate.device):
        return "the branches are of different dtypes"
    if not gate.numbers:
        return "there is nothing to compute"
    if spec.given and (spec.given[0].shape != gate.shape or spec.given[0].dtype is not gate.dtype):
        return "the gradient is of another dtype or shape than the branches"
    unsuited = spec.unsuited_parameter(gate.shape[-1] if gate.shape else 1)
    missing: str | None = spec.own_functions or unsuited or device.missing(spec.device)
    return missing


def _branches(spec: Spec) -> tuple[Matrix, Matrix | None]:
    gate, up = _views(spec) if spec.settings else (*spec.operands, None)[:2]
    assert gate is not None
    return gate, up


def _views(spec: Spec) -> tuple[Matrix, Matrix]:
    """The branches of the packed operand as matrices."""
    gate, up = matrices(facts(branches(_thought(spec), *spec.settings)))
    assert gate is not None
    assert up is not None
    return gate._replace(device=spec.x.device), up._replace(device=spec.x.device)


def _thought(spec: Spec) -> Tensor:
    x = spec.x
    return torch.empty_strided(x.shape, x.strides, dtype=x.dtype, device="meta")


class _Laid:
    """Where the branches of the operands lie, and how a processor's kernels go through them.

    `views` says that each can be read where it is: then the gate and the up branch begin so many
    bytes behind their operands.
    """

    def __init__(self, spec: Spec, *others: Matrix) -> None:
        gate, up = _branches(spec)
        given = [m for m in (*spec.operands, gate, up, *others) if m is not None]
        learned = spec.stage == "backward" and bool(set(spec.wanted) & set(_learned(spec)))
        per_unit = any(isinstance(v, Matrix) and v.numbers > 1 for v in spec.parameters)
        self.columns = gate.shape[-1] if gate.shape else 1
        self.rows = gate.numbers // self.columns
        self.views = all(m.row_stride is not None for m in given)
        steps = [self.columns if m is None else m.row_stride for m in (gate, up, *others)]
        self.strides = [self.columns if s is None or not self.views else s for s in steps]
        if not (per_unit or learned) and all(s == self.columns for s in self.strides):
            # Columns are alike: one long row.
            self.columns, self.rows = gate.numbers, 1
            self.strides = [self.columns] * len(self.strides)
        self.offsets = [0, 0]
        if spec.settings and self.views:
            parts = branches(_thought(spec), *spec.settings)
            self.offsets = [int(part.storage_offset()) * gate.dtype.itemsize for part in parts]
        self.threads = kernels.threads(self.rows * self.columns)
        self._settings = spec.settings
        self._laid = kernels.Laid(spec.operands)

    def addresses(self, tensors: Tensors) -> tuple[int, int, Any]:
        """Where the gate and the up branch are, and what must live while they are read."""
        if not self.views:
            parts = branches_of(tensors, self._settings)
            copies = [None if t is None else t.contiguous() for t in parts]
            gate, up = (0 if t is None else kernels.address(t) for t in copies)
            return gate, up, copies
        found, _ = self._laid.addresses(tensors)
        return found[0] + self.offsets[0], found[-1] and found[-1] + self.offsets[1], None


def _learned(spec: Spec) -> tuple[str, ...]:
    return tuple(VARIANTS[spec.variant].defaults)


def _on_cpu(spec: Spec) -> Run:
    laid, device = _Laid(spec), device_of(spec.hardware)
    gate, _ = _branches(spec)
    call = kernels.GATING.bind(
        gate_stride=laid.strides[0],
        up_stride=laid.strides[1],
        hidden_stride=laid.columns,
        rows=laid.rows,
        columns=laid.columns,
        dtype=kernels.DTYPES[gate.dtype],
        threads=laid.threads,
    )
    formulas, shape = kernels.formulas(device.describe, spec), gate.shape
    like = not spec.settings and gate.row_stride == gate.shape[-1:][0] if gate.shape else False
    trains = spec.stage == "forward"

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        formula = formulas(parameters)
        at_gate, at_up, _held = laid.addresses(tensors)
        first: Any = tensors[0]
        hidden = torch.empty_like(first) if like else first.new_empty(shape)
        call(formula.pointer, at_gate, at_up, hidden.data_ptr())
        return (hidden,) if trains else hidden

    return run


def _backward_on_cpu(spec: Spec) -> Run:
    grad = spec.given[0]
    gate, _ = _branches(spec)
    d_gate_view: Matrix | None = None
    offsets = [0, 0]
    if "packed" in spec.wanted:
        whole = torch.empty(spec.x.shape, dtype=spec.x.dtype, device="meta")
        parts = branches(whole, *spec.settings)
        d_gate_view, _ = matrices(facts(parts))
        assert d_gate_view is not None
        if d_gate_view.row_stride is not None:
            offsets = [int(part.storage_offset()) * gate.dtype.itemsize for part in parts]
    in_place = d_gate_view is not None and d_gate_view.row_stride is not None
    laid = _Laid(spec, grad, *([d_gate_view] if in_place and d_gate_view else []))
    d_stride = laid.strides[-1] if in_place else laid.columns
    if not laid.views:
        in_place, d_stride = False, laid.columns
    learned = [name for name in spec.wanted if name in _learned(spec)]
    device = device_of(spec.hardware)
    call = kernels.GATING_BACKWARD.bind(
        grad_stride=laid.strides[2],
        gate_stride=laid.strides[0],
        up_stride=laid.strides[1],
        d_gate_stride=d_stride,
        d_up_stride=d_stride,
        hidden_stride=laid.columns,
        rows=laid.rows,
        columns=laid.columns,
        dtype=kernels.DTYPES[gate.dtype],
        threads=laid.threads,
    )
    formulas, shape = kernels.formulas(device.describe, spec), gate.shape
    end = grad.end if laid.views else grad.numbers * grad.dtype.itemsize
    packed = "packed" in spec.wanted
    wants_gate, wants_up = packed or "gate" in spec.wanted, packed or "up" in spec.wanted

    def run(grad: Tensor, _saved: object, tensors: Tensors, parameters: Parameters) -> list[Tensor]:
        formula = formulas(parameters)
        at_gate, at_up, _held = laid.addresses(tensors)
        if not laid.views:
            grad = grad.contiguous()
        made: dict[str, Tensor] = {}
        if packed and in_place:
            d_packed = made["packed"] = grad.new_empty(spec.x.shape)
            at_d_gate, at_d_up = (d_packed.data_ptr() + offset for offset in offsets)
        else:
            at_d_gate = at_d_up = 0
            if wants_gate:
                made["gate"] = grad.new_empty(shape)
                at_d_gate = made["gate"].data_ptr()
            if wants_up:
                made["up"] = grad.new_empty(shape)
                at_d_up = made["up"].data_ptr()
        sums = device.sums_of(learned, laid.threads, laid.columns)
        call(
            *(formula.pointer, kernels.address(grad, end), at_gate, at_up, at_d_gate, at_d_up, 0),
            *device.addresses(formula, sums),
        )
        if packed and not in_place:
            made["packed"] = reference.joined(made["gate"], made["up"], *spec.settings)
        for name, parts in sums.items():
            made[name] = parameter_gradient(parts.sum(0), parameters[name])
        return [made[name] for name in spec.wanted]

    return run


def _on_gpu(spec: Spec) -> Run:
    device, trains = device_of(spec.hardware), spec.stage == "forward"
    formulas = kernels.formulas(device.describe, spec)

    def run(tensors: Tensors, parameters: Parameters) -> Any:
        formula = formulas(parameters)
        gate, up = branches_of(tensors, spec.settings)
        hidden = gate.new_empty(gate.shape)
        # The first two may take turns in one tensor.
        device.run(formula, *device.matrices([gate, up, hidden], formula.per_unit, (0,)))
        return (hidden,) if trains else hidden

    return run


def _backward_on_gpu(spec: Spec) -> Run:
    device = device_of(spec.hardware)
    formulas = kernels.formulas(device.describe, spec)
    learned = [name for name in spec.wanted if name in _learned(spec)]

    def run(grad: Tensor, _saved: object, tensors: Tensors, parameters: Parameters) -> list[Tensor]:
        formula = formulas(parameters)
        gate, up = branches_of(tensors, spec.settings)
        made: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}
        if "packed" in spec.wanted:
            made["packed"] = grad.new_empty(spec.x.shape)
            names = ("gate", "up")
            places = dict(zip(names, branches(made["packed"], *spec.settings), strict=True))
        written = dict(places) if device.writable(list(places.values())) else {}
        for name in places or [name for name in spec.wanted if name in ("gate", "up")]:
            written.setdefault(name, gate.new_empty(gate.shape))
        tensors = [grad, gate, up, written.get("gate"), written.get("up")]
        rows = device.matrices(tensors, formula.per_unit or bool(learned), (1, 3))
        sums = device.run_backward(formula, *rows, None, learned)
        for name, place in places.items():
            if written[name] is not place:
                place.copy_(written[name])
        made |= {name: written[name] for name in written if name not in places}
        made |= {name: parameter_gradient(of, parameters[name]) for name, of in sums.items()}
        return [made[name] for name in spec.wanted]

    return run


# The definition


def _definition(
    tensors: Tensors, variant: str, parameters: Parameters, settings: tuple[Any, ...]
) -> Tensor:
    """Gating in plain PyTorch."""
    return reference.gating(*branches_of(tensors, settings), variant, parameters).contiguous()


def _gradients(
    grad: Tensor,
    tensors: Tensors,
    variant: str,
    parameters: Parameters,
    settings: tuple[Any, ...],
    wanted: Sequence[str],
) -> list[Tensor]:
    """The gradients that are wanted, by formulas that can be differentiated and batched."""
    gate, up = branches_of(tensors, settings)
    asked = [name for name in wanted if name != "packed"]
    if "packed" in wanted:
        asked += ["gate", "up"]
    found = reference.gating_backward(grad, gate, up, variant, parameters, asked)
    by_name = dict(zip(asked, found, strict=True))
    if "packed" in wanted:
        by_name["packed"] = reference.joined(by_name["gate"], by_name["up"], *settings)
    return [by_name[name].contiguous() for name in wanted]


WAYS = Ways(
    ways=(
        Way("kernels", _on_cpu, ("cpu",), FORWARD),
        Way("kernels", _backward_on_cpu, ("cpu",), BACKWARD),
        Way("kernels", _on_gpu, ("gpu",), FORWARD),
        Way("kernels", _backward_on_gpu, ("gpu",), BACKWARD),
    ),
    definition=_definition,
    gradients=_gradients,
    why_definition=why_definition,
    key=lambda spec: f"gating, {spec.stage}",
)
