"""What `gatedffn compare --dry-run` shows: sizes, costs, the time, and what will be shown."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from gatedffn.cli.tables import print_table
from gatedffn.compare.look import counted, label
from gatedffn.compare.schedule import Extent
from gatedffn.compare.settings import Setting
from gatedffn.compare.statistics import expected_reach, expected_seeds, kind
from gatedffn.compare.study import Estimate, Prepared, estimate


def show_plans(
    console: Console,
    studies: Sequence[Prepared],
    folder: Path,
    extent: Extent,
    workers: int | None,
    on: str | None,
    *,
    as_json: bool,
) -> None:
    """The plan of each study."""
    console.print("measuring how fast runs are here")
    plans = []
    for prepared in studies:
        taken = estimate(prepared, folder, workers=workers, on=on, extent=extent)
        if as_json:
            plans.append(_plan(prepared, taken))
        else:
            _show_plan(console, prepared, extent, taken)
    if as_json:
        typer.echo(json.dumps(plans[0] if len(plans) == 1 else plans, indent=2))


def _plan(prepared: Prepared, taken: Estimate) -> dict[str, Any]:
    return {
        "setting": asdict(prepared.setting),
        "data": prepared.data["description"],
        "variants": {
            arm: asdict(cost) | {"mismatch": prepared.mismatch[arm]}
            for arm, cost in prepared.costs.items()
        },
        "runs": taken.runs,
        "workers": taken.workers,
        "estimated_seconds": taken.seconds,
        "shows_differences_above": expected_reach(prepared.setting),
    }


def _show_plan(console: Console, prepared: Prepared, extent: Extent, taken: Estimate) -> None:
    setting = prepared.setting
    how = "in one process" if taken.workers == 1 else f"with {taken.workers} workers"
    active = ["active"] if setting.has_experts else []
    body = [
        (
            label(arm),
            f"{cost.width:,}",
            f"{cost.parameters:,}",
            *([f"{cost.active:,}"] if active else []),
            f"{prepared.mismatch[arm]:+.2%}",
            f"{cost.flops / 1e6:.2f}",
        )
        for arm, cost in prepared.costs.items()
    ]
    headers = ("variant", "width", "parameters", *active, "mismatch", "MFLOP/token")
    print_table(console, headers, body)
    seen = setting.steps * setting.tokens_per_step
    console.print(
        f"mismatch: of the compared parameters to those of {label(setting.baseline)}"
        f"{', of the active ones as well' if active else ''}\n"
        f"{counted(taken.runs, 'run')} of {counted(setting.steps, 'step')}, {seen:,} tokens each; "
        f"the training part has {len(prepared.tokens.train):,} tokens\n"
        + (f"the preset is made for: {setting.needs}\n" if setting.needs else "")
        + f"estimated time here, {how}: {_duration(taken.seconds)}\n{_expected(setting)}"
    )
    if extent.minutes is not None:
        blocks = max(extent.least, int(60 * extent.minutes * setting.seeds / taken.seconds))
        console.print(f"--minutes {extent.minutes:g}: time for about {blocks} seeds {how}")
    if extent.until is not None:
        count = expected_seeds(setting, extent.until)
        words = "how many seeds is not known" if count is None else f"about {count} seeds"
        console.print(f"--until {extent.until:g}: {words}")


def _expected(setting: Setting) -> str:
    """What the study will be able to show."""
    shown: dict[str, float] = {}
    for arm, half in expected_reach(setting).items():
        shown[kind(arm)] = max(half, shown.get(kind(arm), 0.0))
    if not shown:
        return "how small a difference it will show is not known: this setting's spread is not"
    words = " and ".join(f"{half:.3f} ({name})" for name, half in shown.items())
    return (
        f"{setting.seeds} seeds show differences to {label(setting.baseline)} above about {words} "
        "nats a token, by the preset's spread on the default text"
    )


def _duration(seconds: float) -> str:
    for limit, unit, name in ((5400, 60, "minute"), (172_800, 3600, "hour")):
        if seconds < limit:
            return f"about {counted(max(1, round(seconds / unit)), name)}"
    return f"about {counted(round(seconds / 86_400), 'day')}"
