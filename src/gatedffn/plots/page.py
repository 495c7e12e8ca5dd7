"""The interactive page of `gatedffn plot --html`: one file that asks nothing of the network."""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from gatedffn.activations.translation import javascript
from gatedffn.files import written_aside
from gatedffn.plots.surface import extent
from gatedffn.plots.theme import page_style
from gatedffn.variants import PAPER, VARIANTS, Variant

# In the order in which each uses what those before it define; the first uses the functions.
SCRIPTS = ("vanishing.js", "chart.js", "heat.js", "page.js")


def write_page(path: Path) -> Path:
    """Writes the page, aside and then renamed; returns its path.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    with written_aside(path) as aside:
        aside.write_text(page(), encoding="utf-8")
    return path


def page() -> str:
    """The page as text: the table, the theme, the style and the scripts in one HTML file."""
    parts = {
        "style": asset("page.css"),
        "rows": _embedded([_record(row) for row in VARIANTS.values()]),
        "defaults": _embedded({"show": PAPER, "surface": "swiglu"}),
        "script": script(),
    }
    text = asset("page.html")
    for name, content in parts.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    return text


def script() -> str:
    """All scripts of the page as one."""
    return scalars() + "".join(asset(name) for name in SCRIPTS)


def scalars() -> str:
    """`SCALARS`: the scalar functions by the names that rows of the table use."""
    inside = asset("elementary.js") + javascript()
    return f'"use strict";\nconst SCALARS = (() => {{\n{inside}return SCALARS;\n}})();\n'


def asset(name: str) -> str:
    """One of the files that the page is made of."""
    return files("gatedffn.plots").joinpath("assets", name).read_text(encoding="utf-8")


def _record(row: Variant) -> dict[str, Any]:
    record = {**asdict(row), "gated": row.gated, "style": page_style(row)}
    return {**record, "reach": extent(row)} if row.gated else record


def _embedded(value: object) -> str:
    # "</" would end the script element that holds the text.
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")
