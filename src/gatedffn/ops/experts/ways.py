"""The table of the ways to compute experts, and what speaks against each.

    linear  expert by expert, each by the layer's way of this name
    definition
            the formula in plain PyTorch, whose gradients are autograd's

Each takes all variants. `forward` and `backward` have how they run.
"""

from gatedffn.errors import ShapeError
from gatedffn.ops.experts import backward, forward, reference
from gatedffn.ops.experts.forward import Mixture
from gatedffn.ops.experts.reference import Stack
from gatedffn.ops.plan import Way, Ways, gradients_of
from gatedffn.ops.spec import Parameters, Spec, Tensors

CPU, BOTH = ("cpu",), ("cpu", "gpu")
FORWARD, BACKWARD = ("inference", "forward"), ("backward",)
OPERANDS = ("x", "index", "weights", *Stack._fields)


def why_definition(spec: Spec) -> str | None:
    """Why a call is left to the definition; None when other ways take it."""
    if spec.hardware not in ("cpu", "gpu"):
        return f"there is no kernel for {spec.hardware}"
    mixture = Mixture(spec)
    _check_given(spec, mixture)
    for t in spec.operands[3:]:
        if t is None:
            continue
        if t.dtype is not mixture.dtype:
            return f"x is {mixture.dtype}, a weight {t.dtype}"
        if 0 in t.shape:
            return "a width is 0"
    return spec.unsuited_parameter(mixture.d_hidden)


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


def _definition(
    tensors: Tensors, variant: str, parameters: Parameters, settings: tuple[str, str, str]
) -> object:
    x, index, weights, *stack = tensors
    order, weigh, _ = settings
    given = (x, index, weights, Stack(*stack))  # type: ignore[arg-type]
    return reference.experts(*given, variant, dict(parameters), order, weigh)  # type: ignore[arg-type]


WAYS = Ways(
    ways=(
        Way("linear", forward.linear, BOTH, FORWARD),
        Way("linear", backward.linear, BOTH, BACKWARD),
    ),
    definition=_definition,  # type: ignore[arg-type]
    gradients=gradients_of(_definition, OPERANDS),  # type: ignore[arg-type]
    why_definition=why_definition,
    key=key,
    by_autograd=True,
)
