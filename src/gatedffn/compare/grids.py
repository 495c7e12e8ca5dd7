"""Comparisons at several learning rates, sizes or budgets: how the answer changes over them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gatedffn.compare.answer import shown
from gatedffn.compare.look import NONE, label, line_style, table, with_interval
from gatedffn.compare.settings import Setting
from gatedffn.compare.store import Record
from gatedffn.compare.study import Result
from gatedffn.errors import SettingError
from gatedffn.files import written_aside
from gatedffn.plots.theme import figure, save

Curves = dict[str, dict[float, float]]
"""For each arm the loss at each learning rate, infinite where the run diverged."""

SCALES = ("d_model", "steps")
"""What a setting may be studied at several values of."""


def rate_curves(records: Iterable[Record]) -> Curves:
    """The losses on the selection part over the learning rate, on the first seed that is there."""
    given = list(records)
    first = min((record["run"]["seed"] for record in given), default=0)
    curves: Curves = {}
    for record in given:
        run, result = record["run"], record["result"]
        if run["seed"] == first:
            lost = result["diverged"] or result["selection"] is None
            loss = math.inf if lost else float(result["selection"])
            curves.setdefault(run["variant"], {})[run["learning_rate"]] = loss
    return {arm: dict(sorted(curve.items())) for arm, curve in curves.items()}


def at_the_edge(curves: Curves) -> list[str]:
    """The arms whose best rate is the lowest or the highest that was tried."""
    return [
        arm
        for arm, curve in curves.items()
        if len(curve) > 1 and min(curve, key=curve.__getitem__) in (min(curve), max(curve))
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
    """For which arms the search should go on; empty if for none."""
    edge = at_the_edge(curves)
    if not edge:
        return ""
    names = ", ".join(map(label, edge))
    return f"The best rate is at the edge of those tried for {names}: try further ones."


def _losses(curve: Mapping[float, float], rates: Sequence[float], mark: str) -> list[str]:
    best = min(curve, key=curve.__getitem__)
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


def scale_names(settings: Sequence[Setting]) -> list[str]:
    """What tells each setting from the others, such as `steps 200`.

    Raises:
        SettingError: two of them are the same.
    """
    values = [{name: getattr(setting, name) for name in SCALES} for setting in settings]
    varied = [name for name in SCALES if len({one[name] for one in values}) > 1]
    names = [", ".join(f"{name} {one[name]}" for name in varied) for one in values]
    if len(set(names)) < len(names):
        raise SettingError("two scales of the comparison are the same: give each value once")
    return names


def _settings(results: Sequence[Result]) -> list[Setting]:
    return [result.setting for result in results]


def scale_cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of differences over scale, in the order of the arms."""
    settings = _settings(results)
    baseline = settings[0].baseline
    names = scale_names(settings)
    rows = [{row.variant: row for row in result.rows} for result in results]
    lines = []
    for arm in settings[0].variants:
        if arm == baseline:
            continue
        found = [one[arm] for one in rows]
        cells = [with_interval(row.difference, row.low, row.high) for row in found]
        better = sum(row.verdict == "better" for row in found)
        worse = sum(row.verdict == "worse" for row in found)
        lines.append([label(arm), *cells, f"{better} better, {worse} worse, of {len(found)}"])
    return [f"difference to {label(baseline)}", *names, "shown at 95%"], lines


def scale_answers(results: Sequence[Result]) -> list[str]:
    """What is shown at each scale, in words."""
    names = scale_names(_settings(results))
    return [
        f"{name}: {' '.join(shown(result))}" for name, result in zip(names, results, strict=True)
    ]


def scales_section(results: Sequence[Result]) -> list[str]:
    """The differences over scale in Markdown."""
    note = (
        "Held-out loss minus the baseline's in nats a token; below 0 is better. The 95% intervals "
        "of a column hold together for all its variants; each column is a study by itself."
    )
    return ["## Over scale", "", *table(*scale_cells(results)), "", note, ""]


def scales_figure(results: Sequence[Result], path: Path) -> list[Path]:
    """The differences over the arithmetic of a run, with their intervals."""
    settings = _settings(results)
    baseline = settings[0].baseline
    flops = [next(r.flops for r in result.rows if r.variant == baseline) for result in results]
    work = [
        each * setting.steps * setting.tokens_per_step
        for each, setting in zip(flops, settings, strict=True)
    ]
    order = sorted(range(len(results)), key=work.__getitem__)
    with figure(9.0, 5.0) as drawn:
        axes = drawn.subplots()
        axes.axhline(0.0, color="#777777", linewidth=1.0)
        arms = [arm for arm in settings[0].variants if arm != baseline]
        for place, arm in enumerate(arms):
            # A little apart, so that intervals at one scale do not cover each other.
            apart = 1.03 ** (place - (len(arms) - 1) / 2)
            rows = [next(r for r in results[i].rows if r.variant == arm) for i in order]
            shown = [
                (work[i] * apart, row.difference, row.detectable or 0.0)
                for i, row in zip(order, rows, strict=True)
                if row.difference is not None
            ]
            if shown:
                x, y, reach = zip(*shown, strict=True)
                style = {**line_style(arm), "marker": "o", "capsize": 3.0}
                axes.errorbar(x, y, reach, label=label(arm), **style)
        axes.set_xscale("log")
        names = scale_names(settings)
        axes.set_xticks([work[i] for i in order], [names[i] for i in order])
        axes.minorticks_off()
        axes.set_xlabel("scale, by the operations of a run")
        axes.set_ylabel(f"held-out loss minus that of {label(baseline)}, nats a token")
        axes.set_title("Differences over scale, 95% intervals")
        axes.legend()
        return save(drawn, path, ["png"])


def write_scales(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes `scales.md` and its figure; returns their paths."""
    drawn = scales_figure(results, folder / "scales")
    lines = ["# Does it hold over scale?", ""]
    lines += [*(f"{line}\n" for line in scale_answers(results)), *scales_section(results)]
    lines += ["![differences over scale](scales.png)", ""]
    path = folder / "scales.md"
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines), encoding="utf-8")
    return [path, *drawn]
