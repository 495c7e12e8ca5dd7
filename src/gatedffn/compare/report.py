"""What a comparison shows at its end: the table, `report.md`, and the figures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, cast

import numpy as np

from gatedffn.compare.machine import on_gpu
from gatedffn.compare.published import PUBLISHED, SOURCE
from gatedffn.compare.settings import LARGEST_MISMATCH, LSTM, ModelName, Setting
from gatedffn.compare.statistics import CONFIDENCE, Row, Verdict
from gatedffn.compare.store import Record
from gatedffn.compare.study import Result
from gatedffn.files import json_ready, written_aside
from gatedffn.plots.theme import figure, save, style
from gatedffn.variants import VARIANTS

NONE = "-"


def label(arm: str) -> str:
    """An arm's name in tables and figures."""
    return "LSTM" if arm == LSTM else VARIANTS[arm].label


def headers(baseline: str) -> tuple[str, ...]:
    """The columns of the table."""
    return (
        "variant",
        "log-perplexity",
        "bits per byte",
        f"difference to {label(baseline)}",
        "shown at 95%",
        "smallest shown",
        "parameters",
        "MFLOP/token",
        "ms/step",
        "tokens/s",
        "peak MB",
    )


def cells(row: Row, setting: Setting) -> tuple[str, ...]:
    """A row of the table as text."""
    speed = setting.tokens_per_step / row.step_time if row.step_time else None
    return (
        label(row.variant),
        _with_spread(row),
        f"{row.bits_per_byte:.3f}",
        _difference(row),
        f"diverged in {row.diverged} of {row.seeds}" if row.diverged else row.verdict,
        NONE if row.detectable is None else f"{row.detectable:.3f}",
        f"{row.parameters:,} ({row.mismatch:+.2%})",
        f"{row.flops / 1e6:.2f}",
        NONE if row.step_time is None else f"{1e3 * row.step_time:.0f}",
        NONE if speed is None else f"{speed:,.0f}",
        f"{row.memory / 1e6:.3g}",
    )


def _with_spread(row: Row) -> str:
    return f"{row.loss:.3f}" + ("" if row.spread is None else f" ± {row.spread:.3f}")


def _difference(row: Row) -> str:
    if row.difference is None:
        return NONE
    bounds = "" if row.low is None else f" [{row.low:+.3f}, {row.high:+.3f}]"
    return f"{row.difference:+.3f}{bounds}"


PHRASES: dict[Verdict, str] = {
    "better": "Shown to be better than {}",
    "worse": "Shown to be worse than {}",
    "no difference shown": "No difference to {} shown at this budget",
    "no interval": "Not told apart from {}, for want of seeds or because a run diverged",
    "diverged": "Diverged in at least one run",
}


def conclusion(result: Result) -> str:
    """The answer in words, with no more in it than the intervals show."""
    setting = result.setting
    named: dict[Verdict, list[str]] = {verdict: [] for verdict in PHRASES}
    for row in result.rows:
        if row.verdict in named:
            named[row.verdict].append(label(row.variant))
    baseline = label(setting.baseline)
    best = result.rows[0]
    parts = [] if best.diverged else [f"Lowest held-out loss: {label(best.variant)}."]
    parts += [
        f"{PHRASES[verdict].format(baseline)}: {', '.join(names)}."
        for verdict, names in named.items()
        if names
    ]
    return " ".join(parts)


SHARED: dict[ModelName, str] = {
    "decoder": "Only the feed-forward differs: for each seed all variants share the initial values "
    "of every other matrix, and the batches in their order.",
    "gated-conv": "Widths differ so that the sizes are equal. For each seed all variants share the "
    "embedding's initial values, and the batches in their order.",
}


def notes(result: Result) -> list[str]:
    """What one must know to read the table: how it was made, and what it does not say."""
    setting = result.setting
    rates = ", ".join(f"{rate:g}" for rate in setting.learning_rates)
    init = (
        "every matrix is drawn with a standard deviation of 1 / sqrt(fan_in)"
        if setting.init == "fan_in"
        else f"every matrix is drawn with a standard deviation of {setting.init}"
    )
    precision = "bfloat16 autocast on a GPU" if on_gpu() else "float32 on the CPU"
    epochs = setting.steps * setting.tokens_per_step / result.data["training_tokens"]
    mismatches = [row.mismatch for row in result.rows]
    spread = max(mismatches) - min(mismatches)
    lines = [
        f"Data: {result.data['description']}. Tokens: {setting.tokenizer}. A run sees "
        f"{setting.steps * setting.tokens_per_step:,} tokens, {epochs:.2f} times the training "
        "part. Losses are measured on the held-out part, which nothing was chosen by.",
        f"Model: {setting.model}, d_model {setting.d_model}, {setting.layers} layers, context "
        f"{setting.context}, {setting.tokens_per_step:,} tokens a step, {setting.steps:,} steps; "
        f"AdamW, cosine schedule, {precision}. {SHARED[setting.model]}",
        f"Initialisation: {init}. It decides small comparisons; --init changes it.",
        f"Learning rate: the best of {rates} for each variant, by the loss of its first seed on a "
        "separate selection part."
        if setting.tuned
        else f"Learning rate: {rates} for every variant. It was not tuned: a variant that wants "
        "another rate is at a disadvantage. --lr several times tunes it.",
        f"Differences are paired by seed, with a {CONFIDENCE:.0%} interval by Student's t over "
        f"{setting.seeds} seeds, one interval for each variant and no correction for their number. "
        "'smallest shown' is the smallest difference that would have been told from none. The same "
        "command with more --seeds keeps these runs and narrows the intervals."
        if setting.seeds > 1
        else "One seed has no interval: nothing here tells a difference from chance. The same "
        "command with more --seeds keeps these runs.",
        f"Parameters of the compared part differ by at most {spread:.2%} between variants."
        + (
            " THE SIZES ARE UNEQUAL, as --allow-mismatch asked: a larger variant has an advantage."
            if spread > LARGEST_MISMATCH
            else ""
        ),
        "MFLOP/token: forward and backward. ms/step: median on this machine. peak MB: all tensors "
        "of a training step, weights and AdamW's moments included.",
        "It holds for this data, size and budget; larger ones can order the variants differently.",
    ]
    diverged = sum(row.diverged for row in result.rows)
    if diverged:
        lines.append(f"Runs that diverged: {diverged}. They count, and their variants rank last.")
    return lines


def write_report(result: Result, folder: Path) -> list[Path]:
    """Writes `report.md`, `summary.json` and the figures; returns their paths."""
    curves = _curves(result, folder / "curves")
    differences = _differences(result, folder / "differences")
    summary = folder / "summary.json"
    with written_aside(summary) as aside:
        aside.write_text(
            json.dumps(summary_of(result), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    report = folder / "report.md"
    with written_aside(report) as aside:
        aside.write_text(_markdown(result), encoding="utf-8")
    return [report, summary, *curves, *differences]


def summary_of(result: Result) -> dict[str, Any]:
    """The table for programs."""
    summary = {
        "conclusion": conclusion(result),
        "notes": notes(result),
        "setting": asdict(result.setting),
        "rows": [asdict(row) for row in result.rows],
    }
    return cast(dict[str, Any], json_ready(summary))


def _markdown(result: Result) -> str:
    setting = result.setting
    lines = ["# Which feed-forward?", "", conclusion(result), ""]
    lines += _table(headers(setting.baseline), [cells(row, setting) for row in result.rows])
    lines += ["", "![differences](differences.png)", "", "![learning curves](curves.png)", ""]
    lines += ["## How to read it", "", *(f"- {note}" for note in notes(result)), ""]
    published = published_cells(result)
    if published:
        lines += ["## What was published, in another setting", "", SOURCE, ""]
        lines += [*_table(PUBLISHED_HEADERS, published), ""]
    lines += ["## Machine", ""]
    machines = [run["machine"] for runs in result.runs.values() for run in runs]
    if any(machine != machines[0] for machine in machines):
        lines += ["The runs are from different machines or versions: times do not compare.", ""]
    lines += [*(f"- {name}: {value}" for name, value in machines[0].items()), ""]
    return "\n".join(lines)


PUBLISHED_HEADERS = (
    "variant",
    "here",
    "Shazeer, 65,536 steps",
    "Shazeer, 524,288 steps",
    "Narang, 65,536 steps",
    "Narang, 524,288 steps",
)


def published_cells(result: Result) -> list[tuple[str, ...]]:
    """The published losses of the variants that have some, beside ours."""
    if result.setting.model != "decoder":
        return []
    found = [(row, PUBLISHED[row.variant]) for row in result.rows if row.variant in PUBLISHED]
    return [
        (label(row.variant), f"{row.loss:.3f}", *map(_loss_or_none, astuple(paper)))
        for row, paper in found
    ]


def _loss_or_none(loss: float | None) -> str:
    return NONE if loss is None else f"{loss:.3f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _style(arm: str) -> dict[str, Any]:
    if arm == LSTM:
        return {"color": "#777777", "linestyle": (0, (1, 1))}
    return style(VARIANTS[arm])


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
                axes.plot(shared, mean, label=label(row.variant), **_style(row.variant))
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
        axes.axvline(0.0, color="#777777", linewidth=1.0)
        for height, row in enumerate(rows):
            color = _style(row.variant)["color"]
            for difference in result_differences(result, row.variant):
                axes.plot(difference, height, "o", color=color, markersize=3.5, alpha=0.6)
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [height, height], color=color, linewidth=2.0)
            axes.plot([row.difference or 0.0], [height], "D", color=color, markersize=6.5)
        axes.set_yticks(range(len(rows)), [label(row.variant) for row in rows])
        axes.set_xlabel(f"held-out loss minus that of {baseline}, nats a token (left is better)")
        axes.set_title("Paired differences: seeds (dots), mean (diamond), 95% interval (line)")
        return save(drawn, path, ["png"])


def result_differences(result: Result, arm: str) -> list[float]:
    """The paired differences of an arm to the baseline, one for each seed."""
    reference = result.runs[result.setting.baseline]
    return [
        a["result"]["held_out"] - b["result"]["held_out"]
        for a, b in zip(result.runs[arm], reference, strict=True)
    ]
