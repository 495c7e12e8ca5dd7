"""What is to be reached on a GPU: each bar with the step that measures it, and its figure.

A figure is read from the records of the steps, which are those of `gatedffn bench`.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gatedffn.bench.contestants import OURS, OURS_COMPILED
from gatedffn.bench.workloads import GPU_DECODER, GPU_EXPERTS, GPU_MAIN, Workload

Record = dict[str, Any]
Found = Mapping[str, list[Record]]
"""The records of each step."""
Figure = Callable[[Found], float | None]

GATING, GATING_BACKWARD, FORWARD, TRAINING, TOKEN, _, TILED = GPU_MAIN[:7]
EXPERTS, EXPERTS_TRAINING = GPU_EXPERTS
DECODER_TRAINING, DECODER = GPU_DECODER
OF_A_TILE = 5
"""Gate, up, their gradients and the hidden values: what a tile's step holds."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that is to be at least or at most so much; the step is that of a workload."""

    words: str
    step: str
    figure: Figure
    least: float | None = None
    most: float | None = None

    @property
    def reach(self) -> str:
        """What is to be reached, in words."""
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    def met(self, figure: float) -> bool:
        """Whether a figure reaches it."""
        return figure >= self.least if self.least is not None else figure <= (self.most or 0.0)


def _times(found: Found, workload: Workload) -> dict[str, Record]:
    """The records of a workload by contestant, of those that have a figure."""
    return {
        record["contestant"]: record
        for records in found.values()
        for record in records
        if record["kind"] == "time"
        and record["row"]["name"] == workload.name
        and record["figures"] is not None
    }


def _of(workload: Workload, name: str) -> Figure:
    """One of our figures."""

    def figure(found: Found) -> float | None:
        ours = _times(found, workload).get(OURS)
        value: float | None = None if ours is None else ours["figures"][name]
        return value

    return figure


def _by_products(found: Found) -> float | None:
    """The time of the training step over that of the products alone."""
    speed = _of(TRAINING, "to_products")(found)
    return None if speed is None else 1.0 / speed


def _speed(workload: Workload, *others: str, ours: str = OURS) -> Figure:
    """How many times as fast as the fastest of the others; without one of them there is none."""

    def figure(found: Found) -> float | None:
        times = _times(found, workload)
        if not {ours, *others} <= times.keys():
            return None
        rounds = [times[other]["rounds"] for other in others]
        pairs = zip(zip(*rounds, strict=True), times[ours]["rounds"], strict=True)
        return float(statistics.median(min(theirs) / own for theirs, own in pairs))

    return figure


def _rate(record: Record) -> float:
    """Operations a second."""
    named = {field.name: record["row"][field.name] for field in fields(Workload)}
    rate: float = Workload(**named).flops / record["figures"]["milliseconds"]
    return rate


def _of_dense(workload: Workload, dense: Workload) -> Figure:
    """The rate of experts relative to that of the dense layer."""

    def figure(found: Found) -> float | None:
        ours, other = (_times(found, each).get(OURS) for each in (workload, dense))
        return None if ours is None or other is None else _rate(ours) / _rate(other)

    return figure


def _memory(workload: Workload, mode: str, size: Callable[[Record], float]) -> Figure:
    """What a mode of a training step takes."""

    def figure(found: Found) -> float | None:
        for records in found.values():
            for record in records:
                of = record["kind"] == "memory" and record["row"]["name"] == workload.name
                if of and record["mode"] == mode and "reason" not in record:
                    return size(record)
        return None

    return figure


def _saved(record: Record) -> float:
    return float(record["saved"]) / TRAINING.hidden_bytes


def _of_tile(record: Record) -> float:
    assert TILED.tile is not None
    tile = TILED.hidden_bytes * TILED.tile / TILED.tokens
    return float(record["extra"] - record["output"]) / tile


def _checks(found: Found) -> float | None:
    """How many of the checks were wrong."""
    checks = [record for record in found.get("checks", ()) if record["kind"] == "check"]
    return sum(record["reason"] is not None for record in checks) if checks else None


def _decoder(workload: Workload, words: str) -> Iterator[Bar]:
    yield Bar(f"{words}, times eager", workload.name, _speed(workload, "eager"), 1.0)
    compiled = _speed(workload, "compile", ours=OURS_COMPILED)
    yield Bar(f"{words}, both compiled, times without", workload.name, compiled, 1.0)


def _experts(workload: Workload, dense: Workload, words: str) -> Iterator[Bar]:
    speed = _speed(workload, "grouped_mm")
    yield Bar(f"{words}, times transformers' grouped_mm", workload.name, speed, 1.0)
    yield Bar(
        f"{words}, of the dense layer's rate", workload.name, _of_dense(workload, dense), 0.85
    )


BARS: tuple[Bar, ...] = (
    Bar("operators that are wrong", "checks", _checks, most=0.0),
    Bar("gating forward, of the copy rate", GATING.name, _of(GATING, "of_limit"), 0.92),
    Bar(
        "gating backward, of the copy rate",
        GATING_BACKWARD.name,
        _of(GATING_BACKWARD, "of_limit"),
        0.92,
    ),
    Bar("layer forward, times the products alone", FORWARD.name, _of(FORWARD, "to_products"), 1.0),
    Bar("training step, time over the products'", TRAINING.name, _by_products, most=1.03),
    Bar(
        "training step, times the fastest of eager, torch.compile and Liger",
        TRAINING.name,
        _speed(TRAINING, "eager", "compile", "liger"),
        1.0,
    ),
    Bar("one token, of the copy rate", TOKEN.name, _of(TOKEN, "of_limit"), 0.85),
    Bar(
        "kept for backward, in hidden tensors",
        TRAINING.name,
        _memory(TRAINING, OURS, _saved),
        most=2.0,
    ),
    Bar(
        "the same with save=input",
        TRAINING.name,
        _memory(TRAINING, f"{OURS}, save=input", _saved),
        most=0.0,
    ),
    Bar(
        "262,144 tokens with tiling: most memory, in hidden tensors of a tile",
        TILED.name,
        _memory(TILED, f"{OURS}, save=input, tile={TILED.tile}", _of_tile),
        most=OF_A_TILE,
    ),
    *_experts(EXPERTS, FORWARD, "experts forward"),
    *_experts(EXPERTS_TRAINING, TRAINING, "experts training"),
    *_decoder(DECODER_TRAINING, "decoder, training step"),
    *_decoder(DECODER, "decoder, next token"),
)
