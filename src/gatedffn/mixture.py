"""A mixture of feed-forward layers: a router, the experts it chooses among, shared experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.errors import SettingError, ShapeError
from gatedffn.experts import Experts
from gatedffn.functional import Save, Weigh
from gatedffn.layers import Device, FeedForward, Learnable
from gatedffn.ops.checks import check_floating
from gatedffn.ops.gating.reference import widened_dtype
from gatedffn.ops.spec import without_autocast
from gatedffn.sizing import check_size
from gatedffn.variants import Variant

Score = Literal["softmax", "sigmoid"]

# No sum of weights that is divided by is below it; DeepSeek's code adds the same number.
LEAST_SUM = 1e-20


class Routing(NamedTuple):
    """Where a router sends each token, and what its losses and loads are made of.

    `index` and `weights`, (..., top_k), are the chosen experts and what their outputs are weighed
    by. `logits` and `scores`, (..., num_experts), are those of all experts: the products with the
    router's matrix, and their softmax or sigmoid. Numbers are float32 at least.

    The methods take a `mask` that broadcasts to the tokens, (...): where it is 0, as at padding, a
    token does not count. The routings of several layers make one,
    `Routing(*map(torch.stack, zip(*routings)))`, whose balance loss is the one that transformers
    has for a whole model.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is nobody's loss
    weights: Tensor
    scores: Tensor
    logits: Tensor

    def load(self, mask: Tensor | None = None) -> Tensor:
        """How often each expert was chosen, (num_experts), int64; the sum is tokens times top_k.

        Raises:
            ShapeError: a mask that does not broadcast to the tokens.
        """
        counted = self._counted(mask).unsqueeze(-1).expand_as(self.index).reshape(-1)
        load = counted.new_zeros(self.scores.shape[-1])
        return load.scatter_add(0, self.index.reshape(-1), counted)

    def balance_loss(self, mask: Tensor | None = None) -> Tensor:
        """The auxiliary loss that is least where all experts have equal loads.

        `num_experts * sum_i f_i P_i`: `f_i` is the load of expert i divided by the tokens, `P_i`
        the mean of its share of a token's scores. Equal loads and shares give top_k. Times a small
        factor it is added to the loss; the gradient is that of P, since f has none.

        Raises:
            ShapeError: a mask that does not broadcast to the tokens.

        Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, for one expert a token;
        with several as transformers computes it for Mixtral. Sigmoid scores are divided by their
        sum, as in DeepSeek-AI 2024 (arXiv 2412.19437), section 2.1.2.
        """
        shares = self.scores / self.scores.sum(-1, keepdim=True).clamp_min(LEAST_SUM)
        load = self.load(mask).to(shares.dtype)
        fractions = load / self._counted(mask).sum().clamp_min(1)
        return len(fractions) * (fractions * self._mean(shares, mask)).sum()

    def z_loss(self, mask: Tensor | None = None) -> Tensor:
        """The mean over tokens of `logsumexp(logits)^2`: it keeps logits small.

        Raises:
            ShapeError: a mask that does not broadcast to the tokens.

        Source: Zoph et al. 2022 (arXiv 2202.08906), the router z-loss.
        """
        return self._mean(self.logits.logsumexp(-1, keepdim=True).square(), mask).sum()

    def _mean(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over the tokens that count of values (..., n); 0 where there are none."""
        counted = self._counted(mask)
        kept = values.where(counted.unsqueeze(-1) != 0, 0.0)
        return kept.reshape(-1, kept.shape[-1]).sum(0) / counted.sum().clamp_min(1)

    def _counted(self, mask: Tensor | None) -> Tensor:
        """1 for each token that counts, else 0: (...), int64."""
        tokens = self.index.shape[:-1]
        if mask is None:
            return self.index.new_ones(tokens)
        fits = zip(reversed(mask.shape), reversed(tokens), strict=False)
        if mask.dim() > len(tokens) or any(size not in (1, wanted) for size, wanted in fits):
            raise ShapeError(
                f"mask is {tuple(mask.shape)}: it must broadcast to the tokens, {tuple(tokens)}"
            )
        return (mask != 0).to(self.index.dtype).expand(tokens)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How experts are chosen and weighed, as the arguments of `MixtureFeedForward` say.

    Raises:
        SettingError: what the number of experts does not allow, or no option.
    """

    num_experts: int
    top_k: int
    score: Score
    score_after_top_k: bool
    normalize: bool
    scale: float
    groups: int
    top_groups: int
    group_best: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "groups", "top_groups", "group_best"):
            check_size(name, getattr(self, name))
        if self.score not in get_args(Score):
            known = ", ".join(get_args(Score))
            raise SettingError(f"score is {self.score!r}: it must be one of {known}")
        if type(self.scale) not in (int, float) or not math.isfinite(self.scale):
            raise SettingError(f"scale is {self.scale!r}: it must be a finite number")
        if self.num_experts % self.groups:
            raise SettingError(
                f"groups is {self.groups}: it must divide num_experts, {self.num_experts}"
            )
        in_group = self.num_experts // self.groups
        limits = {
            "top_groups": (self.groups, "groups"),
            "top_k": (self.top_groups * in_group, "the number of experts in the chosen groups"),
        }
        if self.groups > 1:
            limits["group_best"] = in_group, "the number of experts in a group"
        if self.groups == self.top_groups > 1:
            raise SettingError(
                f"top_groups is {self.top_groups}: it leaves no group out, so choose less than "
                f"groups, {self.groups}, or leave out both"
            )
        for name, (most, what) in limits.items():
            if getattr(self, name) > most:
                raise SettingError(f"{name} is {getattr(self, name)}: {what}, {most}, is the most")

    def choose(self, scores: Tensor) -> Tensor:
        """The experts with the largest scores, in the groups with the largest."""
        if self.groups > 1:
            in_group = self.num_experts // self.groups
            grouped = scores.reshape(*scores.shape[:-1], self.groups, in_group)
            of_group = grouped.topk(self.group_best, -1).values.sum(-1)
            chosen = of_group.topk(self.top_groups, -1).indices
            closed = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, chosen, False)
            scores = grouped.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(-2)
        return scores.topk(self.top_k, -1).indices


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, rule: Rule
) -> Routing:
    """The routing of tokens by a router's matrix, computed in float32 at least, autocast or not.

    Raises:
        ShapeError: x is not (..., d_model), or not of a floating dtype.
    """
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"x is {tuple(x.shape)}: its last size must be d_model, {weight.shape[1]}")
    wide = widened_dtype(x.dtype)
    with without_autocast(x):
        logits = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    softmax = rule.score == "softmax"
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    choice = (logits if rule.score_after_top_k else scores).detach()
    index = rule.choose(choice if correction is None else choice + correction.to(wide))
    if softmax and rule.score_after_top_k:
        weights = logits.gather(-1, index).softmax(-1)
    else:
        weights = scores.gather(-1, index)
    if rule.normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(LEAST_SUM)
    return Routing(index, weights * rule.scale, scores, logits)


torch.fx.wrap(route)  # to torch.fx it is one call


class Router(nn.Module):
    """What chooses each token's experts: a matrix `weight` (num_experts, d_model), and a rule.

    `bias` (num_experts) is a part of the logits. `e_score_correction_bias` (num_experts), under the
    name that DeepSeek's checkpoints have for it, is a buffer that only chooses: no weight and no
    gradient depends on it, `update_bias` moves it. It stays float32 when the module is cast.

    Shapes: (..., d_model) to a `Routing`.
    """

    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        rule: Rule,
        *,
        bias: bool = False,
        correction_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        self.rule = rule
        count = rule.num_experts
        self.weight = nn.Parameter(torch.empty(count, d_model, device=device, dtype=dtype))
        of_bias = nn.Parameter(self.weight.new_empty(count)) if bias else None
        self.register_parameter("bias", of_bias)
        zeros = torch.zeros(count, device=device, dtype=torch.float32) if correction_bias else None
        self.register_buffer("e_score_correction_bias", zeros)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the matrix and the bias as `torch.nn.Linear` does; the correction becomes 0."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()

    def forward(self, x: Tensor) -> Routing:
        return route(x, self.weight, self.bias, self.e_score_correction_bias, self.rule)

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float = 1e-3) -> None:
        """One step of balancing without a loss: `b_i += rate sign(mean(load) - load_i)`.

        Args:
            load: of a step's tokens, `Routing.load`; over several ranks, its sum.
            rate: the length of the step; 0.001 in DeepSeek-V3.

        Raises:
            SettingError: there is no such bias.
            ShapeError: a load that is not (num_experts).

        Source: Wang et al. 2024 (arXiv 2408.15664), loss-free balancing.
        """
        bias = self.e_score_correction_bias
        if bias is None:
            raise SettingError("the router has no bias that only chooses: set correction_bias=True")
        if load.shape != bias.shape:
            raise ShapeError(f"load is {tuple(load.shape)}: it must be {tuple(bias.shape)}")
        load = load.to(bias)
        bias += rate * torch.sign(load.mean() - load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        made = self.e_score_correction_bias
        # In half precision the steps of `update_bias` would be lost, and ties decided otherwise.
        if kept is not None and made is not None and torch.finfo(made.dtype).bits < 32:
            self.e_score_correction_bias = kept.to(made.device)
        return self

    def extra_repr(self) -> str:
        rule = self.rule
        words = [f"{self.weight.shape[1]} -> {rule.top_k} of {rule.num_experts}", rule.score]
        words += ["after top_k"] * rule.score_after_top_k + ["normalized"] * rule.normalize
        if rule.groups > 1:
            words.append(f"in {rule.top_groups} of {rule.groups} groups")
        return ", ".join(words + ([f"scale={rule.scale:g}"] if rule.scale != 1 else []))


class MixtureFeedForward(nn.Module):
    """A mixture of experts with its router: each token goes through the `top_k` that suit it best.

    `y = sum_k weights_k FFN_index_k(x) + shared(x)`, and what the router `gate` does is, in order:

    1. `logits = x W_gate^T + b_gate`; `scores` are their softmax, or sigmoid, in float32 at least.
    2. Chosen by `scores`, plus the correction bias where there is one: of `groups` of neighbouring
       experts those `top_groups` whose `group_best` largest sum to most, and in them the `top_k`
       largest.
    3. `weights` are the scores of the chosen. With `score_after_top_k` the logits choose, and
       `weights` are the softmax of the chosen logits alone.
    4. With `normalize` they are divided by their sum; then times `scale`.

    Children, named as in checkpoints: `gate` (a `Router`), `experts` (an `Experts`), and where
    there are shared ones `shared_experts` (a `FeedForward`), or with a gate of their own
    `shared_expert` and `shared_expert_gate`: `y += sigmoid(x w^T) shared(x)`. State dicts of blocks
    of transformers 5 load strictly with the options that their configurations have, which are

    - Mixtral: the defaults;
    - Qwen3-MoE, OLMoE: `normalize`, their norm_topk_prob; Qwen2-MoE also `shared_hidden` and
      `shared_gate`;
    - DeepSeek V2: `normalize=False`, `scale`, `groups`, `top_groups`, `group_best=1` and
      `shared_hidden`, which is n_shared_experts times moe_intermediate_size;
    - DeepSeek V3, GLM-4 MoE: the same with `score="sigmoid"`, `correction_bias=True`, `normalize`
      and the default `group_best`.

    Args:
        d_model: width of the input and the output, in features.
        d_hidden: width of each expert after gating.
        num_experts: how many there are to choose among.
        top_k: how many a token goes through.
        variant: a name of the table, or an alias; of the shared experts too.
        score: "softmax" over all experts, or "sigmoid" of each.
        score_after_top_k: whether the score is of the chosen logits alone.
        normalize: whether a token's weights sum to `scale`.
        scale: what the weights are multiplied by.
        groups, top_groups: the number of groups, and of those that a token may choose from.
        group_best: how many of a group's experts it is judged by; None is 2, as in DeepSeek V3; 1
            in V2.
        correction_bias: whether a buffer is added to the scores to choose by; see `Router`.
        router_bias: whether the router has a bias that is a part of the logits, as gpt-oss's.
        shared_hidden: width of the shared experts together; None is none of them.
        shared_gate: whether what they give is weighed by a gate of their own.
        bias: whether every projection of the experts and shared experts has one.
        device, dtype: as in `torch.nn.Linear`.
        learnable: as in `FeedForward`.
        weigh, save, backend: as in `functional.experts`.
        **parameters: values of the variant's parameters (the starting values when learned).

    `forward(x, return_routing=True)` gives `(y, routing)` as well: a `Routing`, from which
    `balance_loss()`, `z_loss()` and `load()` follow. Nothing of it is kept in the module.

    Shapes: (..., d_model) to (..., d_model).

    Raises:
        UnknownVariant, ParameterError, SettingError: a wrong argument.
        ShapeError: an input whose last size is not d_model.

    Sources: Shazeer et al. 2017 (arXiv 1701.06538), the softmax of chosen logits, there with noise;
    Fedus et al. 2021 (arXiv 2101.03961), that of all; DeepSeek-AI 2024 (arXiv 2405.04434), shared
    experts, and in section 2.2.2 groups; DeepSeek-AI 2024 (arXiv 2412.19437), section 2.1.2,
    sigmoid, normalization and the bias that chooses.

    >>> layer = MixtureFeedForward(64, 48, 8, top_k=2)
    >>> y, routing = layer(torch.zeros(2, 5, 64), return_routing=True)
    >>> y.shape, routing.index.shape, int(routing.load().sum())
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 2]), 20)
    >>> list(layer.state_dict())
    ['gate.weight', 'experts.gate_up_proj', 'experts.down_proj']
    """

    gate: Router
    experts: Experts
    shared_expert_gate: nn.Module | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        top_k: int,
        variant: str | Variant = "swiglu",
        score: Score = "softmax",
        score_after_top_k: bool = False,
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        group_best: int | None = None,
        correction_bias: bool = False,
        router_bias: bool = False,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        learnable: Learnable = None,
        weigh: Weigh = "output",
        save: Save = "gate_up",
        backend: str = "auto",
        **parameters: float,
    ) -> None:
        super().__init__()
        if group_best is not None and groups == 1:
            raise SettingError(
                f"group_best is {group_best!r} and there is one group: leave it out, or set groups"
            )
        rule = Rule(
            num_experts=num_experts,
            top_k=top_k,
            score=score,
            score_after_top_k=score_after_top_k,
            normalize=normalize,
            scale=scale,
            groups=groups,
            top_groups=top_groups,
            group_best=2 if group_best is None else group_best,
        )
        if shared_gate and shared_hidden is None:
            raise SettingError("shared_gate is set and shared_hidden is None: give their width")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        same: dict[str, Any] = {"variant": variant, "bias": bias, "learnable": learnable}
        same |= {"save": save, **place, **parameters}
        self.gate = Router(
            d_model, rule, bias=router_bias, correction_bias=correction_bias, **place
        )
        self.experts = Experts(d_model, d_hidden, num_experts, weigh=weigh, backend=backend, **same)
        self._shared = "shared_expert" if shared_gate else "shared_experts"
        shared = None if shared_hidden is None else FeedForward(d_model, shared_hidden, **same)
        self.register_module(self._shared, shared)
        of_shared = nn.Linear(d_model, 1, bias=False, **place) if shared_gate else None
        self.register_module("shared_expert_gate", of_shared)

    @property
    def variant(self) -> str:
        """The name of the row that the experts compute."""
        return self.experts.variant

    def reset_parameters(self) -> None:
        """Draws every matrix anew, as each child does."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        routing = self.gate(x)
        y: Tensor = self.experts(x, routing.index, routing.weights)
        shared = getattr(self, self._shared)
        if shared is not None:
            of_shared = shared(x)
            if self.shared_expert_gate is not None:
                of_shared = self.shared_expert_gate(x).sigmoid() * of_shared
            y = y + of_shared
        return (y, routing) if return_routing else y
