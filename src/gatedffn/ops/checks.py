"""What every operator asks of its tensors and of the parameters of a row."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.errors import ParameterError, ShapeError
from gatedffn.variants import Parameter, Variant


def check_floating(name: str, x: object) -> None:
    """Raises unless it is a tensor of numbers that have a gradient."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is of type {type(x).__name__}: it must be a tensor")
    if not x.is_floating_point():
        raise ShapeError(f"{name} is {x.dtype}: it must be a floating dtype")


def complete(row: Variant, parameters: Mapping[str, Value]) -> dict[str, Value]:
    """Every parameter of the row in its order, numbers as floats: the given ones where given, else
    the defaults.

    Raises:
        ParameterError: a name that the row does not have, or a value out of range.

    >>> from gatedffn.variants import VARIANTS
    >>> complete(VARIANTS["swiglu_oai"], {"limit": 5})
    {'beta': 1.702, 'limit': 5.0}
    """
    values: dict[str, Value] = {**row.defaults}
    if not parameters:
        return values
    unknown = [name for name in parameters if name not in values]
    if unknown:
        known = ", ".join(values) or "none"
        raise ParameterError(
            f"{row.name!r} has no parameter {', '.join(unknown)}; its parameters: {known}"
        )
    for parameter in row.parameters:
        if parameter.name in parameters:
            value = parameters[parameter.name]
            _check_value(row, parameter, value)
            values[parameter.name] = value if isinstance(value, Tensor) else float(value)
    return values


def _check_value(row: Variant, parameter: Parameter, value: Value) -> None:
    if not isinstance(value, Tensor):
        parameter.check(row.name, value)
    elif not parameter.learnable:
        raise ParameterError(
            f"{parameter.name} of {row.name!r} is not learnable: give a number, not a tensor"
        )


def check_fit(
    row: Variant, parameters: Mapping[str, Value], shape: Sequence[int], device: torch.device
) -> None:
    """Raises unless parameters that are tensors fit to hidden values of that shape.

    Raises:
        ShapeError: one does not broadcast to them, is on another device, or not floating.
    """
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            continue
        if not _broadcasts(value.shape, shape):
            raise ShapeError(
                f"{name} of {row.name!r} is {tuple(value.shape)}: it must broadcast to the hidden "
                f"values, {tuple(shape)}"
            )
        if not value.is_floating_point():
            raise ShapeError(f"{name} of {row.name!r} is {value.dtype}: it must be floating")
        if value.device != device:
            raise ShapeError(f"{name} of {row.name!r} is on {value.device}, the rest on {device}")


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))
