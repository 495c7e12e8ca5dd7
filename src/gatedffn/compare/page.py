"""`report.html`: the whole comparison in one file that asks nothing of the network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape

from matplotlib.ticker import MaxNLocator

from gatedffn.compare import tables
from gatedffn.compare.answer import VIEW_TITLES, best, cautions, left_out, notes, shown
from gatedffn.compare.loads import LOAD_HEADERS, load_cells, loads_note
from gatedffn.compare.look import NONE, label, line_style
from gatedffn.compare.published import SOURCE
from gatedffn.compare.rates import RATES_NOTE, edge_words, rate_cells, rate_curves
from gatedffn.compare.settings import LSTM
from gatedffn.compare.statistics import best_rate
from gatedffn.compare.study import Result
from gatedffn.compare.views import View, seed_differences, views
from gatedffn.plots.page import asset, filled, shell
from gatedffn.plots.theme import MINUS, page_style
from gatedffn.variants import VARIANTS

PACKAGE = "gatedffn.compare"


def page(result: Result) -> str:
    """The page as text."""
    setting = result.setting
    all_views = views(result)
    parts = {
        "shown": "".join(f"<p>{escape(line)}</p>" for line in shown(result)),
        "best": "".join(f"<p>{escape(line)}</p>" for line in [*best(result), *cautions(result)]),
        "choices": "".join(_choice("view", view.name, view.name) for view in all_views),
        "views": "\n".join(_view(result, view) for view in all_views),
        "arms": "".join(_arm_choice(row.variant) for row in result.rows),
        "notes": _list(notes(result)),
        "rates": _rates(result),
        "loads": _loads(result),
        "published": _published(result),
        "all_pairs": escape(tables.PAIRS),
        "pairs": _table("Every two variants", tables.PAIR_HEADERS, tables.pair_cells(result)),
        "runs": _table("Runs", tables.RUN_HEADERS, tables.run_cells(result)),
        "setting": _facts(asdict(setting)),
        "data": _facts(result.data),
        "machines": "".join(
            f"<h3>Machine {number}</h3>{_facts(machine)}"
            for number, machine in enumerate(tables.machines(result), 1)
        ),
        "warnings": _list(tables.warnings(result)) or "<p>No run warned of anything.</p>",
    }
    return shell(
        title="gatedffn: which feed-forward?",
        style=asset("report.css", PACKAGE),
        body=filled(asset("report.html", PACKAGE), parts),
        data={"curves": _curves(result), "searches": _searches(result)},
        script=asset("svg.js") + asset("report.js", PACKAGE),
    )


def _rates(result: Result) -> str:
    if not result.setting.tuned:
        return ""
    curves = rate_curves(result.grid)
    table = _table("Learning rates", *rate_cells(curves, "{} (taken)"))
    legend = "".join(f"<span>{_swatch(arm)}{escape(label(arm))}</span>" for arm in curves)
    return (
        f"<section><h2>Learning rates</h2><p>{escape(RATES_NOTE)}</p>"
        '<div id="rates-figure" hidden><svg class="chart" id="rates" role="img"></svg>'
        f'<p>Filled: the rate that was taken.</p><div class="choices legend">{legend}</div></div>'
        f"{table}<p>{escape(edge_words(curves))}</p></section>"
    )


def _loads(result: Result) -> str:
    cells = load_cells(result)
    if not cells:
        return ""
    table = _table("Load of the experts", LOAD_HEADERS, cells)
    note = escape(loads_note(result.setting))
    return f"<section><h2>Load of the experts</h2><p>{note}</p>{table}</section>"


def _published(result: Result) -> str:
    losses = tables.published_cells(result)
    if not losses:
        return "<p>Of these variants in such a model, no losses were published.</p>"
    return f"<p>{escape(SOURCE)}</p>{_table('Published', tables.PUBLISHED_HEADERS, losses)}"


def arm_style(arm: str) -> dict[str, str]:
    """Two colours and the dashes of an arm."""
    if arm == LSTM:
        color = line_style(arm)["color"]
        return {"light": color, "dark": color, "dashes": "2 2"}
    return page_style(VARIANTS[arm])


def _look(arm: str) -> str:
    style = arm_style(arm)
    return f'style="--light:{style["light"]};--dark:{style["dark"]}"'


def _choice(name: str, value: str, words: str) -> str:
    return f'<label><input type="radio" name="{name}" value="{value}">{escape(words)}</label>'


def _arm_choice(arm: str) -> str:
    return (
        f'<label><input type="checkbox" name="arm" value="{arm}" checked>'
        f"{_swatch(arm)}{escape(label(arm))}</label>"
    )


def _swatch(arm: str) -> str:
    dashes = arm_style(arm)["dashes"]
    return (
        f'<svg class="swatch" viewBox="0 0 36 10" aria-hidden="true" {_look(arm)}>'
        f'<path class="curve" stroke-dasharray="{dashes}" d="M0 5H36"/></svg>'
    )


def _view(result: Result, view: View) -> str:
    setting, title = result.setting, VIEW_TITLES[view.name]
    if view.name == "parameters":
        heads: Sequence[str] = tables.headers(setting)
        body = [tables.cells(row, setting) for row in result.rows]
    else:
        heads = tables.view_headers(setting.baseline)
        body = [tables.view_cells(place) for place in view.places]
    return (
        f'<section class="view" id="at-equal-{view.name}">'
        f"<h2>{escape(title)}</h2>{_forest(result, view)}"
        f"{_table(title, heads, body) if body else ''}{_list(left_out(view))}</section>"
    )


def _forest(result: Result, view: View) -> str:
    """The differences and their intervals, a line an arm, which keep their place at any width."""
    baseline = result.setting.baseline
    rows = {row.variant: row for row in result.rows}
    places = [place for place in view.places if place.differences is not None]
    seeds = {
        place.variant: seed_differences(result, place.variant) if view.name == "parameters" else []
        for place in places
    }
    ends = [0.0]
    for place in places:
        bounds = (*(place.differences or ()), place.low, place.high, *seeds[place.variant])
        ends += [end for end in bounds if end is not None]
    if not places:
        return ""
    low, high = min(ends), max(ends)
    ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]

    def at(value: float) -> str:
        # Room at both sides for a mark or the half of a number.
        return f"{6 + 88 * (value - low) / ((high - low) or 1):.2f}%"

    def line(name: str, low: float, high: float) -> str:
        return f'<line class="{name}" x1="{at(low)}" x2="{at(high)}" y1="50%" y2="50%"/>'

    zero = f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="0" y2="100%"/>'
    lines = []
    for place in places:
        assert place.differences is not None
        row = rows[place.variant]
        marks = zero
        if place.low is not None and place.high is not None:
            marks += line("reach", place.low, place.high)
        if view.name != "parameters":
            marks += line("alone", *place.differences)
        elif row.alone_low is not None and row.alone_high is not None:
            marks += line("alone", row.alone_low, row.alone_high)
        for seed in seeds[place.variant]:
            marks += f'<circle class="seed" cx="{at(seed)}" cy="85%" r="2.5"/>'
        for mean in dict.fromkeys(place.differences):
            marks += f'<circle class="mean" cx="{at(mean)}" cy="50%" r="5"/>'
        name, _, _, difference, _ = tables.view_cells(place)
        lines.append(
            f"<li {_look(place.variant)}><span>{escape(name)}</span>"
            f'<svg aria-hidden="true">{marks}</svg>'
            f'<span class="read">{escape(difference)}</span></li>'
        )
    scale = "".join(
        f'<text x="{at(tick)}" y="14" text-anchor="middle">{_tick(tick)}</text>' for tick in ticks
    )
    return (
        f'<ul class="forest">{"".join(lines)}'
        f'<li class="scale" aria-hidden="true"><span></span><svg>{scale}</svg><span></span></li>'
        f"</ul><p>Held-out loss minus that of {escape(label(baseline))}, nats a token; left is "
        f"better. {escape(MARKS[view.name == 'parameters'])}</p>"
    )


def _tick(value: float) -> str:
    return f"{value:+.3g}".replace("-", MINUS) if value else "0"


MARKS = {
    True: "Thin: the 95% interval for all variants together, which decides what is shown; thick: "
    "that of one variant alone; small dots: seeds.",
    False: "Thick: between these two the difference lies; thin: the 95% intervals of both, for "
    "all variants together.",
}


def _curves(result: Result) -> dict[str, object]:
    """What the script draws: the curve of every run, and what a step of each arm costs."""
    setting = result.setting
    arms = [
        {
            "name": row.variant,
            "label": label(row.variant),
            "style": arm_style(row.variant),
            "runs": [
                [point for point in run["result"]["curve"] if point[1] is not None]
                for run in result.runs[row.variant]
            ],
            "cost": {
                "tokens": setting.tokens_per_step,
                "compute": setting.tokens_per_step * row.flops,
                "time": row.step_time,
            },
        }
        for row in result.rows
    ]
    return {"baseline": setting.baseline, "label": label(setting.baseline), "arms": arms}


def _searches(result: Result) -> list[dict[str, object]]:
    """The points of each arm's search for the learning rate; where a run diverged there is none."""
    if not result.setting.tuned:
        return []
    return [
        {
            "label": label(arm),
            "style": arm_style(arm),
            "points": [(rate, loss) for rate, loss in curve.items() if math.isfinite(loss)],
            "best": best_rate(curve),
        }
        for arm, curve in rate_curves(result.grid).items()
    ]


def _table(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in body
    )
    # What can be scrolled must be reached by the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _facts(facts: Mapping[str, object]) -> str:
    items = (
        f"<dt>{escape(name)}</dt><dd>{escape(_value(value))}</dd>" for name, value in facts.items()
    )
    return f"<dl>{''.join(items)}</dl>"


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return NONE if value in (None, "") else str(value)
