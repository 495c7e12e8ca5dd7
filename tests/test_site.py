"""The site of `make docs`: built without a warning, whole without a network, readable anywhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import browser

import gatedffn

ROOT = Path(__file__).parents[1]
PAGES = ("README", "docs/learn", "docs/site/play", "docs/site/api")
# What the two icons of the theme are: pictures in its style sheet.
WITHIN = ("file:", "data:")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as the Makefile does it."""
    folder = tmp_path_factory.mktemp("site")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"@\$\(BIN\)/python (-m sphinx .*)", makefile)
    command = line.replace("build/", f"{folder}/").split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "site"


def test_the_site_has_every_page_and_every_public_name(site: Path) -> None:
    pages = ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
    assert [page for page in pages if not (site / page).with_suffix(".html").is_file()] == []
    api = (site / "docs" / "site" / "api.html").read_text(encoding="utf-8")
    modules = ("functional", "layouts", "paper")
    absent = [n for n in gatedffn.__all__ if n not in modules and f'id="gatedffn.{n}"' not in api]
    assert absent == []
    assert all(f'id="gatedffn.functional.{name}"' in api for name in ("gating", "swish"))
    assert "README.html" in (site / "index.html").read_text(encoding="utf-8")


def test_equations_are_mathml(site: Path) -> None:
    text = (site / "docs" / "learn.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 20
    assert "$" not in re.sub(r"<(script|pre).*?</\1>", "", text, flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_readable_and_asks_nothing_of_the_network(
    site: Path, page: str, tmp_path: Path
) -> None:
    if browser.CHROMIUM is None:
        pytest.skip("chromium is not installed, so the site cannot be looked at")
    with browser.Page(site / f"{page}.html", tmp_path) as shown:
        for width, dark in ((1280, False), (390, True)):
            shown.show(width=width, dark=dark)
            assert [c for c in shown.complaints if not c.startswith(WITHIN)] == []
            assert shown.value("document.documentElement.scrollWidth") == width
            assert shown.value("[...document.images].every((e) => e.naturalWidth > 0)")
            paper = shown.value("getComputedStyle(document.body).backgroundColor")
            assert (sum(json.loads(f"[{paper[4:-1]}]")) < 200) is dark
