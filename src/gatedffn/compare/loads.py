"""How a comparison's experts are used: the load of each, by variant."""

from dataclasses import dataclass

import numpy as np

from gatedffn.compare.look import label
from gatedffn.compare.settings import Setting
from gatedffn.compare.store import Record
from gatedffn.compare.study import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The loads of a variant's experts for the held-out part, at the end of training.

    `least` and `most` are shares of the tokens: of all layers' experts the smallest and the
    largest. `evenness` is the entropy of a layer's loads over that of equal ones, so 1 is even.
    All three are means, of the seeds or of the seeds and layers. `unused` counts the experts that
    no token went through, and `experts` all of them, in every layer of every seed.
    """

    variant: str
    least: float
    most: float
    evenness: float
    unused: int
    experts: int


def loads(result: Result) -> list[Load]:
    """The loads of every variant, in the order of the table; none where there are no experts."""
    if not result.setting.has_experts:
        return []
    return [_load(row.variant, result.runs[row.variant]) for row in result.rows]


def _load(variant: str, runs: list[Record]) -> Load:
    counts = np.array([run["result"]["load"] for run in runs], dtype=float)
    top_k = runs[0]["setting"]["top_k"]
    # (seeds, layers, experts): of all choices, then of the tokens, which have several each.
    chosen = counts / counts.sum(-1, keepdims=True)
    shares = top_k * chosen
    logs = np.log(chosen, where=chosen > 0, out=np.zeros_like(chosen))
    entropy, even = -(chosen * logs).sum(-1), np.log(counts.shape[-1])
    return Load(
        variant=variant,
        least=float(shares.min((1, 2)).mean()),
        most=float(shares.max((1, 2)).mean()),
        evenness=float((entropy / even).mean()) if even else 1.0,
        unused=int((counts == 0).sum()),
        experts=counts.size,
    )


LOAD_HEADERS = ("variant", "least loaded", "most loaded", "evenness", "unused experts")


def load_cells(result: Result) -> list[tuple[str, ...]]:
    """The lines of the table."""
    return [
        (
            label(load.variant),
            f"{load.least:.1%}",
            f"{load.most:.1%}",
            f"{load.evenness:.3f}",
            f"{load.unused} of {load.experts}",
        )
        for load in loads(result)
    ]


def loads_note(setting: Setting) -> str:
    """How to read the table."""
    return (
        "Of the held-out part, at the end of training: the share of the tokens that went through "
        "the expert with the fewest, and with the most, of all layers; and the entropy of a "
        "layer's loads over that of equal ones, of which 1 is even. Means of the seeds. With "
        f"equal loads each of the {setting.experts} experts of a layer has "
        f"{setting.top_k / setting.experts:.1%} of the tokens."
    )
