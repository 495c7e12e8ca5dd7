"""The interactive page: self-contained, and its spelling of every formula is the library's."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray
from support import browser

from gatedffn.activations import SCALARS
from gatedffn.plots import knobs, page, theme, vanishing, zeros
from gatedffn.variants import VARIANTS

ROOT = Path(__file__).parents[1]
Array = NDArray[np.float64]

ROWS = list(VARIANTS.values())


def scalar(name: str, x: Array, values: Mapping[str, float], what: str = "value") -> Array:
    function = SCALARS[name]
    arguments = [values[parameter] for parameter in function.parameters]
    result = getattr(function, what)(torch.from_numpy(x), *arguments)
    return np.asarray(result.numpy())


# the page

SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nothing fetches


def rows_of_page() -> list[dict[str, Any]]:
    found = re.search(r'id="rows">(.*?)</script>', page.page(), re.DOTALL)
    assert found
    rows: list[dict[str, Any]] = json.loads(found[1])
    return rows


def test_the_page_asks_nothing_of_the_network() -> None:
    text = page.page()
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", text.replace(SVG_NAMESPACE, ""))
    for word in ("src=", "href", "@import", "fetch(", "XMLHttpRequest", "import(", "WebSocket"):
        assert word not in text
    assert set(re.findall(r"url\([^)]*\)", text)) <= {"url(#hatch)", "url(#${clip})"}
    assert "default-src 'none'" in text
    assert "{{" not in text


def test_what_a_page_embeds_cannot_end_its_element() -> None:
    hostile = "</script><!--<script> {{style}}"
    text = page.shell(title=hostile, style="", body="", data={"given": hostile}, script="1")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<!--" not in text
    assert text.count("{{style}}") == 2
    found = re.search(r'id="given">(.*?)</script>', text)
    assert found
    assert json.loads(found[1]) == hostile


def test_the_page_holds_the_table() -> None:
    rows = rows_of_page()
    assert [row["name"] for row in rows] == list(VARIANTS)
    for row in rows:
        variant = VARIANTS[row["name"]]
        assert row["formula"] == variant.formula
        assert row["source"] == variant.source
        assert row["style"] == theme.page_style(variant)
        assert [p["default"] for p in row["parameters"]] == list(variant.defaults.values())
        assert ("reach" in row) == variant.gated


@pytest.fixture
def node() -> str:
    path = shutil.which("node")
    if path is None:
        # A lane of its own must not go green without the check; a user's machine may lack node.
        assert not os.environ.get("CI"), "install node: the page's JavaScript was not checked"
        pytest.skip("node is not installed, so the page's JavaScript cannot be run")
    return path


def run_js(node: str, script: str, given: object) -> Any:
    done = subprocess.run(
        [node, "-e", script], input=json.dumps(given), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ = 'const given = JSON.parse(require("fs").readFileSync(0, "utf8"));'
EVALUATE = """
const names = {};
const result = {};
for (const [name, f] of Object.entries(SCALARS)) names[name] = f.parameters;
for (const [name, { x, values }] of Object.entries(given)) {
  const f = SCALARS[name];
  const a = f.parameters.map((p) => values[p]);
  const at = (of) => x.map((v) => of(v, ...a));
  result[name] = { value: at(f.value), derivative: at(f.derivative) };
}
console.log(JSON.stringify({ names, result }));
"""
# Not the defaults, so that a parameter that is ignored shows.
VALUES = {
    "slope": 0.3,
    "beta": 1.7,
    "limit": 3.0,
    "alpha": 0.6,
    "alpha_p": 0.9,
    "alpha_n": 0.7,
    "gate_cap": 2.5,
    "m": 2.2,
    "up_cap": 4.0,
}


def js_mismatches(node: str, source: str) -> list[str]:
    x = np.concatenate([np.linspace(-20.0, 20.0, 401), [-1e-3, 1e-3, 1e-8, -0.7517915]])
    given = {name: {"x": x.tolist(), "values": VALUES} for name in SCALARS}
    found = run_js(node, source + READ + EVALUATE, given)
    assert found["names"] == {name: list(f.parameters) for name, f in SCALARS.items()}
    wrong = []
    for name in SCALARS:
        for what in ("value", "derivative"):
            expected = scalar(name, x, VALUES, what)
            result = np.array(found["result"][name][what], dtype=np.float64)
            # A derivative near its zero is the difference of two numbers below 1.
            if not np.allclose(result, expected, rtol=1e-11, atol=1e-15, equal_nan=False):
                wrong.append(f"{name}.{what}")
    return wrong


def test_every_formula_in_javascript_is_the_librarys(node: str) -> None:
    assert js_mismatches(node, page.scalars()) == []


@pytest.mark.parametrize(
    ("right", "fault", "shows_in"),
    [
        ("TANH_GELU_CUBIC = 0.044715", "TANH_GELU_CUBIC = 0.0447", ["gelu_tanh.value"]),
        ("value + 1.0", "value", ["clip_plus_one"]),
        ("at + z * bend];", "at + x * bend];", ["swish"]),
    ],
)
def test_a_wrong_formula_in_javascript_is_found(
    node: str, right: str, fault: str, shows_in: list[str]
) -> None:
    source = page.scalars()
    assert right in source
    wrong = " ".join(js_mismatches(node, source.replace(right, fault)))
    assert all(name in wrong for name in shows_in)


def test_the_page_finds_the_same_zeros(node: str) -> None:
    rows = rows_of_page()
    script = f"""
    {READ}
    console.log(JSON.stringify(given.map((row) => {{
      const f = functionsOf(row, {{}});
      const by = row.gated ? [[f.phi, "g", "phi"], [f.along, "x", "h"]] : [[f.along, "x", "f"]];
      return by.map(([of, variable, letter]) => sentence(findZeros(of), variable, letter));
    }})));
    """
    found = run_js(node, page.scalars() + page.asset("vanishing.js") + script, rows)
    for row, words in zip(ROWS, found, strict=True):
        if row.gated:
            by_gate = vanishing.vanishing(row, "by gate")
            along = vanishing.vanishing(row, "gate = up")
            expected = [zeros.sentence(by_gate, "g", "phi"), zeros.sentence(along, "x", "h")]
        else:
            expected = [zeros.sentence(vanishing.vanishing(row, "activation"), "x", "f")]
        assert words == expected, row.name


def test_the_scripts_of_the_page_parse_as_one(node: str, tmp_path: Path) -> None:
    script = tmp_path / "page.js"
    script.write_text(page.script(), encoding="utf-8")
    done = subprocess.run([node, "--check", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# in the browser

KNOBS = knobs.knobs()
PAIRS = ("activation", "family", "fan")
DRAWINGS = [f"{pair}-{part}" for pair in PAIRS for part in ("value", "derivative")]
FACTS = "el('facts').textContent"
CURVE = "document.querySelector('#{} .curve').getAttribute('d')"
# Of every text in a drawing, the size on the screen; of what is pressed, the shorter side.
TEXT_SIZES = """
[...document.querySelectorAll("svg text")].filter((e) => e.checkVisibility()).map((text) => {
  const drawing = text.ownerSVGElement;
  const scale = drawing.clientWidth / drawing.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(text).fontSize) * scale;
})
"""
TARGETS = """
[...document.querySelectorAll("input, button, select, summary")]
  .filter((e) => e.checkVisibility())
  .map((e) => [Math.min(e.offsetWidth, e.offsetHeight), e.outerHTML])
  .filter(([size]) => size < 24)
"""
# Of a drawing in the middle of the window: whether the sliders are in view and do not cover it.
IN_VIEW = """
(() => {
  const node = document.getElementById(ID);
  node.scrollIntoView({ block: "center" });
  const drawing = node.getBoundingClientRect();
  const controls = document.querySelector(".controls").getBoundingClientRect();
  const slider = document.querySelector(".knob:not([hidden]) input").getBoundingClientRect();
  const beside = controls.right <= drawing.left || controls.bottom <= drawing.top;
  return slider.top >= 0 && slider.bottom <= innerHeight && beside;
})()
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.CHROMIUM is None:
        pytest.skip("chromium is not installed, so the page cannot be looked at")
    folder = tmp_path_factory.mktemp("page")
    with browser.Page(page.write_page(folder / "page.html"), folder / "profile") as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_what_is_on_the_page_can_be_read_and_pressed(
    shown: browser.Page, width: int, dark: bool
) -> None:
    shown.show(width=width, dark=dark)
    for choice in ("swiglu_oai", "relu"):
        shown.value(f"update({{ one: '{choice}', fan: fanOf('{choice}') }})")
        shown.value("el('choices').open = true")
        assert shown.value("document.documentElement.scrollWidth") == width
        assert shown.value(browser.OVERFLOWING) == []
        sizes = shown.value(TEXT_SIZES)
        assert len(sizes) > 40
        assert min(sizes) >= 11.0
        assert shown.value(TARGETS) == []
    assert shown.complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_sliders_stay_in_view(shown: browser.Page, width: int) -> None:
    shown.show(width=width, dark=False)
    for drawing in (*DRAWINGS, "heat-over"):
        assert shown.value(IN_VIEW.replace("ID", f"'{drawing}'")), drawing


def test_every_parameter_moves_what_is_drawn(shown: browser.Page) -> None:
    shown.show(width=1280, dark=False)
    for knob in KNOBS:
        row = VARIANTS[knob.rows[-1]]
        shown.value(f"update({{ show: new Set(['{row.name}']), one: '{row.name}', moved: {{}} }})")
        shown.value(f"update({{ fan: '{knob.name}' }})")
        drawing = "family-derivative" if row.gated else "activation-derivative"
        before, facts = shown.value(CURVE.replace("{}", drawing)), shown.value(FACTS)
        # Far to the left, where every parameter bends what is drawn.
        shown.value(f"el('knob-{knob.key.replace(':', '-')}').focus()")
        shown.press("Home")
        assert shown.value(CURVE.replace("{}", drawing)) != before, knob.key
        assert shown.value(FACTS) != facts
        assert f"{knob.key}=" in shown.value("decodeURIComponent(location.hash)")
        visible = shown.value("document.querySelectorAll('.knob:not([hidden])').length")
        assert visible == len(row.parameters)
    assert shown.complaints == []


def test_a_parameter_that_was_not_moved_is_each_rows_own(shown: browser.Page) -> None:
    shown.show(width=1280, dark=False)
    shown.value("update({ show: new Set(['swiglu', 'quick_geglu']) })")
    assert shown.value("document.querySelector('.knob output').textContent") == "own: 1, 1.702"
    strange = "show=swiglu,quick_geglu,constructor&one=constructor&fan=__proto__&limit=none&m=1e9"
    for view in (strange, "show=swiglu,quick_geglu&one=glu&beta=2"):
        shown.value(f"history.replaceState(null, '', '#{view}'); state = readState(); update()")
    assert shown.complaints == []
    legend = "[...document.querySelectorAll('#family-legend .name')].map((e) => e.textContent)"
    assert shown.value(legend) == ["SwiGLU, beta = 2", "quick GEGLU, beta = 2"]
    assert not shown.value("el('fan-part').checkVisibility()")
    shown.value("document.querySelector('.knob button').click()")
    assert shown.value(legend) == ["SwiGLU, beta = 1", "quick GEGLU, beta = 1.702"]


def test_a_tap_reads_values_that_stay(shown: browser.Page) -> None:
    shown.show(width=390, dark=False)
    for drawing, at in (("family-value", "family-at"), ("heat-over", "heat-at")):
        assert "tap it" in shown.value(f"el('{at}').textContent")
        shown.tap(f"#{drawing}", across=0.75)
        told = shown.value(f"el('{at}').textContent")
        assert re.search(r"(At x|g) = [12]\.\d", told), told
        shown.value("document.querySelector('.knob input').focus()")
        shown.press("ArrowRight")
        assert shown.value(f"el('{at}').textContent")[:9] == told[:9]
        shown.value(f"el('{drawing}').focus()")
        shown.press("ArrowRight")
        assert shown.value(f"el('{at}').textContent") != told
        shown.press("Escape")
        assert "tap it" in shown.value(f"el('{at}').textContent")
    assert shown.complaints == []


def test_the_mouse_reads_values_and_a_click_keeps_them(shown: browser.Page) -> None:
    shown.show(width=1280, dark=False)
    told = "el('family-at').textContent"
    box = shown.value(
        "(({ left, top }) => [left, top])(el('family-value').getBoundingClientRect())"
    )

    def mouse(kind: str, across: float, button: str = "none", buttons: int = 0) -> str:
        at = {"x": box[0] + across, "y": box[1] + 100.0}
        pressed = {"button": button, "buttons": buttons, "clickCount": 1}
        shown.call("Input.dispatchMouseEvent", type=kind, **at, **pressed)
        return str(shown.value(told))

    assert mouse("mouseMoved", 100) != mouse("mouseMoved", 200)
    assert "tap it" in mouse("mouseMoved", -9)
    clicked = mouse("mousePressed", 150, "left", 1)
    assert mouse("mouseReleased", 150, "left") == clicked
    assert mouse("mouseMoved", 250) != clicked
    assert mouse("mouseMoved", -9) == clicked
    shown.press("Escape")
    assert "tap it" in shown.value(told)


def test_a_drawing_says_what_it_shows(shown: browser.Page) -> None:
    shown.show(width=1280, dark=False)
    for drawing in DRAWINGS:
        described = f"el(el('{drawing}').getAttribute('aria-describedby')).textContent"
        assert re.search(
            r"beta = \S+: from \S+ at −\d to \S+ at \d, lowest ", shown.value(described)
        )
    assert shown.value("el('family-value').getAttribute('aria-label')") == (
        "hidden value h(x, x) over gate = up = x: GLU; Bilinear; ReGLU; GEGLU; SwiGLU, beta = 1"
    )
    assert "15.71 at gate 4 and up 4" in shown.value("el('heat-over-words').textContent")


def coarse(path: Path) -> Array:
    """A picture in squares of 20 pixels, in which the edges of letters do not count."""
    seen = np.asarray(imread(path), dtype=np.float64)[:, :, :3]
    rows, columns = (size // 20 for size in seen.shape[:2])
    return np.asarray(seen.reshape(rows, 20, columns, 20, 3).mean((1, 3)))


def test_the_picture_in_the_readme_is_of_this_page(shown: browser.Page, tmp_path: Path) -> None:
    shown.show(width=1280, dark=False)
    fresh, kept = tmp_path / "page.png", ROOT / "docs" / "pictures" / "page.png"
    fresh.write_bytes(shown.picture())
    assert kept.stat().st_size < 300_000
    apart = np.abs(coarse(fresh) - coarse(kept))
    assert apart.mean() < 0.01, f"{fresh} shows the page as it is: copy it to {kept}"
    shown.value("update({ show: new Set(), one: 'glu' })")
    fresh.write_bytes(shown.picture())
    assert np.abs(coarse(fresh) - coarse(kept)).mean() > 0.01
