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
            help="swish, activations, family, zeros, surface (every gated variant), or one such "
            "as surface:swiglu. All of them unless told otherwise.",
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
    html: Annotated[
        bool,
        typer.Option(
            "--html", help=f"Write the interactive page {PAGE_NAME} too: one file, works offline."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pictures of every variant: functions, derivatives, surfaces, zeros of derivatives.

    Example: `gatedffn plot family surface:swiglu --format svg --html`
    """
    from gatedffn.plots.catalogue import choose
    from gatedffn.plots.page import write_page
    from gatedffn.plots.theme import FORMATS, save

    figures = [":".join([kind, *all_named(rest)]) for kind, *rest in _parts(figures or ())]
    chosen = choose(figures, all_named(variant))
    formats = [kind for kind in FORMATS if file_format in (BOTH, kind)]
    if not formats:
        raise SettingError(f"{file_format!r} is no format: {', '.join(FORMATS)} or {BOTH}")
    written: dict[str, list[str]] = {}
    for name, draw in chosen.items():
        paths = save(draw(), out / name.replace(":", "-"), formats)
        written[name] = [str(path) for path in paths]
        if not as_json:
            typer.echo("\n".join(written[name]))
    page = str(write_page(out / PAGE_NAME)) if html else None
    if as_json:
        typer.echo(json.dumps({"figures": written, "page": page}, indent=2))
    elif page is not None:
        typer.echo(page)


def _parts(figures: Sequence[str]) -> list[list[str]]:
    """Kinds of figures, each with the variant behind its colon where there is one."""
    return [figure.split(":", 1) for figure in figures]
