"""Which modules of a model look like feed-forward blocks: by their projections, never by a name."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mode

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.linalg import vector_norm

from gatedffn.interop.replacing.elsewhere import bare, is_elsewhere, own_class
from gatedffn.interop.replacing.trial import undisturbed, values
from gatedffn.roles import Path, Projection, hooked, read


class NotUnderstood(Exception):
    """Why a block is left as it is; caught by `replace`."""


class Touched(NotUnderstood):
    """It has a hook, an adapter or quantised weights: nobody looked further."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module with the projections of a feed-forward, or the reason why it cannot be one.

    `around` says that the module has other projections deeper inside: only its direct children
    are looked at, and its own forward must do the rest. `sure` says that the sizes leave little
    doubt, so that the module is reported when it turns out to be something else.
    """

    module: nn.Module
    projections: tuple[Projection, ...]
    around: bool
    sure: bool
    reason: NotUnderstood | None = None

    @property
    def d_in(self) -> int:
        """The width of the input, as far as the sizes say."""
        return self.projections[0].d_in


@dataclass(frozen=True, slots=True)
class Stacked:
    """A module that holds the weights of several experts, stacked."""

    module: nn.Module


def widths(module: nn.Module) -> tuple[int, int] | None:
    """The (in, out) sizes of a projection of whatever kind; None for a module that is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        # What was set when it was made, which a matrix that was narrowed since does not have.
        dense = weight is not None and weight.dim() == 2 and weight.is_floating_point()
        if weight is None or not dense or set(weight.shape) == {*sizes}:
            return sizes[0], sizes[1]
        return weight.shape[1], weight.shape[0]
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    if bias is None or bias.dim() != 1 or bias.shape[0] not in weight.shape:
        return None
    if bias.shape[0] == weight.shape[1]:
        return weight.shape[0], weight.shape[1]
    return weight.shape[1], weight.shape[0]


Found = list[tuple[Path, nn.Module]]  # projections and where they are
_NO_FORWARD = (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def candidates(module: nn.Module, parent: nn.Module | None) -> Iterator[Candidate]:
    """What a module could be by its projections: a feed-forward, or a layer that holds one."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward in _NO_FORWARD:
        return
    found = list(_projections(module, ()))
    direct: Found = [(path, child) for path, child in found if len(path) == 1]
    if (_fits(_sizes(found)) or _is_half(found, module, parent)) and not any(
        isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()
    ):
        yield _candidate(module, found, around=False)
    if len(direct) > 2:  # a run has to show which of them it is, if any
        yield replace(_candidate(module, direct, around=True), sure=False)
    elif len(direct) == 2 < len(found) and _fits(_sizes(direct)):
        yield _candidate(module, direct, around=True)


def _candidate(module: nn.Module, found: Found, *, around: bool) -> Candidate:
    sizes = _sizes(found)
    if len(found) == 1:
        sure = len(found[0][0]) == 1 and any(True for _ in _functions(module, found))
    elif all(size == sizes[0] and size[0] == size[1] for size in sizes):
        # The projections of attention look like that too, but for the activation.
        with undisturbed(module, False):
            sure = any(_activates(function) for function in _functions(module, found))
    else:
        known = {id(p) for _, child in found for p in child.parameters()}
        more = any(p.dim() > 1 and id(p) not in known for p in module.parameters())
        sure = _closes(sizes) and (around or not more)
    try:
        projections = tuple(projection(path, child) for path, child in found)
    except NotUnderstood as reason:
        return Candidate(module, (), around, sure, reason)
    return Candidate(module, _in_order(projections), around, sure)


def scripted(module: nn.Module) -> bool:
    """Whether a module was compiled by TorchScript, and its matrices are those of a block."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    sizes = [(p.shape[1], p.shape[0]) for p in module.parameters() if p.dim() == 2]
    return len(sizes) > 1 and _fits(sizes) and _closes(sizes)


def _sizes(found: Found) -> list[tuple[int, int]]:
    return [size for _, child in found if (size := widths(child)) is not None]


def _in_order(projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
    """The projection down last, as far as the sizes say."""
    if len(projections) == 2:
        one, two = projections
        return projections if one.d_out in (two.d_in, 2 * two.d_in) else (two, one)
    if len(projections) == 3:
        for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
            p, q, r = projections[i], projections[j], projections[k]
            if (p.d_in, p.d_out) == (q.d_in, q.d_out) and r.d_in == p.d_out:
                return p, q, r
    d_in = mode(p.d_in for p in projections)
    return tuple(sorted(projections, key=lambda p: p.d_in != d_in))  # what takes the input first


def experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts, stacked in three dimensions."""
    stacks = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    one_number = len({len(p) for p in stacks}) == 1
    square = all(p.shape[1] == p.shape[2] for p in stacks)
    alone = any(1 in p.shape[1:] for p in stacks)
    several = all(len(p) > 1 for p in stacks) and one_number
    return len(stacks) >= 2 and not square and not alone and (several or matched(stacks))


def matched(stacks: Sequence[Tensor]) -> bool:
    """Whether the sizes of two or three stacks are those of experts, either way round."""
    sizes = [(p.shape[1], p.shape[2]) for p in stacks]
    ways = itertools.product(*((size, size[::-1]) for size in sizes))
    orders = (order for way in ways for order in itertools.permutations(way))
    return len(stacks) in (2, 3) and any(
        len({*first}) == 1
        and first[0][0] == down[1]
        and first[0][1] in (down[0], 2 * down[0] if len(first) == 1 else down[0])
        for *first, down in orders
    )


def _projections(module: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        if widths(child) is not None:
            yield (*path, name), child
        else:
            yield from _projections(child, (*path, name))


def _fits(sizes: list[tuple[int, int]]) -> bool:
    """Whether two or three sizes could be those of a block, or one those of its first half."""
    if len(sizes) == 1:
        return sizes[0][1] > sizes[0][0]
    if len(sizes) == 2:
        return any(first[1] in (second[0], 2 * second[0]) for first, second in (sizes, sizes[::-1]))
    return len(sizes) == 3 and any(
        sizes[i] == sizes[j] and sizes[k][0] == sizes[i][1]
        for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0))
    )


def _is_half(found: Found, module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module beside it undoes the only projection of a module, whatever its width."""
    if len(found) != 1 or parent is None:
        return False
    back = [size[::-1] for size in _sizes(found)]
    others = (child for child in parent.children() if child is not module)
    return any(_sizes(list(_projections(other, ()))) == back for other in others)


def _closes(sizes: list[tuple[int, int]]) -> bool:
    """Whether the width that goes in comes out again."""
    return sum(d_in == sizes[0][0] for d_in, _ in sizes) == len(sizes) - 1 and any(
        d_out == sizes[0][0] for _, d_out in sizes
    )


def _functions(module: nn.Module, found: Found) -> Iterator[Callable[..., object]]:
    """What a module has beside its projections that could be an activation."""
    own = {path[0] for path, _ in found}
    for name, child in module._modules.items():
        silent = child is None or name in own or isinstance(child, (nn.Dropout, nn.Identity))
        if child is not None and not silent and not any(True for _ in child.parameters()):
            yield child
    for value in vars(module).values():
        if callable(value) and not isinstance(value, type):
            yield value


def _activates(function: Callable[..., object]) -> bool:
    """Whether a function changes numbers one by one."""
    x = torch.tensor([-2.0, -0.5, 1.0, 3.0], device="cpu")
    try:
        with torch.no_grad():
            one, other = function(x), function(x.flip(0))
    except Exception:  # whatever a stranger's code raises, it is no activation
        return False
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != x.shape:
        return False
    return torch.equal(one.flip(0), other) and not torch.equal(one, x)


def projection(path: Path, module: nn.Module) -> Projection:
    """A child that can be read as a matrix and a bias.

    Raises:
        NotUnderstood: it has a hook, or is quantised, or computes something else.
    """
    name, kind = ".".join(path), own_class(module)
    sizes = widths(module)
    assert sizes is not None
    weight = module._parameters.get("weight")
    if getattr(module, "_is_fsdp_managed_module", False) and (weight is None or weight.dim() != 2):
        raise Touched(
            f"{name} is held flat by FullyShardedDataParallel: replace the model before it is "
            "wrapped, or use fully_shard"
        )
    if weight is None or any(m is not module for m in module.modules()):
        raise Touched(
            f"{name} is a {kind.__module__}.{kind.__name__}, not a plain projection: it is "
            "quantised, or has an adapter (replace the model before adding adapters)"
        )
    if is_elsewhere((weight,)):
        module = bare(module)  # what an engine has put on it is called then too
    plain = not hooked() and read(module, Projection((), kind, *sizes)) is not None
    if not weight.is_floating_point() or not plain:
        raise Touched(f"{name} has quantised weights, a hook or a forward of its own")
    if weight.is_inference():
        raise Touched(f"{name} was made in inference mode, and can have no gradient: clone it")
    if kind is nn.Linear:
        return Projection(path, kind, *sizes)
    transposed = _is_transposed(name, module, weight)
    d_in, d_out = weight.shape if transposed else weight.shape[::-1]
    return Projection(path, kind, d_in, d_out, transposed)


def _is_transposed(name: str, module: nn.Module, weight: Tensor) -> bool:
    """Which way round a class that is not `nn.Linear` multiplies, by trying."""
    if set(module._parameters) - {"weight", "bias"} or any(True for _ in module.buffers()):
        raise NotUnderstood(f"{name} has more parameters than a weight and a bias")
    fits = [turned for turned in (False, True) if _multiplies(module, weight, turned)]
    if len(fits) != 1:
        raise NotUnderstood(
            f"{name} is a {type(module).__name__}: what it computes from its weight could not be "
            "told"
        )
    return fits[0]


def _multiplies(module: nn.Module, weight: Tensor, transposed: bool) -> bool:
    """Whether in both modes a projection gives the product and its gradients, and no more."""
    generator = torch.Generator("cpu").manual_seed(0)
    elsewhere = is_elsewhere((weight,))
    device = torch.device("cpu") if elsewhere else weight.device

    def drawn(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, device="cpu").to(device, t.dtype)

    weight = weight.detach()
    if elsewhere or not weight.any():  # to zeros, as adapters begin, everything would fit
        weight = drawn(weight)
    parameters = {"weight": weight.requires_grad_()}
    bias = module._parameters.get("bias")
    if bias is not None:
        parameters["bias"] = (drawn(bias) if elsewhere else bias.detach()).requires_grad_()
    limit = torch.finfo(weight.dtype).max ** 0.5
    numbers = values((2, 3, weight.shape[0 if transposed else 1]), generator).clamp(-limit, limit)
    numbers[0].clamp_(-1.0, 1.0)
    x = numbers.to(weight).requires_grad_()

    def product(x: Tensor) -> Tensor:
        return F.linear(x, weight.t() if transposed else weight, parameters.get("bias"))

    def results(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = function(x)
        gradients = torch.autograd.grad(y.sum(), [x, *parameters.values()])
        return [*y.detach(), *(t[:64] for t in gradients)]  # some rows of a large one tell as much

    for training in (False, True):
        with undisturbed(module, training):
            try:
                theirs = results(lambda x: functional_call(module, parameters, (x,)))
                ours = results(product)
            except Exception:  # whatever a stranger's code raises, it is not this product
                return False
        fits = (a.shape == b.shape and close(a, b) for a, b in zip(theirs, ours, strict=True))
        if len(theirs) != len(ours) or not all(fits):
            return False
    return True


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same products differ by rounding alone, relative to their norm.

    >>> close(torch.ones(3), torch.ones(3)), close(torch.ones(3), torch.zeros(3))
    (True, False)
    """
    unit = torch.finfo(one.dtype).eps
    off, norm = (vector_norm(t, dtype=torch.float64) for t in (one - other, other))
    # Half precision rounds the hidden values in other places; more bits leave less to excuse.
    return bool(off <= (8 if unit > 1e-4 else 64) * unit * norm)
