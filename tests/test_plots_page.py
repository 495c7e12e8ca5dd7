"""The interactive page: self-contained, and its spelling of every formula is the library's."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gatedffn.activations import SCALARS
from gatedffn.plots import page, theme, vanishing, zeros
from gatedffn.variants import VARIANTS

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
    text = page.page()
    rows = rows_of_page()
    assert [row["name"] for row in rows] == list(VARIANTS)
    for row in rows:
        variant = VARIANTS[row["name"]]
        assert row["formula"] == variant.formula
        assert row["source"] == variant.source
        assert row["style"] == theme.page_style(variant)
        assert [p["default"] for p in row["parameters"]] == list(variant.defaults.values())
        assert ("reach" in row) == variant.gated
    for control in ("choose-gated", "choose-ungated", "beta", "surface", "heat", "zeros"):
        assert f'id="{control}"' in text
    assert 'type="range"' in text


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
      const f = functionsOf(row, null);
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
