"""Short words for what many rows share: matrices, orders, places."""

from gatedffn.storage.model import Role, Stored

GATE_UP: tuple[Role, Role] = ("gate", "up")
UP_GATE: tuple[Role, Role] = ("up", "gate")
NO_BIAS = None


def matrix(
    name: str,
    *roles: Role,
    axes: str | None = None,
    bias: str | None = "bias",
    block: int | None = None,
    needs_bias: bool = False,
) -> Stored:
    """`name.weight` with `name.bias`, stored (out, in), unless told otherwise.

    A name that ends with a dot and a word, such as `wi.kernel`, has its bias beside it; a `bias`
    that holds a dot or stands for a name without one is a name of its own.
    """
    usual = "p d" if len(roles) == 2 else ("d h" if roles == ("down",) else "h d")
    whole = name if name.endswith((".kernel", ".w")) else f"{name}.weight"
    beside = None if bias is None else f"{whole.rpartition('.')[0]}.{bias}"
    return Stored(
        name=whole,
        roles=roles,
        axes=axes or usual,
        bias=beside,
        block=block,
        needs_bias=needs_bias,
    )


def array(
    name: str,
    *roles: Role,
    axes: str,
    bias: str | None = None,
    bias_axes: str | None = None,
    block: int | None = None,
    needs_bias: bool = False,
    viewed: str | None = None,
) -> Stored:
    """A parameter by its whole name."""
    return Stored(
        name=name,
        roles=roles,
        axes=axes,
        bias=bias,
        bias_axes=bias_axes,
        block=block,
        needs_bias=needs_bias,
        viewed=viewed,
    )


def three(gate: str, up: str, down: str, bias: str | None = "bias") -> tuple[Stored, ...]:
    return (
        matrix(gate, "gate", bias=bias),
        matrix(up, "up", bias=bias),
        matrix(down, "down", bias=bias),
    )


def turned(gate: str, up: str, down: str, bias: str = "bias") -> tuple[Stored, ...]:
    """Three matrices stored (in, out)."""
    return (
        matrix(gate, "gate", axes="d h", bias=bias),
        matrix(up, "up", axes="d h", bias=bias),
        matrix(down, "down", axes="h d", bias=bias),
    )


def packed(
    first: str,
    down: str,
    order: tuple[Role, Role],
    block: int | None = None,
    bias: str | None = "bias",
) -> tuple[Stored, ...]:
    return (matrix(first, *order, block=block, bias=bias), matrix(down, "down", bias=bias))


def two(up: str, down: str, bias: str | None = "bias") -> tuple[Stored, ...]:
    return (matrix(up, "up", bias=bias), matrix(down, "down", bias=bias))


def experts(
    first: str,
    down: str,
    order: tuple[Role, Role],
    axes: str = "e p d",
    down_axes: str = "e d h",
    block: int | None = None,
    bias: str | None = None,
    needs_bias: bool = False,
) -> tuple[Stored, ...]:
    """Two parameters that hold all experts; `bias` is what the names of their biases end with."""
    of_first, of_down = (None if bias is None else f"{name}{bias}" for name in (first, down))
    return (
        array(first, *order, axes=axes, bias=of_first, block=block, needs_bias=needs_bias),
        array(down, "down", axes=down_axes, bias=of_down, needs_bias=needs_bias),
    )


def stacked(
    gate: str, up: str, down: str, axes: str = "e h d", down_axes: str = "e d h"
) -> tuple[Stored, ...]:
    """Three parameters that hold all experts, without biases."""
    return (
        array(gate, "gate", axes=axes),
        array(up, "up", axes=axes),
        array(down, "down", axes=down_axes),
    )


MLP = ("layers.{layer}.mlp",)
BLOCKS = ("blocks.{layer}.mlp",)
H = ("h.{layer}.mlp",)
EXPERTS = ("layers.{layer}.mlp.experts",)
TORCHTITAN = ("layers.{layer}.moe.routed_experts.inner_experts", "layers.{layer}.moe.experts")
SHARED = ("layers.{layer}.mlp.shared_expert", "layers.{layer}.mlp.shared_experts")
FEED_FORWARD = ("layers.{layer}.feed_forward",)
MEGATRON = (
    "linear_fc1.layer_norm_weight",
    "linear_fc1.layer_norm_bias",
    "linear_fc1._extra_state",
    "linear_fc2._extra_state",
)
