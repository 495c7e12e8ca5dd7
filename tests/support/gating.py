"""Gating by the definition and by hand, to which the kernels of every device are held."""

from dataclasses import replace

import torch
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.ops.gating import reference
from support.cases import Inputs, with_gradients
from support.compare import assert_matches

Results = dict[str, Tensor]


def learned_names(inputs: Inputs) -> list[str]:
    """The parameters that a gradient is asked of."""
    return [
        parameter.name
        for parameter in inputs.row.parameters
        if parameter.learnable and isinstance(inputs.parameters[parameter.name], Tensor)
    ]


def by_reference(inputs: Inputs) -> Results:
    """The same by the definition, in the dtype of the inputs."""
    parameters = dict(inputs.parameters)
    names = ["gate", *([] if inputs.up is None else ["up"]), *learned_names(inputs)]
    of = (inputs.gate, inputs.up, inputs.row.name, parameters)
    with torch.no_grad():
        hidden = reference.gating(*of)
        gradients = reference.gating_backward(inputs.grad, *of, names)
    return {"output": hidden, "again": hidden, **dict(zip(names, gradients, strict=True))}


def judge(results: Results, truth: Results, eager: Results, label: str) -> None:
    for name in results:
        assert_matches(results[name], truth[name], eager[name], f"{label} {name}")


def by_hand(inputs: Inputs) -> Results:
    """As written in PyTorch and differentiated by autograd, in the dtype of the inputs."""
    found = dict(with_gradients(inputs, by_hand=True))
    return found | {"again": found["output"]}


def scaled(inputs: Inputs, scales: Tensor, shifts: Tensor | float = 0.0) -> Inputs:
    dtype = inputs.gate.dtype
    gate = inputs.gate.detach().double() * scales[:, None] + shifts
    return replace(inputs, gate=gate.to(dtype))


def special_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    sizes = [0.0, info.smallest_normal / 4, info.smallest_normal, 1.0, 7.0, info.max, torch.inf]
    return torch.tensor([*sizes, *(-size for size in sizes), torch.nan], dtype=dtype)


def first_for_all(inputs: Inputs) -> Inputs:
    """One parameter for all hidden units, where each has its own."""
    firsts: dict[str, Value] = {
        n: v[:1] if isinstance(v, Tensor) else v for n, v in inputs.parameters.items()
    }
    return replace(inputs, parameters=firsts)


def parameters_swapped(inputs: Inputs) -> Inputs:
    names = list(inputs.parameters)
    values: dict[str, Value] = {
        name: inputs.parameters[other] for name, other in zip(names, reversed(names), strict=True)
    }
    return replace(inputs, parameters=values)
