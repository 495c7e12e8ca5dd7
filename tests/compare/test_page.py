"""The page of a comparison: one file, whole without scripts, looked at in a real browser."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import browser

from compare.conftest import made_up, searched
from gatedffn.compare.answer import answer
from gatedffn.compare.page import page
from gatedffn.compare.report import write_report

HOSTILE = "</script><img src=x onerror=alert(1)> <!--<script> \"&' {{runs}}"
SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nothing fetches


def test_the_page_asks_nothing_of_the_network() -> None:
    text = page(made_up())
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", text.replace(SVG_NAMESPACE, ""))
    for word in ("src=", "href", "@import", "fetch(", "XMLHttpRequest", "import(", "url("):
        assert word not in text
    assert "default-src 'none'" in text
    assert "{{" not in text


def test_the_page_begins_with_the_answer() -> None:
    result = made_up()
    text = page(result)
    places = [text.index(line) for line in answer(result)]
    assert places == sorted(places)
    assert places[-1] < text.index("<table")


def test_text_of_others_stays_text() -> None:
    result = made_up()
    result = replace(result, data={**result.data, "description": HOSTILE})
    for run in result.runs["glu"]:
        run |= {"key": HOSTILE, "machine": {"gpu": None, "processor": HOSTILE}}
        run["warnings"] = [HOSTILE]
    text = page(result)
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 3
    assert text.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;") >= 5
    # A name in braces is not taken for a part of the page.
    assert text.count("{{runs}}") >= 5


def test_the_search_for_the_rate_is_on_the_page() -> None:
    assert "Learning rates" not in page(made_up())
    result = searched({"relu": (2.25, 2.125, 2.5), "swiglu": (2.25, 2.125, 2.0)})
    text = page(result)
    assert "<td>2.250</td><td>2.125 (taken)</td><td>2.500</td>" in text
    assert "<td>2.250</td><td>2.125</td><td>2.000 (taken)</td>" in text
    assert text.count("at the edge of those tried for SwiGLU (0.009)") == 2
    assert text.index("at the edge") < text.index("<table"), "in the answer"


def test_the_curves_are_those_of_the_runs() -> None:
    result = made_up({"glu": {"step_time": None}})
    found = re.search(r'id="curves">(.*?)</script>', page(result), re.S)
    assert found
    curves = json.loads(found[1])
    assert [arm["name"] for arm in curves["arms"]] == [row.variant for row in result.rows]
    glu = next(arm for arm in curves["arms"] if arm["name"] == "glu")
    assert glu["cost"] == {"tokens": 2048, "compute": 2048 * 6_000_000, "time": None}
    assert [len(run) for run in glu["runs"]] == [5] * 5


# in the browser

CHOSEN = "document.querySelector('input[name=view]:checked').value"
VISIBLE = (
    "[...document.querySelectorAll('.view')].filter((v) => v.checkVisibility()).map((v) => v.id)"
)
FOCUSED = "document.activeElement.textContent || document.activeElement.value"
COLUMN = """
[...document.querySelectorAll('.view:not([hidden]) tbody tr')]
  .map((row) => row.cells[INDEX].textContent)
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.CHROMIUM is None:
        pytest.skip("chromium is not installed, so the page cannot be looked at")
    folder = tmp_path_factory.mktemp("page")
    result = made_up()
    result = replace(result, data={**result.data, "description": HOSTILE + "x" * 200})
    write_report(result, folder)
    with browser.Page(folder / "report.html", folder / "profile") as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_nothing_complains(
    shown: browser.Page, width: int, dark: bool
) -> None:
    shown.show(width=width, dark=dark)
    assert shown.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)"
    )
    for view in ("parameters", "compute", "time"):
        shown.value(f"document.querySelector('input[value={view}]').click()")
        shown.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert shown.value("document.documentElement.scrollWidth") == width
        assert shown.value(browser.OVERFLOWING) == []
    assert shown.complaints == []


def test_pictures_have_the_colours_of_the_scheme(shown: browser.Page) -> None:
    seen = []
    for dark in (False, True):
        shown.show(width=1280, dark=dark)
        style = "getComputedStyle(document.querySelector('.forest .{}')).{}"
        lines = [shown.value(style.format(name, "stroke")) for name in ("reach", "alone", "mean")]
        assert len(set(lines)) == 1, "the three lines of a variant"
        assert shown.value(style.format("alone", "strokeWidth")) == "5px"
        seen.append(lines[0])
    assert seen[0] != seen[1]


def test_views_are_switched_by_the_keyboard(shown: browser.Page) -> None:
    shown.show(width=1280, dark=False)
    assert shown.value(VISIBLE) == ["at-equal-parameters"]
    shown.press("Tab")
    for view in ("compute", "time", "parameters"):
        shown.press("ArrowRight")
        assert shown.value(CHOSEN) == view
        assert shown.value(VISIBLE) == [f"at-equal-{view}"]
    assert shown.complaints == []


def test_tables_are_sorted_by_the_keyboard(shown: browser.Page) -> None:
    shown.show(width=390, dark=True)
    assert shown.value(COLUMN.replace("INDEX", "0"))[0] == "SwiGLU"
    # The chosen view, the table that scrolls, then the heads of its columns.
    shown.press("Tab", 3)
    assert shown.value(FOCUSED) == "variant"
    shown.press("Enter")
    names = shown.value(COLUMN.replace("INDEX", "0"))
    assert names == sorted(names)
    shown.press("Tab")
    shown.press(" ")
    losses = [float(text.split()[0]) for text in shown.value(COLUMN.replace("INDEX", "1"))]
    assert losses == sorted(losses)
    shown.press("Enter")
    losses = [float(text.split()[0]) for text in shown.value(COLUMN.replace("INDEX", "1"))]
    assert losses == sorted(losses, reverse=True)
    heads = "[...document.querySelectorAll('.view:not([hidden]) thead th')]"
    sorts = shown.value(f"{heads}.map((head) => head.getAttribute('aria-sort'))")
    assert sorts == [None, "descending", *[None] * 9]
    shown.value(f"{heads}[9].querySelector('button').click()")
    speeds = [int(text.replace(",", "")) for text in shown.value(COLUMN.replace("INDEX", "9"))]
    assert len(set(speeds)) == 8
    assert speeds == sorted(speeds)
    # The baseline's dash comes after every number.
    shown.value(f"{heads}[3].querySelector('button').click()")
    assert shown.value(COLUMN.replace("INDEX", "3"))[-1] == "-"
    assert shown.complaints == []


def test_curves_are_drawn_against_what_is_chosen(shown: browser.Page) -> None:
    shown.show(width=1280, dark=False)
    lines = "document.querySelectorAll('#chart .curve').length"
    label = "document.querySelector('#chart').getAttribute('aria-label')"
    assert shown.value(lines) == 8
    assert shown.value("document.querySelectorAll('#chart .band').length") == 8
    words = shown.value("el('chart-words').textContent")
    assert len(re.findall(r"\w: from -?\d\.\d{3} to -?\d\.\d{3}\.", words)) == 8
    assert shown.value(label).startswith("loss less that of ReLU over thousand tokens: SwiGLU")
    drawn = set()
    for cost, unit in (("tokens", "tokens"), ("time", "seconds"), ("compute", "FLOP")):
        shown.value(f"document.querySelector('input[name=cost][value={cost}]').click()")
        assert unit in shown.value(label)
        drawn.add(shown.value("document.querySelector('#chart').innerHTML"))
    assert len(drawn) == 3
    shown.value("document.querySelector('#minus').click()")
    assert shown.value(label).startswith("loss over")
    shown.value("document.querySelectorAll('input[name=arm]').forEach((box) => box.click())")
    assert shown.value(lines) == 0
    assert shown.complaints == []


def test_the_search_is_drawn_over_the_rate(tmp_path: Path) -> None:
    if browser.CHROMIUM is None:
        pytest.skip("chromium is not installed, so the page cannot be looked at")
    write_report(searched({"relu": (2.0, 1.5, 3.0), "swiglu": (1.75, 1.0, math.inf)}), tmp_path)
    with browser.Page(tmp_path / "report.html", tmp_path / "profile") as opened:
        opened.show(width=390, dark=True)
        assert opened.value("document.querySelectorAll('#rates .curve').length") == 2
        points = "[...document.querySelectorAll('#rates circle')]"
        classes = opened.value(f"{points}.map((c) => c.getAttribute('class'))")
        assert classes == ["point", "point taken", "point", "point", "point taken"]
        x, y = (opened.value(f"{points}.map((c) => Number(c.getAttribute('c{a}')))") for a in "xy")
        # Equal ratios of rates are equally far apart, and a lower loss is lower down.
        assert x[1] - x[0] == pytest.approx(x[2] - x[1])
        assert y[2] < y[0] < y[3] < y[1] < y[4]
        texts = opened.value(
            "[...document.querySelectorAll('#rates text')].map((t) => t.innerHTML)"
        )
        assert texts[:3] == ["0.001", "0.003", "0.009"]
        assert opened.value("document.documentElement.scrollWidth") == 390
        assert opened.complaints == []


def test_without_scripts_the_answer_and_all_tables_are_there(shown: browser.Page) -> None:
    shown.show(width=390, dark=False, scripts=False)
    document = shown.call("DOM.getDocument")["root"]["nodeId"]

    def boxes(selector: str) -> int:
        found = shown.call("DOM.querySelectorAll", nodeId=document, selector=selector)
        tall = 0
        for node in found["nodeIds"]:
            model = shown.call("DOM.getBoxModel", nodeId=node)
            tall += model["model"]["height"] > 20
        return tall

    assert boxes(".answer") == 2
    assert boxes(".view") == 3
    assert boxes(".view table") == 3
    assert boxes(".forest") == 3
