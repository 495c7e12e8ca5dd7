"""What a candidate computes, and the proof that its roles compute the same."""

import dataclasses

import torch
from torch import Tensor, nn

from gatedffn.interop.replacing.block import take_block
from gatedffn.interop.replacing.probe import roles_of
from gatedffn.interop.replacing.recording import DoesNotCall, arguments, run
from gatedffn.interop.replacing.roles import BlockRoles, Settings
from gatedffn.interop.replacing.structure import Candidate, NotUnderstood, close
from gatedffn.interop.replacing.taking import fixed_of, give_back
from gatedffn.interop.replacing.trial import differentiable, undisturbed
from gatedffn.interop.replacing.unseen import roles_unseen
from gatedffn.roles import at

LONG = 70  # tokens of an input that is longer than the others


def proven(found: Candidate) -> BlockRoles:
    """The roles of a candidate, by which it proves to compute the same.

    Raises:
        NotUnderstood: it is not understood, or does not.
    """
    module = found.module
    names = arguments(module)
    with torch.random.fork_rng([]), differentiable(module):
        try:
            roles = roles_of(found)
        except DoesNotCall:
            roles = roles_unseen(found)
        roles = dataclasses.replace(roles, fixed=fixed_of(module, roles))
        theirs = _results(module, found, len(names) - 1)
        try:
            take_block(module, names[0], roles, Settings(backend="definition"))
        except TypeError as error:
            raise NotUnderstood(f"its class cannot be changed: {error}") from error
        try:
            ours = _results(module, found, len(names) - 1)
            for one, other in zip(ours, theirs, strict=True):
                if other is None:  # not of this shape
                    continue
                if one is None or one.shape != other.shape or not close(one, other):
                    raise NotUnderstood("on random input it gives another result or gradient")
        finally:
            give_back(module)
    return roles


def _results(module: nn.Module, found: Candidate, others: int) -> list[Tensor | None]:
    """Output and gradient of the input on random input, in the dtype of the block.

    Outputs also of a single token, of a long input, and of one without a batch, where the block
    takes such.
    """
    projection = found.projections[0]
    weight = at(module, projection.path)._parameters["weight"]
    assert weight is not None
    generator = torch.Generator("cpu").manual_seed(1)
    results: list[Tensor | None] = []
    with undisturbed(module, False):
        x = torch.randn(2, 3, found.d_in, generator=generator, device="cpu")
        long = torch.randn(1, LONG, found.d_in, generator=generator, device="cpu").to(weight)
        x = x.to(weight).requires_grad_()
        y = run(module, x, others)
        y = y[0] if isinstance(y, tuple) else y
        if not isinstance(y, Tensor):
            raise NotUnderstood("its forward does not return a tensor")
        results.append(y)
        weights = torch.randn(y.shape, generator=generator, device="cpu").to(y)
        try:
            results += torch.autograd.grad(y, x, weights)
        except RuntimeError as error:
            raise NotUnderstood("its output has no gradient of its input") from error
        with torch.no_grad():
            for given in (x[:1, :1], long, long[0, :3]):
                try:
                    y = run(module, given, others)
                except Exception:  # whatever its code raises: without a batch it may be of no use
                    if given.dim() > 2:
                        raise
                    y = None
                results.append(y[0] if isinstance(y, tuple) else y)
    return [None if t is None else t.detach() for t in results]
