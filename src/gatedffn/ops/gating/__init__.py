"""The element-wise part of the layer: `phi(gate) * psi(up)`, or `phi(up)` without a gate."""

from types import ModuleType

from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.gating import cpu, gpu


def device_of(hardware: str) -> ModuleType:
    """The kernels of gating for matrices on a kind of device: `cpu` or `gpu`.

    Each has
    DTYPES, missing     what they take, and why there are none on a device
    describe            a row with its parameters, as they take it
    run, run_backward   of matrices whose last stride is 1
    bound, bound_backward
                        the same for contiguous tensors of so many rows, prepared
    places              memory for matrices that are needed for a moment
    level               what their speed depends on
    """
    return gpu if hardware == "gpu" else cpu


def parameter_gradient(sums: Tensor, parameter: Value) -> Tensor:
    """The gradient of a learned parameter from its sums for each hidden unit."""
    assert isinstance(parameter, Tensor)
    if parameter.numel() == 1:
        sums = sums.sum()
    return sums.reshape(parameter.shape).to(parameter.dtype)
