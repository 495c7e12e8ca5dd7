"""Modules of stacked experts as others write them: one that is right, and mutants of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COUNT, WIDTH, HIDDEN = 4, 12, 8


class Stack(nn.Module):
    """Packed halves, (experts, out, in), an expert at a time."""

    up_size = 2 * HIDDEN

    def __init__(self) -> None:
        super().__init__()
        self.count = COUNT
        self.first = nn.Parameter(torch.randn(COUNT, self.up_size, WIDTH))
        self.second = nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN))
        self.act = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        for expert in range(self.count):
            tokens, slots = torch.where(index == expert)
            made = made.index_add(
                0, tokens, self.one(x[tokens], expert, weights[tokens, slots, None])
            )
        return made

    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return self.down(self.gated(self.up(x, expert)), expert) * weight

    def up(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.first[expert])

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        made: Tensor = self.act(gate) * up
        return made

    def down(self, hidden: Tensor, expert: int) -> Tensor:
        return F.linear(hidden, self.second[expert])


# What is another storage, order or formula of the table, and is replaced.


class UpFirst(Stack):
    def gated(self, both: Tensor) -> Tensor:
        up, gate = both.chunk(2, -1)
        made: Tensor = self.act(gate) * up
        return made


class NoGate(Stack):
    up_size = HIDDEN

    def gated(self, both: Tensor) -> Tensor:
        return F.relu(both).square()


class WeighedBefore(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return self.down(self.gated(self.up(x * weight, expert)), expert)


class Biased(Stack):
    """Transposed, interleaved, with biases, and a clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 2.0
        self.first = nn.Parameter(torch.randn(COUNT, WIDTH, self.up_size))
        self.second = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH))
        self.first_bias = nn.Parameter(torch.randn(COUNT, self.up_size))
        self.second_bias = nn.Parameter(torch.randn(COUNT, WIDTH))

    def up(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.first[expert] + self.first_bias[expert]

    def gated(self, both: Tensor) -> Tensor:
        gate, up = (
            both[..., ::2].clamp(max=self.limit),
            both[..., 1::2].clamp(-self.limit, self.limit),
        )
        made: Tensor = self.act(gate) * up
        return made

    def down(self, hidden: Tensor, expert: int) -> Tensor:
        return hidden @ self.second[expert] + self.second_bias[expert]


class Separate(nn.Module):
    """Three matrices, every expert on every token, weighed by what it was chosen with."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH))
        self.w2 = nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN))
        self.w3 = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, mask: None = None) -> Tensor:
        chosen = F.one_hot(index, COUNT).to(weights) * weights[..., None]
        gate = torch.einsum("sd,efd->sef", x, self.w1)
        hidden = F.gelu(gate) * torch.einsum("sd,efd->sef", x, self.w3)
        return torch.einsum("sef,edf,ske->sd", hidden, self.w2, chosen)


VARIANTS = {
    Stack: ("swiglu", "gate_up"),
    UpFirst: ("swiglu", "up_gate"),
    NoGate: ("relu2", None),
    WeighedBefore: ("swiglu", "gate_up"),
    Biased: ("swiglu_clamp", "interleaved"),
    Separate: ("geglu", None),
}


# What the operator does not compute. Most differ in what a single token would not show.


class ScoresSquared(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return super().one(x, expert, weight * weight)


class ScoresPositive(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return super().one(x, expert, weight.clamp(min=0.0))


class ScoresTwice(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return super().one(x * weight, expert, weight)


class ScoresOnHidden(Stack):
    """Where there is a bias it is not weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(COUNT, WIDTH))

    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return self.down(self.gated(self.up(x, expert)) * weight, expert) + self.bias[expert]


class ScoresWithoutGradient(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return super().one(x, expert, weight.detach())


class ExpertDropped(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return super().one(x, expert, weight * (expert != 1))


class ExpertsSwapped(Stack):
    def up(self, x: Tensor, expert: int) -> Tensor:
        return super().up(x, expert ^ 1)


class OneActivationChanged(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        if expert != 1:
            return super().one(x, expert, weight)
        gate, up = self.up(x, expert).chunk(2, -1)
        return self.down(F.gelu(gate) * up, expert) * weight


class ActivationChanged(Stack):
    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.softsign(gate) * up


class ClampedAfter(Stack):
    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        made: Tensor = self.act(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)
        return made


class GateScaled(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.5

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        made: Tensor = self.act(gate * self.scale) * up
        return made


class Capacity(Stack):
    """An expert takes no more than so many tokens."""

    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        kept = torch.arange(len(x))[:, None] < 64
        return super().one(x, expert, weight) * kept


class LastTokenDropped(Stack):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        made = super().forward(x, index, weights)
        return torch.cat([made[:-1], 0.0 * made[-1:]])


class OnceOnly(Stack):
    """A token that names an expert twice gets it once."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        twice = (index[:, 1:] == index[:, :1]) if index.shape[1] > 1 else index[:, :0].bool()
        weights = torch.cat([weights[:, :1], weights[:, 1:].masked_fill(twice, 0.0)], 1)
        return super().forward(x, index, weights)


class Residual(Stack):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x + super().forward(x, index, weights)


class IdentityBeyond(Stack):
    """Experts above the others hand on what they get."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        beyond = (weights * (index >= self.count)).sum(-1, keepdim=True)
        return super().forward(x, index, weights) + beyond * x


class NormAfter(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        made = self.down(self.gated(self.up(x, expert)), expert)
        return F.layer_norm(made, made.shape[-1:]) * weight


class NormBetween(Stack):
    def gated(self, both: Tensor) -> Tensor:
        made = super().gated(both)
        return F.layer_norm(made, made.shape[-1:])


class DropsInTraining(Stack):
    def gated(self, both: Tensor) -> Tensor:
        return F.dropout(super().gated(both), 0.5, self.training)


class SummedInHalf(Stack):
    def one(self, x: Tensor, expert: int, weight: Tensor) -> Tensor:
        return super().one(x, expert, weight).bfloat16().to(x)


class Counts(Stack):
    """Its forward leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def gated(self, both: Tensor) -> Tensor:
        self.calls.append(len(both))
        return super().gated(both)


class Averages(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.load: Tensor
        self.register_buffer("load", torch.zeros(()))

    def gated(self, both: Tensor) -> Tensor:
        self.load += len(both)
        return super().gated(both)


MUTANTS = (
    *(ScoresSquared, ScoresPositive, ScoresTwice, ScoresOnHidden, ScoresWithoutGradient),
    *(ExpertDropped, ExpertsSwapped, OneActivationChanged, ActivationChanged, ClampedAfter),
    *(GateScaled, Capacity, LastTokenDropped, OnceOnly, Residual, IdentityBeyond, NormAfter),
    *(NormBetween, DropsInTraining, SummedInHalf, Counts, Averages),
)
