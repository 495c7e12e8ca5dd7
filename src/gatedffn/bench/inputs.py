"""What every contestant of a workload gets: drawn from one seed, rounded to the dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedffn.bench.devices import place_of
from gatedffn.bench.workloads import SEED, VOCABULARY, Workload
from gatedffn.variants import VARIANTS


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input, the weights as `torch.nn.Linear` has them, and the gradient of the output.

    `gate` is None for a variant without a gate.
    """

    x: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    d_output: Tensor


@dataclass(frozen=True, slots=True)
class GatingInputs:
    """Both branches and the gradient of the hidden values, (tokens, d_hidden) each.

    `up` is None for a variant without a gate.
    """

    gate: Tensor
    up: Tensor | None
    d_hidden: Tensor


@dataclass(frozen=True, slots=True)
class ExpertsInputs:
    """The input, the experts of each token and what they are weighed by, in float32; the weights
    as transformers stacks them, gate first; and the gradient of the output.
    """

    x: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    d_output: Tensor


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """A text of one sequence, (1, tokens), as the numbers of its words."""

    ids: Tensor


AnyInputs = Inputs | GatingInputs | ExpertsInputs | DecoderInputs


def inputs_of(workload: Workload) -> AnyInputs:
    """What the contestants of a workload get, by what is measured."""
    if workload.part == "experts":
        return make_experts_inputs(workload)
    if workload.part == "decoder":
        return make_decoder_inputs(workload)
    return make_inputs(workload) if workload.part == "layer" else make_gating_inputs(workload)


def make_experts_inputs(workload: Workload) -> ExpertsInputs:
    """The same for every process."""
    drawn = _drawing(workload)
    count, d_model, d_hidden = workload.experts, workload.d_model, workload.d_hidden
    x, d_output = (drawn(workload.tokens, d_model) for _ in range(2))
    weights = drawn(workload.tokens, workload.slots).float().softmax(-1)
    gate_up = drawn(count * 2 * d_hidden, d_model, d_model**-0.5).view(count, -1, d_model)
    down = drawn(count * d_model, d_hidden, d_hidden**-0.5).view(count, d_model, d_hidden)
    return ExpertsInputs(x, workload.index.to(x.device), weights, gate_up, down, d_output)


def make_decoder_inputs(workload: Workload) -> DecoderInputs:
    """The same for every process."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, workload.past + workload.tokens)
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    return DecoderInputs(ids.to(place_of(workload.device).tensors))


def make_gating_inputs(workload: Workload) -> GatingInputs:
    """The same for every process."""
    drawn = _drawing(workload)
    gate = drawn(workload.tokens, workload.d_hidden)
    up = drawn(workload.tokens, workload.d_hidden) if VARIANTS[workload.variant].gated else None
    return GatingInputs(gate, up, drawn(workload.tokens, workload.d_hidden))


def make_inputs(workload: Workload) -> Inputs:
    """The same for every process; hidden and output values are of the size of the input's."""
    drawn = _drawing(workload)

    def weight(d_out: int, d_in: int) -> Tensor:
        return drawn(d_out, d_in, d_in**-0.5)

    x = drawn(workload.tokens, workload.d_model)
    gated = VARIANTS[workload.variant].gated
    gate = weight(workload.d_hidden, workload.d_model) if gated else None
    up = weight(workload.d_hidden, workload.d_model)
    down = weight(workload.d_model, workload.d_hidden)
    return Inputs(x, gate, up, down, drawn(workload.tokens, workload.d_model))


def _drawing(workload: Workload) -> Callable[..., Tensor]:
    """Draws matrices one after the other, where the workload is computed."""
    device = place_of(workload.device).tensors
    generator = torch.Generator(device).manual_seed(SEED)

    def drawn(lines: int, columns: int, std: float = 1.0) -> Tensor:
        values = torch.empty(lines, columns, device=device)
        return values.normal_(std=std, generator=generator).to(workload.torch_dtype)

    return drawn
