"""The site of `make docs`: the README, the pages of `docs/`, the API and the interactive page.

The whole checkout is the source, so that a link leads to the same file here and where the pages are
read as they are. Nothing of the site is fetched when it is viewed.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from gatedffn import __version__
from gatedffn.cli.plot import PAGE_NAME
from gatedffn.plots.page import write_page

ROOT = Path(__file__).parents[2]

project = "gatedffn"
release = version = __version__
root_doc = "README"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [p.name for p in ROOT.iterdir() if p.name != "docs" and p.suffix != ".md"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a report may begin below its title

default_role = "literal"  # what docstrings put between backticks
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # PyTorch's own words about `forward`
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"gatedffn {version}"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_search_summary = False  # which a page that is a file could not fetch
html_math_renderer = "mathml"

CONTENTS = {
    "Learn": ["docs/learn", "docs/site/play", "docs/maths"],
    "Use": [
        *("docs/compare", "docs/replace", "docs/convert", "docs/experts"),
        *("docs/parallel", "docs/explain", "docs/bench"),
    ],
    "Inside": ["docs/engine", "docs/numbers", "docs/adding-a-variant", "docs/adding-a-way"],
    "Studies": [
        "docs/studies/README",
        *(
            f"{path.parent.name} <{path.relative_to(ROOT).with_suffix('')}>"
            for path in sorted(ROOT.glob("docs/studies/*/report.md"))
        ),
    ],
    "Reference": [
        "docs/site/api",
        *sorted(path.stem for path in ROOT.glob("*.md") if path.stem != root_doc),
    ],
}
"""Every page under the heading it stands below; one that is missing is a warning."""


def contents(app: Sphinx, name: str, source: list[str]) -> None:
    """The README has no list of pages but its own."""
    if name == app.config.root_doc:
        for caption, pages in CONTENTS.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
            source[0] += "\n".join(lines)


def plain(*given: Any) -> None:
    """Docstrings are plain text: outside of backticks an asterisk is one."""
    lines: list[str] = given[-1]
    lines[:] = [re.sub(r"(`[^`]*`)|(?<!\\)\*", lambda m: m[1] or r"\*", line) for line in lines]


def finish(app: Sphinx, error: Exception | None) -> None:
    """Writes the interactive page, and leads to the README from where one looks first."""
    if error is None:
        write_page(Path(app.outdir, PAGE_NAME))
        first = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(first, encoding="utf-8")


def inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    # MathML is drawn by browsers themselves, and read aloud as mathematics.
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("source-read", contents)
    app.connect("autodoc-process-docstring", plain, priority=900)  # after napoleon
    app.connect("build-finished", finish)
