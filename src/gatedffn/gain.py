"""What is gained: the time of a layer beside that of the code which computed it before.

A replaced block has that code still; beside a `FeedForward` of one's own stands the layer as one
writes it in PyTorch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.layers import FeedForward
from gatedffn.ops import gpu, measure
from gatedffn.ops.gating import reference
from gatedffn.roles import at
from gatedffn.variants import VARIANTS

PLAIN: dict[tuple[str, tuple[float, ...]], Callable[[Tensor], Tensor]] = {
    ("relu", ()): F.relu,
    ("gelu", ()): F.gelu,
    ("gelu_tanh", ()): partial(F.gelu, approximate="tanh"),
    ("swish", (1.0,)): F.silu,
    ("sigmoid", ()): torch.sigmoid,
    ("tanh", ()): torch.tanh,
}
"""Functions as one calls them in PyTorch, by name and numbers; the others are the definition's."""


@dataclass(frozen=True, slots=True)
class Gain:
    """The milliseconds of inference for some tokens: by the other code, and here.

    `sure` says that the rounds agreed on which is the faster one. `plain` that the other code is
    not the model's own, but PyTorch as one writes it.
    """

    tokens: int
    other: float
    here: float
    sure: bool = True
    plain: bool = False

    def __str__(self) -> str:
        whose = "plain PyTorch" if self.plain else "the model's own code"
        return f"{whose} {self.other:.3f} ms, here {self.here:.3f} ms: {self.words}"

    @property
    def words(self) -> str:
        """`1.3 times as fast`, that there is no difference, or that nothing can be said.

        >>> Gain(1, 2.0, 1.0).words, Gain(1, 1.0, 1.01).words, Gain(1, 1.0, 2.0).words
        ('2.0 times as fast', 'no difference', 'slower, 2.0 times the time')
        """
        ratio = self.other / self.here
        if not self.sure:
            return "not told apart"
        if measure.MARGIN < ratio < 1 / measure.MARGIN:
            return "no difference"
        if ratio < 1:
            return f"slower, {1 / ratio:.1f} times the time"
        return f"{ratio:.1f} times as fast" if ratio < 9.95 else f"{ratio:.0f} times as fast"


def counted(tokens: int) -> str:
    """`1 token`, `1,024 tokens`."""
    return f"{tokens:,} token{'s' * (tokens != 1)}"


def closing(gains: Sequence[Gain], beside: str = "") -> str:
    """All of them in one sentence; those for equal numbers of tokens are added up.

    `beside` says what was measured beside this library, where that is not what the gains say.

    >>> closing([Gain(1, 2.0, 1.0), Gain(1, 3.0, 1.5), Gain(256, 4.0, 4.0)])
    "Beside the model's own code: at 1 token 2.0 times as fast, at 256 tokens no difference."
    """
    parts = []
    for tokens in dict.fromkeys(gain.tokens for gain in gains):
        same = [gain for gain in gains if gain.tokens == tokens]
        other, here = sum(gain.other for gain in same), sum(gain.here for gain in same)
        added = Gain(tokens, other, here, any(gain.sure for gain in same))
        parts.append(f"at {counted(tokens)} {added.words}")
    whose = "plain PyTorch" if all(gain.plain for gain in gains) else "the model's own code"
    return f"Beside {beside or whose}: {', '.join(parts)}."


def gain_of(module: nn.Module, inputs: Sequence[Tensor]) -> Gain | None:
    """The gain of a layer on some inputs, in inference; None where there is no other code.

    Raises: what the other code raises.
    """
    own_code = getattr(module, "_gatedffn_own_code", None)
    other: Callable[..., Any]
    if own_code is not None:
        state: Any = module
        if state._roles.around is not None or len(state._gatedffn.arguments) != len(inputs):
            return None  # it computes more than the layer, or of more
        other = own_code
    elif isinstance(module, FeedForward):
        other = partial(plain_forward, module)
    else:
        return None
    x = inputs[0]
    finish = partial(gpu.finish, x.device) if x.is_cuda else measure.nothing
    with torch.no_grad():
        ways = {"other": partial(other, *inputs), "here": partial(module, *inputs)}
        times, sure = measure.side_by_side(ways, finish)
    tokens = x.shape[:-1].numel()
    other_ms, here_ms = (1e3 * times[name] for name in ways)
    return Gain(tokens, other_ms, here_ms, sure, own_code is None)


def plain_forward(layer: FeedForward, x: Tensor) -> Tensor:
    """What a layer computes, as one writes it in PyTorch: its children, and functions of torch."""
    roles, row = layer._roles, VARIANTS[layer.variant]
    parameters = layer.activation_parameters()
    up: Tensor = at(layer, roles.up.path)(x)
    gate = up if roles.gate is None else at(layer, roles.gate.path)(x)
    numbers = tuple(parameters.values())
    phi = None
    if not any(isinstance(number, Tensor) for number in numbers):
        phi = PLAIN.get((row.phi, numbers))  # type: ignore[arg-type]
    if row.psi in (None, "identity") and phi is not None:
        hidden = phi(gate) if row.psi is None else phi(gate) * up
    else:
        hidden = reference.gating(gate, up if row.gated else None, row.name, parameters)
    down = roles.down
    return hidden if down is None else at(layer, down.path)(hidden)
