"""What a comparison leaves at its end: `report.md`, `report.html`, `summary.json`, figures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from gatedffn.compare import tables
from gatedffn.compare.answer import VIEW_TITLES, answer, conclusion, left_out, notes
from gatedffn.compare.loads import LOAD_HEADERS, load_cells, loads, loads_note
from gatedffn.compare.look import NONE, label, line_style, table
from gatedffn.compare.page import page
from gatedffn.compare.published import SOURCE
from gatedffn.compare.rates import rates_figure, rates_section
from gatedffn.compare.store import Record
from gatedffn.compare.study import Result
from gatedffn.compare.views import seed_differences, views
from gatedffn.files import json_ready, written_aside
from gatedffn.plots.theme import REFERENCE, figure, save


def write_report(result: Result, folder: Path) -> list[Path]:
    """Writes `report.md`, `report.html`, `summary.json` and the figures; returns their paths."""
    curves = _curves(result, folder / "curves")
    differences = _differences(result, folder / "differences")
    rates = rates_figure(result.grid, folder / "rates") if result.setting.tuned else []
    summary = folder / "summary.json"
    with written_aside(summary) as aside:
        aside.write_text(
            json.dumps(summary_of(result), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    report = folder / "report.md"
    with written_aside(report) as aside:
        aside.write_text(_markdown(result), encoding="utf-8")
    html = folder / "report.html"
    with written_aside(html) as aside:
        aside.write_text(page(result), encoding="utf-8")
    return [report, html, summary, *curves, *differences, *rates]


def summary_of(result: Result) -> dict[str, Any]:
    """The table for programs."""
    summary = {
        "conclusion": conclusion(result),
        "notes": notes(result),
        "setting": asdict(result.setting),
        "rows": [asdict(row) for row in result.rows],
        "views": [asdict(view) for view in views(result)],
    }
    of_experts = [asdict(load) for load in loads(result)]
    if of_experts:
        summary["loads"] = of_experts
    return cast(dict[str, Any], json_ready(summary))


def _markdown(result: Result) -> str:
    setting = result.setting
    lines = ["# Which feed-forward?", "", *(f"{line}\n" for line in answer(result))]
    of_all, *others = views(result)
    lines += [f"## {VIEW_TITLES[of_all.name]}", ""]
    body = [tables.cells(row, setting) for row in result.rows]
    lines += [*table(tables.headers(setting), body), ""]
    lines += ["![differences](differences.png)", "", "![learning curves](curves.png)", ""]
    for view in others:
        lines += [f"## {VIEW_TITLES[view.name]}", ""]
        if view.places:
            body = [tables.view_cells(place) for place in view.places]
            lines += [*table(tables.view_headers(setting.baseline), body), ""]
        lines += [f"{line}\n" for line in left_out(view)]
    lines += ["## How to read it", "", *(f"- {note}" for note in notes(result)), ""]
    found = tables.pair_cells(result)
    if found:
        lines += ["## Every two variants", "", tables.PAIRS, ""]
        lines += [*table(tables.PAIR_HEADERS, found), ""]
    of_experts = load_cells(result)
    if of_experts:
        lines += ["## Load of the experts", "", loads_note(setting), ""]
        lines += [*table(LOAD_HEADERS, of_experts), ""]
    if setting.tuned:
        lines += [*rates_section(result.grid), "![learning rates](rates.png)", ""]
    published = tables.published_cells(result)
    if published:
        lines += ["## What was published, in another setting", "", SOURCE, ""]
        lines += [*table(tables.PUBLISHED_HEADERS, published), ""]
    warnings = tables.warnings(result)
    if warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in warnings), ""]
    machines = tables.machines(result)
    lines += ["## Machine", ""]
    if len(machines) > 1:
        lines += ["The runs are from different machines or versions: times do not compare.", ""]
    for machine in machines:
        shown = {name: NONE if value is None else value for name, value in machine.items()}
        lines += [*(f"- {name}: {value}" for name, value in shown.items()), ""]
    return "\n".join(lines)


def _curves(result: Result, path: Path) -> list[Path]:
    setting = result.setting
    with figure(9.0, 5.0) as drawn:
        axes = drawn.subplots()
        for row in result.rows:
            curves = list(_loss_curves(result.runs[row.variant]))
            shared = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
            losses = [
                [loss for step, loss in zip(*curve, strict=True) if step in shared]
                for curve in curves
            ]
            if shared:
                mean = np.mean(losses, axis=0)
                axes.plot(shared, mean, label=label(row.variant), **line_style(row.variant))
        axes.set_xlabel("training step")
        axes.set_ylabel("loss on the selection part, nats a token")
        axes.set_title(f"Learning curves, mean of {setting.seeds} seeds")
        axes.legend(title="best at the end first")
        return save(drawn, path, ["png"])


def _loss_curves(runs: Sequence[Record]) -> Iterator[tuple[list[int], list[float]]]:
    """The steps and losses on the selection part of each run, without what is no number."""
    for run in runs:
        points = [(step, loss) for step, loss in run["result"]["curve"] if loss is not None]
        yield [step for step, _ in points], [loss for _, loss in points]


def _differences(result: Result, path: Path) -> list[Path]:
    baseline = label(result.setting.baseline)
    rows = [row for row in reversed(result.rows) if row.difference is not None]
    with figure(9.0, 1.6 + 0.4 * len(rows)) as drawn:
        axes = drawn.subplots()
        axes.axvline(0.0, color=REFERENCE, linewidth=1.0)
        for height, row in enumerate(rows):
            color = line_style(row.variant)["color"]
            for difference in seed_differences(result, row.variant):
                axes.plot(difference, height - 0.25, "o", color=color, markersize=3.5, alpha=0.6)
            for low, high, width in (
                (row.low, row.high, 1.2),
                (row.alone_low, row.alone_high, 3.5),
            ):
                if low is not None and high is not None:
                    axes.plot([low, high], [height, height], color=color, linewidth=width)
            axes.plot([row.difference or 0.0], [height], "D", color=color, markersize=6.5)
        axes.set_ylim(-0.7, len(rows) - 0.4)
        axes.set_yticks(range(len(rows)), [label(row.variant) for row in rows])
        axes.set_xlabel(f"held-out loss minus that of {baseline}, nats a token (left is better)")
        axes.set_title(
            "Paired differences; 95% intervals for all together (thin), for each alone (thick)"
        )
        return save(drawn, path, ["png"])
