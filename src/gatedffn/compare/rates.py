"""The search for the learning rate: what each arm gave at each rate, and where to search on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gatedffn.compare.look import NONE, label, line_style, table
from gatedffn.compare.statistics import best_rate, selection_loss
from gatedffn.compare.store import Record
from gatedffn.plots.theme import figure, save

Curves = dict[str, dict[float, float]]
"""For each arm the loss at each learning rate, infinite where the run diverged."""


def rate_curves(records: Iterable[Record]) -> Curves:
    """The losses on the selection part over the learning rate, on the first seed that is there."""
    given = list(records)
    first = min((record["run"]["seed"] for record in given), default=0)
    curves: Curves = {}
    for record in given:
        run = record["run"]
        if run["seed"] == first:
            curve = curves.setdefault(run["variant"], {})
            curve[run["learning_rate"]] = selection_loss(record)
    return {arm: dict(sorted(curve.items())) for arm, curve in curves.items()}


def at_the_edge(curves: Curves) -> list[str]:
    """The arms whose best rate is the lowest or the highest that was tried."""
    return [
        arm
        for arm, curve in curves.items()
        if len(curve) > 1 and best_rate(curve) in (min(curve), max(curve))
    ]


def rates_section(records: Iterable[Record]) -> list[str]:
    """The search in Markdown; the best rate of each arm is in bold."""
    curves = rate_curves(records)
    lines = ["## Learning rates", "", RATES_NOTE, "", *table(*rate_cells(curves, "**{}**")), ""]
    edge = edge_words(curves)
    return [*lines, edge, ""] if edge else lines


RATES_NOTE = "Loss on the selection part at the end, first seed:"


def rate_cells(curves: Curves, best: str) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of the search; `best` is how the best rate is marked."""
    rates = sorted({rate for curve in curves.values() for rate in curve})
    body = [[label(arm), *_losses(curve, rates, best)] for arm, curve in curves.items()]
    return ["variant", *(f"{rate:g}" for rate in rates)], body


def edge_words(curves: Curves) -> str:
    """For which arms the search should go on, and where; empty if for none."""
    ends: dict[float, list[str]] = {}
    for arm in at_the_edge(curves):
        ends.setdefault(best_rate(curves[arm]), []).append(label(arm))
    parts = [f"{', '.join(arms)} ({rate:g})" for rate, arms in sorted(ends.items())]
    if not parts:
        return ""
    return (
        f"The best learning rate is at the edge of those tried for {' and '.join(parts)}: with "
        "rates beyond it the order may be another."
    )


def _losses(curve: Mapping[float, float], rates: Sequence[float], mark: str) -> list[str]:
    best = best_rate(curve)
    cells = []
    for rate in rates:
        loss = curve.get(rate)
        words = NONE if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverged"
        cells.append(mark.format(words) if rate == best else words)
    return cells


def rates_figure(records: Iterable[Record], path: Path) -> list[Path]:
    """The curves of loss over rate."""
    with figure(9.0, 5.0) as drawn:
        axes = drawn.subplots()
        curves = rate_curves(records)
        for arm, curve in curves.items():
            shown = {rate: loss for rate, loss in curve.items() if math.isfinite(loss)}
            style = {**line_style(arm), "marker": "o", "markersize": 4.0}
            axes.plot(list(shown), list(shown.values()), label=label(arm), **style)
        axes.set_xscale("log")
        rates = sorted({rate for curve in curves.values() for rate in curve})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss on the selection part, nats a token")
        axes.set_title("The search for the learning rate, first seed")
        axes.legend()
        return save(drawn, path, ["png"])
