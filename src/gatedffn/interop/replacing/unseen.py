"""What a block computes whose forward reads the weights itself, told by its output alone."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.interop.replacing.hypotheses import compute, formulas
from gatedffn.interop.replacing.probe import described, splits_of
from gatedffn.interop.replacing.recording import Recording, arguments, run
from gatedffn.interop.replacing.roles import BlockRoles
from gatedffn.interop.replacing.structure import Candidate, NotUnderstood
from gatedffn.interop.replacing.trial import undisturbed
from gatedffn.roles import Projection, at

VALUES = 4096  # hidden values, at least
LARGE = 1e5  # times the input: brings every limit of half precision into reach
ROUNDING = 1e-10  # of float64, after two products
MARGIN = 1e-5  # relative to the largest output; erf and tanh differ by more
SPREAD = 3.0  # of the values before the activation


def roles_unseen(candidate: Candidate) -> BlockRoles:
    """The roles in a block from a copy of it in float64, with other weights.

    Raises:
        NotUnderstood: no variant gives its output, or more than one does.
    """
    if len(candidate.projections) < 2 or len(arguments(candidate.module)) != 1:
        raise NotUnderstood("its forward does not call its projections")
    module = copy.deepcopy(candidate.module).double()
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = SPREAD * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, device="cpu"))
    *first, down = candidate.projections
    tokens = max(4, VALUES // down.d_in)
    device = next(module.parameters()).device
    x = torch.randn(tokens, candidate.d_in, generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(device)

    def answers(x: Tensor) -> Recording:
        return Recording(x, answered={p.path: _project(module, p, x) for p in first})

    with torch.no_grad():
        outputs = [_output(module, x, training) for training in (False, True)]
        matches = []
        splits = splits_of(first, down)
        small = answers(x)
        for word, split in splits.items():
            gate, up = split(small)
            hidden = partial(compute, module=module, gate=gate, up=up)
            for formula in next(iter(formulas(module, (), gated=gate is not None))):
                off = _off(_project(module, down, hidden(formula)), outputs[0])
                if off < MARGIN:
                    matches.append((off, word, formula))
    if not matches or max(off for off, *_ in matches) > ROUNDING:
        raise NotUnderstood(
            "its forward does not call its projections, and no variant gives its output"
        )
    _, word, formula = matches[0]
    with torch.no_grad():
        gate, up = splits[word](answers(LARGE * x))
        large = _project(module, down, compute(formula, module, gate, up))
        if not _off(large, _output(module, LARGE * x, False)) <= ROUNDING:
            raise NotUnderstood(f"on a large input it gives something else than {formula.row.name}")
    roles = described(word, formula, first, down)
    if _off(outputs[1], outputs[0]) > ROUNDING:
        raise NotUnderstood("its forward does not call its projections, and drops in training")
    return roles


def _output(module: nn.Module, x: Tensor, training: bool) -> Tensor:
    with undisturbed(module, training), torch.no_grad():
        made = run(module, x, 0)
    if not isinstance(made, Tensor):
        raise NotUnderstood("its forward does not return one tensor")
    return made


def _project(module: nn.Module, projection: Projection, x: Tensor) -> Tensor:
    parameters = at(module, projection.path)._parameters
    weight = parameters["weight"]
    assert weight is not None
    return F.linear(x, weight.t() if projection.transposed else weight, parameters.get("bias"))


def _off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
