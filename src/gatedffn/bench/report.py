"""The tables of a measurement as text, and its picture."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gatedffn.bench.contestants import OURS, PRODUCTS, TABLES
from gatedffn.bench.figures import Summary, best_peer, figures, limit_bound, limit_milliseconds
from gatedffn.bench.memory import Memory
from gatedffn.bench.outcomes import Measured, Outcome
from gatedffn.bench.workloads import Workload
from gatedffn.plots.theme import COLORS, MARKED, REFERENCE, figure, save
from gatedffn.variants import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONE = "-"

HEADERS = ("", "ms", "rounds from to", "x eager", "x best peer", "of the limit", "error")
PRODUCTS_HEADER = "x products"
SUMMARY_HEADERS = ("", "against", "workloads", "geometric mean", "worst", "in")
MEMORY_HEADERS = ("training step", "extra MB", "of it scratch", "x eager", "saved bytes/token")

_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
WIDEST = 6.0
"""Bars end there, in times of the limit; what is longer says so."""


def title(workload: Workload) -> str:
    """A workload in words.

    >>> title(Workload(tokens=1, d_model=64, d_hidden=128, training=True))
    'training step, SwiGLU, 1 token, 64 x 128, float32'
    """
    label = VARIANTS[workload.variant].label
    kind = "backward" if workload.backward else "training step" if workload.training else "forward"
    if workload.d_model:
        tokens = f"{workload.tokens:,} token{'s' * (workload.tokens > 1)}"
        words = [kind, label, tokens, f"{workload.d_model} x {workload.d_hidden}"]
        if workload.part == "experts":
            words.append(f"{workload.slots} of {workload.experts} experts")
        if workload.part == "decoder":
            words.append(f"{workload.layers} layers of a decoder")
        if workload.past:
            words.append(f"after {workload.past:,} others")
    else:
        part = "packed gating" if workload.part == "packed" else "gating"
        words = [part, kind, label, f"{workload.tokens:,} x {workload.d_hidden:,}"]
    words.append(workload.dtype)
    if workload.beta is not None:
        words.append(f"beta={workload.beta:g}")
    if workload.graph:
        words.append("as a CUDA graph")
    if workload.tile:
        words.append(f"tile={workload.tile}")
    return ", ".join(words)


def limit_words(measured: Measured) -> str:
    """The workload's limit in words."""
    flops = sorted(limit.flops for limit in measured.limits)[len(measured.limits) // 2]
    read = sorted(limit.bytes for limit in measured.limits)[len(measured.limits) // 2]
    return (
        f"limit {_digits(limit_milliseconds(measured))} ms by {limit_bound(measured)}: "
        f"{flops / 1e9:,.0f} GFLOP/s, {read / 1e9:.1f} GB/s"
    )


def ways_words(measured: Measured) -> str:
    """By which way this library computed each stage; nothing where that is not known."""
    return "; ".join(
        f"{stage}: {way}" for outcome in measured.outcomes for stage, way in outcome.ways.items()
    )


def headers(measured: Measured) -> tuple[str, ...]:
    """Of the table; with the products alone where they were measured."""
    return (*HEADERS, PRODUCTS_HEADER) if _has_products(measured) else HEADERS


def _has_products(measured: Measured) -> bool:
    return any(o.entry.contestant == PRODUCTS for o in measured.outcomes)


def cells(measured: Measured) -> list[tuple[str, ...]]:
    """The lines of the table, the fastest first; at the end those without a figure."""
    products = _has_products(measured)
    peer = best_peer(measured)

    def key(outcome: Outcome) -> float:
        return float("inf") if outcome.seconds is None else outcome.seconds

    lines: list[tuple[str, ...]] = []
    for outcome in sorted(measured.outcomes, key=key):
        found = figures(measured, outcome)
        if found is None:
            empty = ("",) if products else ()
            reason = outcome.reason or ""
            lines.append((outcome.entry.label, NONE, reason, "", "", "", _error(outcome), *empty))
            continue
        low, high = found.spread
        lines.append(
            (
                outcome.entry.label + (" (best peer)" if outcome is peer else ""),
                _digits(found.milliseconds),
                f"{_digits(low)} {_digits(high)}",
                _ratio(found.to_eager),
                _ratio(found.to_best_peer),
                f"{found.of_limit:.2f}",
                _error(outcome),
                *((_ratio(found.to_products),) if products else ()),
            )
        )
    return lines


def _error(outcome: Outcome) -> str:
    """In multiples of what this project allows itself."""
    return NONE if outcome.verdict is None else f"{outcome.verdict.ratio:.2f}"


def _digits(value: float) -> str:
    """Three digits, zeros among them: times are seldom known better."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def summary_cells(found: Sequence[Summary]) -> list[tuple[str, ...]]:
    """The lines of the table of summaries."""
    return [
        (
            summary.contestant,
            summary.against,
            str(summary.workloads),
            _ratio(summary.geometric_mean),
            _ratio(summary.worst),
            summary.worst_workload,
        )
        for summary in found
    ]


def memory_cells(measured: Sequence[Memory | str]) -> list[tuple[str, ...]]:
    """The lines of the memory table; the first is eager PyTorch's."""
    sizes = [memory for memory in measured if isinstance(memory, Memory)]
    failed = [words for words in measured if isinstance(words, str)]
    return [
        *(
            (
                memory.mode,
                f"{memory.extra / 1e6:.1f}",
                f"{memory.scratch / 1e6:.1f}",
                f"{memory.extra / sizes[0].extra:.2f}",
                f"{memory.saved_per_token:,.0f}",
            )
            for memory in sizes
        ),
        *((words, NONE, NONE, NONE, NONE) for words in failed),
    ]


def color(contestant: str) -> str:
    """A contestant's colour in every picture."""
    free = [color for color in COLORS if color != MARKED]
    for table in itertools.chain(*TABLES.values()):
        others = [name for name in table if name != OURS]
        if contestant in others:
            return free[others.index(contestant)]
    return MARKED


def draw(workloads: Sequence[Measured], path_without_suffix: Path) -> list[Path]:
    """Bars of time in multiples of the limit, one panel a workload; returns the files' paths."""
    columns = min(2, len(workloads))
    lines = -(-len(workloads) // columns)
    most = max(len(measured.outcomes) for measured in workloads)
    with figure(6.0 * columns, lines * (0.9 + 0.27 * most) + 0.3) as drawn:
        panels = drawn.subplots(lines, columns, squeeze=False).flat
        for measured, axes in zip(workloads, panels, strict=False):
            _panel(measured, axes)
        for axes in list(drawn.axes)[len(workloads) :]:
            axes.set_visible(False)
        for axes in list(drawn.axes)[max(len(workloads) - columns, 0) : len(workloads)]:
            axes.set_xlabel("time in multiples of the machine's limit (left is better)")
        return save(drawn, path_without_suffix)


def _panel(measured: Measured, axes: "Axes") -> None:
    outcomes = list(reversed(measured.outcomes))
    times: Iterable[float] = (o.seconds or 0.0 for o in outcomes)
    limit = limit_milliseconds(measured) / 1e3
    for height, (outcome, seconds) in enumerate(zip(outcomes, times, strict=True)):
        multiple = seconds / limit
        clipped = multiple > WIDEST
        axes.barh(height, min(multiple, WIDEST), color=color(outcome.entry.contestant), height=0.72)
        if outcome.reason is not None:
            words = outcome.reason.partition(":")[0]
        else:
            words = f"{_digits(1e3 * seconds)} ms" + (f", {multiple:.0f} times the limit" * clipped)
        axes.annotate(
            words,
            (min(multiple, WIDEST), height),
            xytext=(-4 if clipped else 4, 0),
            textcoords="offset points",
            ha="right" if clipped else "left",
            va="center",
            fontsize=8.0,
            color="white" if clipped else "#777777" if outcome.reason else "black",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            if outcome.reason
            else None,
        )
    axes.axvline(1.0, color=REFERENCE, linewidth=1.4)
    axes.set_yticks(range(len(outcomes)), [outcome.entry.label for outcome in outcomes])
    axes.set_xlim(0.0, WIDEST * 1.02)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{title(measured.workload)}\n{limit_words(measured)}", fontsize=9.0)
