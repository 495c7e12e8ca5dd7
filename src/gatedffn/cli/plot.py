"""`gatedffn plot`: what the variants look like."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gatedffn.cli.named import all_named, complete_variant
from gatedffn.errors import SettingError

PAGE_NAME = "gatedffn.html"


BOTH = "both"


def plot(
    figures: Annotated[
        list[str] | None,
        typer.Argument(
            help="swish, swiglu, activations, family, zeros, surface (every gated variant), or one "
            "such as surface:swiglu. All of them and the page unless told otherwise.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write into; made if it is missing.")
    ] = Path("gatedffn-plots"),
    file_format: Annotated[
        str, typer.Option("--format", help="The format of the figures: png, svg or both.")
    ] = BOTH,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            autocompletion=complete_variant,
            help="Draw the surface of this gated variant only; can be given again.",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[
        list[float] | None,
        typer.Option(
            "--beta",
            help="Draw swish and swiglu for this beta; can be given again.",
            show_default=False,
        ),
    ] = None,
    reach: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LOW HIGH",
            help="Draw swish and swiglu from this x to that one.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        bool | None,
        typer.Option(
            "--html/--no-html",
            help=f"Write the interactive page {PAGE_NAME}: one file, works offline. It is written "
            "unless figures are named.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pictures of every variant: functions, derivatives, surfaces, zeros of derivatives.

    And a page on which their parameters move.

    Example: `gatedffn plot family surface:swiglu --format svg --html`

    Example: `gatedffn plot swiglu --beta 0.5 --beta 1 --range -6 6`
    """
    from gatedffn.plots.catalogue import choose
    from gatedffn.plots.page import write_page
    from gatedffn.plots.theme import FORMATS, save

    figures = [":".join([kind, *all_named(rest)]) for kind, *rest in _parts(figures or ())]
    chosen = choose(figures, all_named(variant), beta or (), reach)
    formats = [kind for kind in FORMATS if file_format in (BOTH, kind)]
    if not formats:
        raise SettingError(f"{file_format!r} is no format: {', '.join(FORMATS)} or {BOTH}")
    written: dict[str, list[str]] = {}
    for name, draw in chosen.items():
        paths = save(draw(), out / name.replace(":", "-"), formats)
        written[name] = [str(path) for path in paths]
        if not as_json:
            typer.echo("\n".join(written[name]))
    wanted = not figures if html is None else html
    page = str(write_page(out / PAGE_NAME)) if wanted else None
    if as_json:
        typer.echo(json.dumps({"figures": written, "page": page}, indent=2))
    elif page is not None:
        typer.echo(page)


def _parts(figures: Sequence[str]) -> list[list[str]]:
    """Kinds of figures, each with the variant behind its colon where there is one."""
    return [figure.split(":", 1) for figure in figures]
