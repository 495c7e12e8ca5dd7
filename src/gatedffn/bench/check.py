"""Whether a contestant computes the layer: without that it gets no figure.

Truth is the reference in float64 on the rounded inputs, and an error is scale-free, as everywhere
in this project: at most twice that of eager PyTorch in the same dtype and half a rounding unit,
for the largest error and for the RMS one; `Contestant.tolerance` says who may have more. What is
checked is what the timed step itself left: its output and input gradient at some tokens, its
weight gradients at some hidden units. Both slices are exact problems of their own, a token's
values depending on no other token and a hidden unit's gradients on no other unit, so that truth
costs little at any size. The rest must be finite.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from gatedffn.bench import decoder
from gatedffn.bench.contestants import by_definition, plain_feed_forward
from gatedffn.bench.gating import Function, plain_gating
from gatedffn.bench.inputs import AnyInputs, DecoderInputs, ExpertsInputs, GatingInputs, Inputs
from gatedffn.bench.workloads import SEED, Workload
from gatedffn.variants import VARIANTS

FACTOR = 2.0  # times eager's error; design section 5
MOST = 64
"""Tokens, and hidden units, that are checked: the first, the last, and others by chance."""

Results = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Slices:
    """Which tokens and which hidden units are checked."""

    tokens: Tensor
    units: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The worst of a contestant's results: its errors, and the larger one over what is allowed."""

    name: str
    largest: float
    rms: float
    ratio: float


def make_slices(workload: Workload) -> Slices:
    """The same for every process."""
    generator = torch.Generator().manual_seed(SEED)

    def some(count: int) -> Tensor:
        drawn = torch.randperm(count, generator=generator)[: MOST - 2]
        return torch.tensor(sorted({0, count - 1, *drawn.tolist()}))

    return Slices(some(workload.tokens), some(workload.d_hidden))


def cut(results: Results, slices: Slices) -> dict[str, Tensor]:
    """The checked part of the results, in float32 on the processor."""
    where = {
        "output": (slices.tokens,),
        "x": (slices.tokens,),
        "weights": (slices.tokens,),
        # The same of one layer and of stacked ones.
        "gate": (..., slices.units, slice(None)),
        "up": (..., slices.units, slice(None)),
        "down": (..., slices.units),
        "hidden": (slices.tokens,),
        "d_gate": (slices.tokens,),
        "d_up": (slices.tokens,),
    }
    return {name: _exactly(tensor.detach()[where[name]]).cpu() for name, tensor in results.items()}


def _exactly(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True, slots=True)
class Judge:
    """The truth of a workload's checked part, and what eager PyTorch makes of it."""

    truth: Results
    eager: Results
    unit: float

    def verdict(self, results: Results) -> Verdict:
        """Of results that `cut` has cut.

        Raises:
            ValueError: a result is missing, or of another shape.
        """
        if results.keys() != self.truth.keys():
            raise ValueError(f"its results are {sorted(results)}, not {sorted(self.truth)}")
        return max((self._one(name, results[name]) for name in self.truth), key=lambda v: v.ratio)

    def _one(self, name: str, result: Tensor) -> Verdict:
        truth = self.truth[name]
        if result.shape != truth.shape:
            raise ValueError(f"{name} is {tuple(result.shape)}, not {tuple(truth.shape)}")
        errors, bounds = _errors(result, truth), _errors(self.eager[name], truth)
        ratios = [
            error / (FACTOR * bound + self.unit)
            for error, bound in zip(errors, bounds, strict=True)
        ]
        # A comparison with NaN is false: it must count as infinitely wrong.
        worst = max(ratios) if all(ratio == ratio for ratio in ratios) else float("inf")
        return Verdict(name=name, largest=errors[0], rms=errors[1], ratio=worst)


def _errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    off = result.double() - truth
    return (
        (off.abs().max() / truth.abs().max()).item(),
        (off.square().mean() / truth.square().mean()).sqrt().item(),
    )


def make_judge(workload: Workload, inputs: AnyInputs, slices: Slices) -> Judge:
    """Computes truth and eager PyTorch's result for the slices, on the device of the inputs."""
    if isinstance(inputs, GatingInputs):
        truth, eager = _of_gating(workload, inputs, slices)
    elif isinstance(inputs, ExpertsInputs):
        truth, eager = (
            _of_experts(workload, inputs, slices, dtype)
            for dtype in (torch.float64, workload.torch_dtype)
        )
    elif isinstance(inputs, DecoderInputs):
        truth, eager = (
            cut(_of_decoder(workload, inputs, dtype), slices)
            for dtype in (torch.float64, workload.torch_dtype)
        )
    else:
        truth, eager = _of_layer(workload, inputs, slices)
    truth, eager = _on_host(truth), _on_host(eager)
    return Judge(truth, eager, torch.finfo(workload.torch_dtype).eps / 2)


def _on_host(tensors: Results) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _of_gating(
    workload: Workload, inputs: GatingInputs, slices: Slices
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = {"d_gate": inputs.gate, "d_up": inputs.up}
    exact: Function = partial(
        by_definition, variant=VARIANTS[workload.variant], parameters=workload.parameters
    )
    eager = plain_gating(workload)
    both = []
    for function, dtype in ((exact, torch.float64), (eager, workload.torch_dtype)):
        branches = {
            name: tensor[slices.tokens].to(dtype).requires_grad_(workload.training)
            for name, tensor in given.items()
            if tensor is not None
        }
        hidden = function(*branches.values())
        results = {} if workload.backward else {"hidden": hidden.detach()}
        if workload.training:
            grad = inputs.d_hidden[slices.tokens].to(dtype)
            gradients = torch.autograd.grad(hidden, list(branches.values()), grad)
            results |= dict(zip(branches, gradients, strict=True))
        both.append(results)
    return both[0], both[1]


def _of_experts(
    workload: Workload, inputs: ExpertsInputs, slices: Slices, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Expert by expert, whose weights alone are widened: all of them would not fit."""
    tokens, training = slices.tokens, workload.training
    x, d_output = (t[tokens].to(dtype) for t in (inputs.x, inputs.d_output))
    weights = inputs.weights[tokens].to(torch.promote_types(dtype, torch.float32))
    results = {"output": torch.zeros_like(x)}
    if training:
        results |= {"x": torch.zeros_like(x), "weights": torch.zeros_like(weights)}
    index = inputs.index[tokens]
    for expert in sorted({*index.flatten().tolist()}):
        at, slot = (index == expert).nonzero(as_tuple=True)
        halves = inputs.gate_up[expert].to(dtype).chunk(2)
        given = [x[at].requires_grad_(training), weights[at, slot].requires_grad_(training)]
        y = _one_expert(workload, given, (*halves, inputs.down[expert].to(dtype)))
        results["output"].index_add_(0, at, y.detach())
        if training:
            of_x, of_weights = torch.autograd.grad(y, given, d_output[at])
            results["x"].index_add_(0, at, of_x)
            results["weights"][at, slot] = of_weights
    if training:
        results |= _of_units(workload, inputs, slices.units, dtype)
    return results


def _of_decoder(workload: Workload, inputs: DecoderInputs, dtype: torch.dtype) -> Results:
    """All tokens at once. Normalisations and angles are float32 in either dtype, as transformers
    has them.
    """
    model = decoder.make_decoder(workload, inputs.ids.device).to(dtype)
    if not workload.training:
        with torch.no_grad():
            return {"output": model(input_ids=inputs.ids, use_cache=False).logits[0, -1:]}
    scores = decoder.train(model, inputs)
    of_layer = decoder.first_layer(model)
    gradients = {name: weight.grad for name, weight in of_layer.items() if weight.grad is not None}
    return {"output": scores.detach()[0], **gradients}


def _of_units(
    workload: Workload, inputs: ExpertsInputs, units: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradients of some hidden units of each expert, over all tokens."""
    found: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    wide = torch.promote_types(dtype, torch.float32)
    for expert in range(workload.experts):
        at, slot = (inputs.index == expert).nonzero(as_tuple=True)
        gate, up = (half[units] for half in inputs.gate_up[expert].chunk(2))
        stacked = [t.to(dtype).requires_grad_() for t in (gate, up, inputs.down[expert][:, units])]
        given = [inputs.x[at].to(dtype), inputs.weights[at, slot].to(wide)]
        y = _one_expert(workload, given, tuple(stacked))
        gradients = torch.autograd.grad(y, stacked, inputs.d_output[at].to(dtype))
        for name, gradient in zip(found, gradients, strict=True):
            found[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def _one_expert(workload: Workload, given: list[Tensor], stacked: tuple[Tensor, ...]) -> Tensor:
    """What an expert gives to some tokens, weighed: in the dtype of `x`, as transformers has it."""
    (x, weights), (gate, up, down) = given, stacked
    hidden = by_definition(x @ gate.T, x @ up.T, variant=VARIANTS[workload.variant])
    return ((hidden @ down.T) * weights[:, None]).to(x.dtype)


def _of_layer(
    workload: Workload, inputs: Inputs, slices: Slices
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    of_tokens = Inputs(
        inputs.x[slices.tokens],
        inputs.gate,
        inputs.up,
        inputs.down,
        inputs.d_output[slices.tokens],
    )
    truth, eager = _forward_and_backward(workload, of_tokens, ("output", "x"))
    if workload.training:
        units = slices.units
        of_units = Inputs(
            inputs.x,
            None if inputs.gate is None else inputs.gate[units],
            inputs.up[units],
            inputs.down[:, units],
            inputs.d_output,
        )
        names = ("gate", "up", "down") if inputs.gate is not None else ("up", "down")
        more, more_eager = _forward_and_backward(workload, of_units, names)
        truth, eager = {**truth, **more}, {**eager, **more_eager}
    return truth, eager


def _forward_and_backward(
    workload: Workload, inputs: Inputs, wanted: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In float64 by the reference, and in the workload's dtype by eager PyTorch."""
    if not workload.training:
        wanted = ("output",)
    both = []
    for exact in (True, False):
        tensors = {
            name: getattr(inputs, name)
            .detach()
            .to(torch.float64 if exact else workload.torch_dtype)
            for name in ("x", "gate", "up", "down", "d_output")
            if getattr(inputs, name) is not None
        }
        d_output = tensors.pop("d_output")
        leaves = {
            name: tensor.requires_grad_(workload.training and name in wanted)
            for name, tensor in tensors.items()
        }
        output = _exact(workload, leaves) if exact else _eager(workload, leaves)
        results = {"output": output.detach()}
        if workload.training:
            sought = [name for name in wanted if name != "output"]
            gradients = torch.autograd.grad(output, [leaves[name] for name in sought], d_output)
            results |= dict(zip(sought, gradients, strict=True))
        both.append({name: results[name] for name in wanted})
    return both[0], both[1]


def _exact(workload: Workload, tensors: Mapping[str, Tensor]) -> Tensor:
    """The definition; its gradients are those of autograd."""
    variant = VARIANTS[workload.variant]
    branch = tensors["x"] @ tensors["up"].T
    gate = tensors["x"] @ tensors["gate"].T if variant.gated else branch
    up = branch if variant.gated else None
    return by_definition(gate, up, variant=variant) @ tensors["down"].T


def _eager(workload: Workload, tensors: Mapping[str, Tensor]) -> Tensor:
    weights = {f"{name}_proj.weight": tensors[name] for name in tensors if name != "x"}
    output: Tensor = functional_call(plain_feed_forward(workload), weights, (tensors["x"],))
    return output
