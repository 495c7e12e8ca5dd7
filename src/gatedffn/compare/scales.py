"""Comparisons at several sizes or budgets: how the answer changes over them."""

from collections.abc import Sequence
from pathlib import Path

from gatedffn.compare.answer import cautions, shown
from gatedffn.compare.look import NONE, label, line_style, table, with_interval
from gatedffn.compare.report import write_report
from gatedffn.compare.settings import SCALES, Setting
from gatedffn.compare.study import Result
from gatedffn.errors import SettingError
from gatedffn.files import written_aside
from gatedffn.plots.theme import REFERENCE, figure, save


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


def _arms(results: Sequence[Result]) -> tuple[str, list[str]]:
    """The baseline of all of them, and the others that any has.

    Raises:
        SettingError: they have different baselines.
    """
    baselines = list(dict.fromkeys(result.setting.baseline for result in results))
    if len(baselines) > 1:
        raise SettingError(
            f"the studies have the baselines {' and '.join(baselines)}: choose one with --baseline"
        )
    arms = dict.fromkeys(arm for result in results for arm in result.setting.variants)
    return baselines[0], [arm for arm in arms if arm != baselines[0]]


def scale_cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of differences over scale, in the order of the arms."""
    baseline, arms = _arms(results)
    rows = [{row.variant: row for row in result.rows} for result in results]
    lines = []
    for arm in arms:
        cells = [
            with_interval(row.difference, row.low, row.high) if row else NONE
            for row in (of_one.get(arm) for of_one in rows)
        ]
        found = [of_one[arm].verdict for of_one in rows if arm in of_one]
        better, worse = found.count("better"), found.count("worse")
        lines.append([label(arm), *cells, f"{better} better, {worse} worse, of {len(found)}"])
    names = scale_names([result.setting for result in results])
    return [f"difference to {label(baseline)}", *names, "shown at 95%"], lines


def scale_answers(results: Sequence[Result]) -> list[str]:
    """What is shown at each scale, in words."""
    names = scale_names([result.setting for result in results])
    return [
        f"{name}: {' '.join([*shown(result), *cautions(result)])}"
        for name, result in zip(names, results, strict=True)
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
    settings = [result.setting for result in results]
    baseline, arms = _arms(results)
    flops = [next(r.flops for r in result.rows if r.variant == baseline) for result in results]
    work = [
        each * setting.steps * setting.tokens_per_step
        for each, setting in zip(flops, settings, strict=True)
    ]
    order = sorted(range(len(results)), key=work.__getitem__)
    with figure(9.0, 5.0) as drawn:
        axes = drawn.subplots()
        axes.axhline(0.0, color=REFERENCE, linewidth=1.0)
        for place, arm in enumerate(arms):
            # A little apart, so that intervals at one scale do not cover each other.
            apart = 1.03 ** (place - (len(arms) - 1) / 2)
            points = [
                (work[i] * apart, row.difference, row.detectable or 0.0)
                for i in order
                for row in results[i].rows
                if row.variant == arm and row.difference is not None
            ]
            if points:
                x, y, reach = zip(*points, strict=True)
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
    """Writes `scales.md`, its figure, and a report of each in a folder of its name; returns the
    paths of the first two.
    """
    names = scale_names([result.setting for result in results])
    lines = ["# Does it hold over scale?", ""]
    lines += [*(f"{line}\n" for line in scale_answers(results)), *scales_section(results)]
    lines += ["![differences over scale](scales.png)", ""]
    for name, result in zip(names, results, strict=True):
        write_report(result, folder / name.replace(", ", "-").replace(" ", "-"))
    drawn = scales_figure(results, folder / "scales")
    path = folder / "scales.md"
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines), encoding="utf-8")
    return [path, *drawn]
