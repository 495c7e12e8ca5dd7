"""The table of the ways to compute experts, and what speaks against each.

    own     own kernels, all experts in one call: each token's sum is added up in one place
    linear  expert by expert, each by the layer's way of this name; it waits to hear how many slots
            each has
    grouped a GPU's own kernels: products of all experts at once, the first with the gate at its
            end, and nothing waits
    definition
            the formula in plain PyTorch, whose gradients are autograd's

Each takes all variants. `forward` and `backward` have how they run.
"""

from collections.abc import Sequence

from torch import Tensor

from gatedffn.errors import ShapeError
from gatedffn.ops import gpu
from gatedffn.ops.experts import backward, forward, reference
from gatedffn.ops.experts.forward import Mixture
from gatedffn.ops.experts.reference import Stack
from gatedffn.ops.plan import Run, Way, Ways, gradients_of
from gatedffn.ops.spec import Matrix, Parameters, Spec, Tensors

CPU, GPU, BOTH = ("cpu",), ("gpu",), ("cpu", "gpu")
FORWARD, BACKWARD = ("inference", "forward"), ("backward",)
OPERANDS = ("x", "index", "weights", *Stack._fields)


def why_definition(spec: Spec) -> str | None:
    """Why a call is left to the definition; None when other ways take it."""
    if spec.hardware not in ("cpu", "gpu"):
        return f"there is no kernel for {spec.hardware}"
    _check_given(spec, Mixture(spec))
    return why_unlike(spec.operands)


def why_unlike(operands: Sequence[Matrix | Tensor | None]) -> str | None:
    """Why operands are not those that ways are for; None when they are."""
    x, _, _, *stack = operands
    assert x is not None
    for t in stack:
        if t is not None and t.dtype is not x.dtype:
            return f"x is {x.dtype}, a weight {t.dtype}"
        if t is not None and 0 in t.shape:
            return "a width is 0"
    return None


def _check_given(spec: Spec, mixture: Mixture) -> None:
    """Whoever hands saved tensors out again may have made others of them, which kernels trust."""
    for place, given in enumerate(spec.given):
        slots = mixture.tokens * mixture.slots * mixture.d_hidden
        numbers = slots if place else mixture.tokens * mixture.d_out
        if given.dtype is not mixture.dtype or given.numbers != numbers:
            raise ShapeError(
                f"a gradient or a saved tensor is {tuple(given.shape)} {given.dtype}: it does not "
                f"fit to the operands, {numbers} numbers of {mixture.dtype}"
            )


def key(spec: Spec) -> str:
    """What a measurement holds for; tokens count by powers of two."""
    mixture = Mixture(spec)
    stage = "backward" if spec.stage == "backward" else "forward"
    keeps = mixture.saves if spec.stage != "backward" else len(spec.given) > 1
    gate = spec.operands[3]
    assert gate is not None
    words = [
        stage + (f" to {' '.join(spec.wanted)}" if spec.wanted else ""),
        str(mixture.dtype).removeprefix("torch."),
        f"up to {1 << max(mixture.tokens - 1, 0).bit_length()} tokens",
        f"{mixture.slots} of {mixture.experts} experts",
        f"{mixture.d_model} -> {mixture.d_hidden} -> {mixture.d_out}",
        "gated" if mixture.gated else "not gated",
        *([] if gate.by_rows else ["stored by columns"]),
        *(["gate and up kept"] if keeps else []),
        *([f"{spec.threads} threads"] if spec.hardware == "cpu" else []),
    ]
    return ", ".join(words)


def _own_backward(spec: Spec) -> str | None:
    if not all(w is None or w.by_rows for w in spec.operands[3:6]):
        return "a weight is not stored row by row, as (experts, rows, columns)"
    return Mixture(spec).no_kernel


def _no_grouped(spec: Spec) -> str | None:
    mixture = Mixture(spec)
    if mixture.dtype not in gpu.DTYPES:
        return f"there is no kernel for {mixture.dtype}"
    if (missing := spec.own_functions or gpu.missing(spec.device)) is not None:
        return missing
    slots = mixture.tokens * mixture.slots
    if not slots:
        return "there are no tokens"
    from gatedffn.ops.feed_forward.gpu.tiles import MOST

    largest = max(slots, mixture.d_model, mixture.d_hidden, mixture.d_out)
    return None if largest <= MOST else f"a kernel counts up to {MOST}, a size is {largest}"


def _linear_waits(spec: Spec) -> str | None:
    if spec.hardware == "gpu" and _no_grouped(spec) is None:
        return "it waits for the device at every call, for how many slots each expert has"
    return None


def _grouped(spec: Spec) -> Run:
    from gatedffn.ops.experts.gpu import grouped

    return grouped.backward(spec) if spec.stage == "backward" else grouped.forward(spec)


def _definition(
    tensors: Tensors, variant: str, parameters: Parameters, settings: tuple[str, str, str]
) -> object:
    x, index, weights, *stack = tensors
    order, weigh, _ = settings
    given = (x, index, weights, Stack(*stack))  # type: ignore[arg-type]
    return reference.experts(*given, variant, dict(parameters), order, weigh)  # type: ignore[arg-type]


WAYS = Ways(
    ways=(
        Way("own", forward.own, CPU, FORWARD, lambda spec: Mixture(spec).no_kernel),
        Way("linear", forward.linear, BOTH, FORWARD, not_worth=_linear_waits),
        Way("own", backward.own, CPU, BACKWARD, _own_backward),
        Way("linear", backward.linear, BOTH, BACKWARD, not_worth=_linear_waits),
        Way("grouped", _grouped, GPU, why_not=_no_grouped),
    ),
    definition=_definition,  # type: ignore[arg-type]
    gradients=gradients_of(_definition, OPERANDS),  # type: ignore[arg-type]
    why_definition=why_definition,
    key=key,
    by_autograd=True,
)
