"""Learning rates and scales: the numbers of their tables, by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compare.conftest import EFFECTS, Log, made_up
from gatedffn.compare import rates, scales
from gatedffn.compare.answer import shown as in_words
from gatedffn.compare.look import label
from gatedffn.compare.report import write_report
from gatedffn.compare.settings import Setting
from gatedffn.compare.store import read_runs
from gatedffn.compare.study import Result, prepare, study
from gatedffn.errors import SettingError


def run(arm: str, seed: int, rate: float, loss: float | None, diverged: bool = False) -> Any:
    return {
        "run": {"variant": arm, "seed": seed, "learning_rate": rate},
        "result": {"selection": loss, "diverged": diverged},
    }


RUNS = [
    run("relu", 1, 1e-3, 9.0),
    run("relu", 0, 4e-3, 2.2),
    run("relu", 0, 1e-3, 2.5),
    run("relu", 0, 2e-3, 2.1),
    run("swiglu", 0, 1e-3, 2.4),
    run("swiglu", 0, 2e-3, 2.0),
    run("swiglu", 0, 4e-3, 1.0, diverged=True),
    run("glu", 0, 1e-3, 2.6),
    run("glu", 0, 2e-3, 2.3),
    run("glu", 0, 4e-3, None),
    run("geglu", 0, 1e-3, 1.9),
    run("geglu", 0, 2e-3, 2.0),
    run("geglu", 0, 4e-3, 2.1),
]


def test_the_curve_of_a_rate_is_that_of_the_first_seed() -> None:
    inf = float("inf")
    curves = rates.rate_curves(RUNS)
    assert curves["relu"] == {1e-3: 2.5, 2e-3: 2.1, 4e-3: 2.2}
    assert list(curves["relu"]) == [1e-3, 2e-3, 4e-3]
    assert curves["swiglu"] == {1e-3: 2.4, 2e-3: 2.0, 4e-3: inf}
    assert curves["glu"][4e-3] == inf
    assert rates.at_the_edge(curves) == ["geglu"]
    assert rates.at_the_edge({"relu": {1e-3: 2.0}}) == []


def test_the_search_as_a_table(tmp_path: Path) -> None:
    lines = rates.rates_section(RUNS)
    assert "| variant | 0.001 | 0.002 | 0.004 |" in lines
    assert "| ReLU | 2.500 | **2.100** | 2.200 |" in lines
    assert "| SwiGLU | 2.400 | **2.000** | diverged |" in lines
    assert rates.edge_words(rates.rate_curves(RUNS)) in lines
    edge = rates.edge_words({"glu": {1e-3: 2.0, 2e-3: 1.0}, "relu": {1e-3: 1.0, 2e-3: 2.0}})
    assert "at the edge of those tried for ReLU (0.001) and GLU (0.002): with rates" in edge
    [path] = rates.rates_figure(RUNS, tmp_path / "rates")
    assert path.stat().st_size > 5000


def result_of(setting: Setting, prose: Path, folder: Path) -> Result:
    result = study(prepare(setting, [str(prose)]), folder, Log())
    assert result is not None
    return result


def test_a_search_is_in_the_report(tiny: Setting, prose: Path, tmp_path: Path) -> None:
    setting = replace(tiny, steps=4, learning_rates=(1e-3, 1e-2), variants=("relu", "swiglu"))
    result = result_of(setting, prose, tmp_path)
    assert len(result.grid) == 4
    assert {path.name for path in write_report(result, tmp_path)} >= {"rates.png"}
    report, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for arm, curve in rates.rate_curves(result.grid).items():
        chosen = result.runs[arm][0]["run"]["learning_rate"]
        assert curve[chosen] == min(curve.values())
        assert f"**{curve[chosen]:.3f}**" in report
        assert f"{curve[chosen]:.3f} (taken)" in page


def test_differences_over_scale(tiny: Setting, prose: Path, tmp_path: Path) -> None:
    settings = [replace(tiny, steps=steps, variants=("relu", "swiglu")) for steps in (4, 8)]
    results = [result_of(setting, prose, tmp_path) for setting in settings]
    head, lines = scales.scale_cells(results)
    assert head == ["difference to ReLU", "steps 4", "steps 8", "shown at 95%"]
    [[arm, *cells, shown]] = lines
    assert arm == "SwiGLU"
    verdicts = []
    for cell, result in zip(cells, results, strict=True):
        row = next(row for row in result.rows if row.variant == "swiglu")
        verdicts.append(row.verdict)
        assert cell == f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
    better, worse = verdicts.count("better"), verdicts.count("worse")
    assert shown == f"{better} better, {worse} worse, of 2"
    paths = scales.write_scales(results, tmp_path)
    assert [path.name for path in paths] == ["scales.md", "scales.png"]
    text = paths[0].read_text()
    answers = [f"steps {r.setting.steps}: {' '.join(in_words(r))}\n" for r in results]
    assert text.startswith("# Does it hold over scale?\n\n" + "\n".join(answers) + "\n## ")
    assert "| SwiGLU | " + " | ".join(cells) in text
    assert "![differences over scale](scales.png)" in text
    # Both studies are in one folder, with keys of their own.
    assert len(read_runs(tmp_path)) == 8
    # One seed has a difference and no interval.
    alone = [
        replace(
            result,
            rows=[replace(row, low=None, high=None, detectable=None) for row in result.rows],
        )
        for result in results
    ]
    _, [[_, first, *_]] = scales.scale_cells(alone)
    assert "[" not in first
    assert scales.scales_figure(alone, tmp_path / "alone")[0].exists()


def test_scales_are_named_by_what_differs(tiny: Setting) -> None:
    wide = replace(tiny, d_model=64)
    assert scales.scale_names([tiny]) == [""]
    assert scales.scale_names([tiny, wide]) == ["d_model 32", "d_model 64"]
    assert scales.scale_names([tiny, replace(wide, steps=7)]) == [
        "d_model 32, steps 12",
        "d_model 64, steps 7",
    ]
    with pytest.raises(SettingError, match="give each value once"):
        scales.scale_names([tiny, wide, tiny])


def test_scales_may_have_different_variants_but_one_baseline(tmp_path: Path) -> None:
    results = [made_up(steps=200), made_up(steps=400, variants=("relu", "swiglu"))]
    _, lines = scales.scale_cells(results)
    by_name = {line[0]: line[1:] for line in lines}
    assert set(by_name) == {label(arm) for arm in EFFECTS if arm != "relu"}
    assert by_name["SwiGLU"][2] == "2 better, 0 worse, of 2"
    assert by_name["GEGLU"][1:] == ["-", "1 better, 0 worse, of 1"]
    assert scales.scales_figure(results, tmp_path / "figure")[0].exists()
    results[1] = made_up(steps=400, variants=("relu", "swiglu"), baseline="swiglu")
    with pytest.raises(SettingError, match="baselines relu and swiglu: choose one with --baseline"):
        scales.write_scales(results, tmp_path)
    assert not (tmp_path / "scales.md").exists()
