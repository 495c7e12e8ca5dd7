"""Gating by the kernels of a device where they fit, else by the definition.

A device is a module, `cpu` or `gpu`, with

    unsuited    why its kernels cannot take some branches
    describe    a row with its parameters, as its kernels take it
    matrices    tensors as the matrices that its kernels read and write
    writable    whether there are such matrices of tensors that are to be written
    run, run_backward
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gatedffn.activations import Value
from gatedffn.errors import ShapeError
from gatedffn.ops.gating import cpu, gpu, reference
from gatedffn.ops.gpu import takes
from gatedffn.variants import VARIANTS

Parameters = Mapping[str, Value]


def device_of(x: Tensor) -> Any:
    """The module that computes gating on the device of a tensor."""
    return gpu if takes(x) else cpu


def gating(
    gate: Tensor,
    up: Tensor | None,
    variant: str,
    parameters: Parameters,
    device: Any = None,
) -> Tensor:
    """As the reference has it, contiguous."""
    device = device or device_of(gate)
    check_branches(up, variant)
    if not gate.numel() or device.unsuited(gate, up, parameters):
        return reference.gating(gate, up, variant, parameters).contiguous()
    hidden = gate.new_empty(gate.shape)
    described = device.describe(variant, parameters)
    # The first two may take turns in one tensor.
    device.run(described, *device.matrices([gate, up, hidden], described.per_unit, (0,)))
    return hidden


def gating_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    variant: str,
    parameters: Parameters,
    wanted: Sequence[str],
    into: Mapping[str, Tensor] | None = None,
    device: Any = None,
) -> list[Tensor]:
    """As the reference has it, contiguous, or written to the tensors of `into` that have a name."""
    device = device or device_of(gate)
    check_branches(up, variant)
    fits = gate.numel() and grad.dtype == gate.dtype and grad.shape == gate.shape
    if not fits or device.unsuited(gate, up, parameters):
        gradients = reference.gating_backward(grad, gate, up, variant, parameters, wanted)
        return reference.delivered(wanted, gradients, into)
    described = device.describe(variant, parameters)
    learned = [name for name in wanted if name in parameters]
    places = into if into and device.writable(list(into.values())) else {}
    made = {
        name: places[name] if name in places else gate.new_empty(gate.shape)
        for name in wanted
        if name not in learned
    }
    tensors = [grad, gate, up, made.get("gate"), made.get("up")]
    matrices = device.matrices(tensors, described.per_unit or bool(learned), (1, 3))
    sums = device.run_backward(described, *matrices, None, learned)
    made |= {name: parameter_gradient(sums[name], parameters[name]) for name in learned}
    return reference.delivered(wanted, [made[name] for name in wanted], into)


def check_branches(up: Tensor | None, variant: str) -> None:
    """Raises unless there is another branch where the variant has one."""
    if (up is None) == VARIANTS[variant].gated:
        raise ShapeError(f"{variant!r} is given the branches of another kind of variant")


def parameter_gradient(sums: Tensor, parameter: Value) -> Tensor:
    """The gradient of a learned parameter from its sums for each hidden unit."""
    assert isinstance(parameter, Tensor)
    if parameter.numel() == 1:
        sums = sums.sum()
    return sums.reshape(parameter.shape).to(parameter.dtype)
