"""What each arm of a comparison costs, counted, and whether their sizes are equal."""

from dataclasses import dataclass

import torch

from gatedffn.compare.models.arms import arm_width, build, module_of
from gatedffn.compare.models.counting import count, idle
from gatedffn.compare.settings import LARGEST_MISMATCH, Setting
from gatedffn.errors import SettingError
from gatedffn.experts import Experts
from gatedffn.layers import FeedForward


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm costs: its width, its parameters, those that differ, and its arithmetic.

    `active` counts the parameters without the experts that a token does not go through. `compared`
    counts those of the part that differs between the arms: the feed-forwards, or the whole network
    of convolutions. `flops` are those of a training step for one token.
    """

    width: int
    parameters: int
    active: int
    compared: int
    flops: int


def cost(setting: Setting, arm: str, vocabulary: int) -> Cost:
    """Counts parameters and arithmetic on the meta device: nothing is computed.

    A training step takes six operations for each weight that is multiplied and token, and for
    each attention layer 12 context d_model for the two products with scores (Kaplan et al. 2020,
    arXiv 2001.08361, table 1, forward and backward).
    """
    with torch.device("meta"):
        model = build(setting, arm, vocabulary)
    compared = count(model)
    if setting.model != "gated-conv":
        compared = sum(count(m) for m in model.modules() if isinstance(m, (FeedForward, Experts)))
    flops: int = module_of(setting).flops(setting, model)
    parameters = count(model)
    return Cost(
        width=arm_width(setting, arm, vocabulary),
        parameters=parameters,
        active=parameters - idle(model),
        compared=compared,
        flops=flops,
    )


def mismatches(setting: Setting, costs: dict[str, Cost]) -> dict[str, float]:
    """By how much the compared parameters of each arm differ from the baseline's, as a fraction.

    Raises:
        SettingError: two arms differ by more than 1% and the setting does not allow it.
    """
    counts = {arm: cost.compared for arm, cost in costs.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    spread = counts[most] / counts[least] - 1
    if spread > LARGEST_MISMATCH and not setting.allow_mismatch:
        raise SettingError(
            f"{most} has {spread:.1%} more parameters than {least} ({counts[most]:,} and "
            f"{counts[least]:,}), and a ranking needs at most {LARGEST_MISMATCH:.0%}: use "
            + ("" if setting.model == "gated-conv" else "--multiple-of 1 or ")
            + "another --d-model, or --allow-mismatch to compare unequal sizes"
        )
    return {arm: size / counts[setting.baseline] - 1 for arm, size in counts.items()}
