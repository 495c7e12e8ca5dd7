"""The interactive page of `gatedffn plot`: one file that asks nothing of the network.

And the shell of every such page.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from gatedffn.activations.translation import javascript
from gatedffn.files import written_aside
from gatedffn.plots.knobs import FACTORS, fan, knobs
from gatedffn.plots.surface import extent
from gatedffn.plots.theme import page_sequence, page_style
from gatedffn.variants import PAPER, VARIANTS, Variant

# In the order in which each uses what those before it define; the first uses the functions.
SCRIPTS = ("vanishing.js", "svg.js", "chart.js", "heat.js", "cursor.js", "knobs.js", "page.js")


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
    return shell(
        title="gatedffn: what each feed-forward variant computes",
        style=asset("page.css"),
        body=asset("page.html"),
        data={
            "rows": [_record(row) for row in VARIANTS.values()],
            "knobs": [asdict(knob) for knob in knobs()],
            "fan-styles": page_sequence(len(FACTORS)),
            "defaults": {"show": PAPER, "one": "swiglu"},
        },
        script=script(),
    )


def shell(*, title: str, style: str, body: str, data: Mapping[str, object], script: str) -> str:
    """A page in one file, with the style that all pages share.

    Args:
        title: plain text.
        style: CSS beyond the shared one.
        body: HTML, in which all that is not the page's own is escaped.
        data: what the script reads as JSON, by the identifier of its element.
        script: JavaScript.
    """
    parts = {
        "title": escape(title),
        "style": asset("shell.css") + style,
        "body": body,
        "data": "\n".join(
            f'<script type="application/json" id="{name}">{_embedded(value)}</script>'
            for name, value in data.items()
        ),
        "script": script,
    }
    return filled(asset("shell.html"), parts)


def filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with each `{{name}}` replaced, in one pass: braces in a part stay."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def script() -> str:
    """All scripts of the page as one."""
    return scalars() + "".join(asset(name) for name in SCRIPTS)


def scalars() -> str:
    """`SCALARS`: the scalar functions by the names that rows of the table use."""
    inside = asset("elementary.js") + javascript()
    return f'"use strict";\nconst SCALARS = (() => {{\n{inside}return SCALARS;\n}})();\n'


def asset(name: str, package: str = "gatedffn.plots") -> str:
    """One of the files that a page is made of."""
    return files(package).joinpath("assets", name).read_text(encoding="utf-8")


def _record(row: Variant) -> dict[str, Any]:
    parameters = [{**asdict(parameter), "fan": fan(parameter)} for parameter in row.parameters]
    look = {"gated": row.gated, "style": page_style(row)}
    record = {**asdict(row), "parameters": parameters, **look}
    return {**record, "reach": extent(row)} if row.gated else record


def _embedded(value: object) -> str:
    # "</" would end the script element that holds the text, and "<!--" hide its end.
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
