"""What a comparison says: the answer in words, the three views, and the report's files."""

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from compare.conftest import made_up, searched
from gatedffn.compare.answer import answer, conclusion, left_out, notes
from gatedffn.compare.published import PUBLISHED
from gatedffn.compare.report import summary_of, write_report
from gatedffn.compare.scales import scale_answers
from gatedffn.compare.statistics import rank
from gatedffn.compare.study import Result
from gatedffn.compare.tables import (
    cells,
    headers,
    machines,
    pair_cells,
    published_cells,
    run_cells,
    warnings,
)
from gatedffn.compare.views import Place, View, views


def changed(result: Result, arm: str, part: str, **changes: Any) -> Result:
    """The same comparison with fields of a part of every run of an arm changed."""
    runs = {
        name: [{**run, part: {**run[part], **changes}} if name == arm else run for run in of_arm]
        for name, of_arm in result.runs.items()
    }
    return replace(result, runs=runs, rows=rank(runs, result.setting.baseline, 1.0))


def view(result: Result, name: str) -> View:
    return next(view for view in views(result) if view.name == name)


def place(view: View, arm: str) -> Place:
    return next(place for place in view.places if place.variant == arm)


# the answer


def test_the_answer_names_what_is_shown_and_what_the_best_costs() -> None:
    result = made_up()
    first, worse, *_ = answer(result)
    row = result.rows[0]
    assert row.variant == "swiglu"
    assert first.startswith("Shown to be better than ReLU: SwiGLU, GEGLU, ReGLU")
    assert "not with each other" in first
    assert worse == "Shown to be worse than ReLU: Swish."
    assert row.difference is not None
    assert row.low is not None
    assert row.high is not None
    words = conclusion(result)
    gain = f"{-row.difference:.3f} [{-row.high:.3f}, {-row.low:.3f}] nats a token"
    assert f"after 200 steps of 2,048 tokens, SwiGLU lowers the held-out loss by {gain}" in words
    assert "a step takes 3% longer [" in words
    assert "4% more memory" in words
    assert "At equal compute the gain is" in words
    assert "At equal time the gain is" in words


def test_a_lowest_loss_that_is_not_shown_is_no_gain() -> None:
    result = made_up(variants=("relu", "swiglu"), seeds=3)
    pairs = zip(result.runs["swiglu"], result.runs["relu"], strict=True)
    for (run, reference), difference in zip(pairs, (-0.1, 0.02, -0.1), strict=True):
        run["result"]["held_out"] = reference["result"]["held_out"] + difference
    result = replace(result, rows=rank(result.runs, "relu", 1.0))
    words = conclusion(result)
    assert "No difference to ReLU shown at this budget: " in words
    assert "has the lowest held-out loss, by" in words
    assert "as chance can do" in words
    assert "At equal time no gain is shown: " in words


def test_one_seed_has_no_interval_in_words() -> None:
    words = conclusion(made_up(seeds=1))
    assert "Not told apart from ReLU, for want of seeds" in words
    assert "without an interval" in words
    assert "[" not in words


def test_a_baseline_that_is_best_says_so() -> None:
    result = made_up(baseline="swiglu")
    assert answer(result)[-1] == "Lowest held-out loss: SwiGLU, which the others are compared with."
    assert "Shown to be worse than SwiGLU: " in conclusion(result)


def test_steps_that_were_not_timed_are_not_spoken_of() -> None:
    result = made_up({"swiglu": {"step_time": None}})
    words = conclusion(result)
    assert "its time was not measured" in words
    assert "At equal time nothing can be said of it: its steps were not timed." in words
    at_equal_time = view(result, "time")
    assert {p.variant for p in at_equal_time.places} == set(result.runs) - {"swiglu"}
    assert left_out(at_equal_time) == ["Nothing can be said of SwiGLU: its steps were not timed."]


def test_a_search_that_ended_at_an_edge_is_told_wherever_the_answer_is(tmp_path: Path) -> None:
    at_edge = searched({"relu": (2.0, 2.1, 2.2), "swiglu": (2.0, 1.9, 2.2)})
    *_, last = answer(at_edge)
    assert "at the edge of those tried for ReLU (0.001): with rates beyond it" in last
    assert conclusion(at_edge).endswith(last)
    assert summary_of(at_edge)["conclusion"].endswith(last)
    assert scale_answers([at_edge])[0].endswith(last)
    write_report(at_edge, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert report.index(last) < report.index("| variant | rate | log-perplexity |")
    inside = searched({"relu": (2.1, 2.0, 2.2), "swiglu": (2.0, 1.9, 2.2)})
    assert "edge" not in conclusion(inside)


def test_the_rate_is_a_column_where_several_were_tried() -> None:
    for result, there in ((searched({"relu": (2.1, 2.0, 2.2)}), True), (made_up(), False)):
        assert ("rate" in headers(result.setting)) is there
        for row in result.rows:
            line = dict(zip(headers(result.setting), cells(row, result.setting), strict=True))
            assert line.get("rate") == ("0.003" if there else None)


# the views


def test_at_equal_parameters_the_view_is_the_table() -> None:
    result = made_up()
    for row in result.rows:
        at = place(view(result, "parameters"), row.variant)
        assert (at.losses[0], at.low, at.high) == (row.loss, row.low, row.high)
        assert at.verdict == row.verdict
        assert at.step == 200


def test_a_costlier_arm_is_known_between_its_curve_and_its_end() -> None:
    result = made_up(variants=("relu", "swiglu"))
    result = changed(result, "relu", "result", step_time=0.1)
    result = changed(result, "swiglu", "result", step_time=0.125)
    at = place(view(result, "time"), "swiglu")
    assert at.step == pytest.approx(160)
    # A point of the curve: no interpolation is in the way.
    rises = [
        dict(run["result"]["curve"])[160] - dict(run["result"]["curve"])[200]
        for run in result.runs["swiglu"]
    ]
    row = result.rows[0]
    assert row.difference is not None
    mean = sum(rises) / len(rises)
    assert mean > 0
    assert at.differences == pytest.approx((row.difference, row.difference + mean))
    assert at.losses == pytest.approx((row.loss, row.loss + mean))
    assert at.low == row.low
    assert at.high is not None
    assert row.high is not None
    assert at.high > row.high
    # ReLU is at its end, so nothing of it is between.
    ends = place(view(result, "time"), "relu").losses
    assert ends[0] == ends[1]


def test_between_two_points_the_curve_is_a_line() -> None:
    result = changed(made_up(variants=("relu", "swiglu")), "swiglu", "cost", flops=6_666_667)
    at = place(view(result, "compute"), "swiglu")
    assert at.step == pytest.approx(180, abs=1e-4)
    rises = []
    for run in result.runs["swiglu"]:
        curve = dict(run["result"]["curve"])
        rises.append((curve[160] + curve[200]) / 2 - curve[200])
    assert at.losses[1] - at.losses[0] == pytest.approx(sum(rises) / len(rises), abs=1e-6)


def test_where_the_baseline_is_costlier_its_gain_is_not_given_away() -> None:
    # At equal steps ReLU is ahead; at equal time it may or may not have been.
    result = made_up(variants=("relu", "swish"))
    assert place(view(result, "parameters"), "swish").verdict == "worse"
    slow = changed(result, "relu", "result", step_time=0.2)
    at = place(view(slow, "time"), "swish")
    assert at.verdict == "no difference shown"
    assert at.differences is not None
    assert at.differences[0] < 0 < at.differences[1]


def test_a_curve_that_begins_later_says_nothing() -> None:
    result = made_up(variants=("relu", "glu"))
    result = changed(result, "relu", "result", step_time=0.1)
    result = changed(result, "glu", "result", step_time=0.625)
    at_equal_time = view(result, "time")
    assert left_out(at_equal_time) == [
        "Nothing can be said of GLU: its learning curve begins after step 32, where it would be "
        "read."
    ]
    assert [p.variant for p in at_equal_time.places] == ["relu"]


def test_times_of_different_machines_do_not_compare() -> None:
    result = changed(made_up(), "glu", "machine", cores=64)
    assert view(result, "time").places == []
    assert "At equal time nothing can be said of it: the runs are from different" in conclusion(
        result
    )
    assert view(result, "compute").places
    assert len(machines(result)) == 2


def test_a_diverged_arm_is_in_no_view() -> None:
    result = made_up({"glu": {"diverged": True, "held_out": None}})
    for of_all in views(result):
        assert "glu" not in {p.variant for p in of_all.places}
        assert of_all.silent == {"glu": "a run diverged"}
        assert place(of_all, "swiglu").verdict == "better"


def test_a_diverged_baseline_compares_nothing() -> None:
    result = made_up({"relu": {"diverged": True, "held_out": None}})
    assert "Not told apart from ReLU, which diverged: SwiGLU" in conclusion(result)
    for of_all in views(result):
        assert all(p.differences is None for p in of_all.places)
        assert all(p.verdict == "no interval" for p in of_all.places)
    assert "Lowest held-out loss: SwiGLU." in answer(result)


# the files


def test_a_report_is_made_from_a_result_alone(tmp_path: Path) -> None:
    result = made_up()
    # As it comes back from a file: tuples are lists.
    runs = json.loads(json.dumps(result.runs))
    paths = write_report(replace(result, runs=runs), tmp_path)
    names = {"report.md", "report.html", "summary.json", "curves.png", "differences.png"}
    assert {path.name for path in paths} == names
    report = (tmp_path / "report.md").read_text()
    places = [report.index(line) for line in answer(result)]
    titles = ("At equal parameters and", "At equal compute", "At equal time")
    places += [report.index(f"## {title}") for title in titles]
    assert places == sorted(places)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [v["name"] for v in summary["views"]] == ["parameters", "compute", "time"]


def test_the_precision_is_that_of_the_runs() -> None:
    result = made_up()
    assert "float32 on the CPU" in notes(result)[1]
    for arm in result.runs:
        result = changed(result, arm, "machine", gpu="a GPU")
    assert "bfloat16 autocast on a GPU" in notes(result)[1]


def test_the_note_on_initial_values_is_the_models_own() -> None:
    def said(**changes: Any) -> str:
        result = made_up()
        [line] = [
            line
            for line in notes(replace(result, setting=replace(result.setting, **changes)))
            if line.startswith("Initialisation: ")
        ]
        return line

    assert "inputs of all branches" in said()
    assert "inputs of all branches" not in said(config="{}")
    assert "relative bias as T5 draws them" in said(model="t5")
    assert "sqrt(fan_in). It" in said(model="gated-conv")
    assert "deviation of 0.02. It" in said(model="t5", init="0.02")


def test_memory_is_said_by_the_optimiser() -> None:
    assert "AdamW's moments" in "".join(notes(made_up()))
    assert "moments" not in "".join(notes(made_up(optimizer="adafactor")))


def test_warnings_are_told_with_their_run() -> None:
    result = made_up()
    assert warnings(result) == []
    result.runs["glu"][1]["warnings"] = ["the loss jumped at step 18"]
    assert warnings(result) == ["GLU, seed 1: the loss jumped at step 18"]


def test_every_run_has_a_line() -> None:
    result = made_up({"glu": {"step_time": None}})
    lines = run_cells(result)
    assert len(lines) == 40
    assert {line[8] for line in lines} == {r["key"] for runs in result.runs.values() for r in runs}
    assert {line[5] for line in lines if line[0] == "GLU"} == {"-"}


def test_the_summary_is_json() -> None:
    result = made_up({"glu": {"diverged": True, "held_out": None, "selection": None}})
    text = json.dumps(summary_of(result), allow_nan=False)
    assert "Diverged in at least one run: GLU." in json.loads(text)["conclusion"]


def test_every_two_variants_are_in_the_report(tmp_path: Path) -> None:
    result = made_up()
    found = pair_cells(result)
    assert len(found) == 28
    by_pair = {(first, second): (shown, words) for first, second, shown, words in found}
    assert by_pair["SwiGLU", "Swish"][1] == "SwiGLU is better"
    assert by_pair["SwiGLU", "GEGLU"][1] == "not told apart"
    best, other = result.rows[0].loss, result.rows[1].loss
    assert by_pair["SwiGLU", "GEGLU"][0].startswith(f"{best - other:+.3f} [")
    write_report(result, tmp_path)
    for name in ("report.md", "report.html"):
        assert "SwiGLU is better" in (tmp_path / name).read_text()
    assert pair_cells(made_up(seeds=1)) == []


def test_the_order_is_compared_with_what_was_published() -> None:
    *_, last = published_cells(made_up())
    ours = {row.variant: row.loss for row in made_up().rows}
    *without_ties, _ = zip(*(astuple(PUBLISHED[arm]) for arm in ours), strict=True)
    expected = [spearman([*ours.values()], [*column]) for column in without_ties]
    assert last[:-1] == ("rank correlation", "-", *(f"{rho:.2f}" for rho in expected))
    assert all(rho > 0.5 for rho in expected)
    assert len(published_cells(made_up(variants=("relu", "swiglu")))) == 2


def spearman(a: list[float], b: list[float]) -> float:
    """Without ties, by the differences of the ranks."""
    first, second = ([sorted(values).index(value) for value in values] for values in (a, b))
    squares = sum((x - y) ** 2 for x, y in zip(first, second, strict=True))
    return 1.0 - 6.0 * squares / (len(a) * (len(a) ** 2 - 1))
