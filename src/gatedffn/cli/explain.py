"""`gatedffn explain`: which way a layer of some size would be computed here, and why."""

from typing import Annotated, Any

import torch
import typer

from gatedffn.cli.named import HELP, complete_variant, named
from gatedffn.errors import SettingError
from gatedffn.experts import Experts
from gatedffn.explanation import explain as explain_module
from gatedffn.layers import FeedForward
from gatedffn.sizing import hidden_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def explain(
    d_model: Annotated[int, typer.Option(help="Width of the layer.")] = 1024,
    d_hidden: Annotated[
        int | None, typer.Option(help="Hidden width. Default: the one at equal parameters.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a call.")] = 1,
    variant: Annotated[
        str, typer.Option(help=f"The variant: {HELP}.", autocompletion=complete_variant)
    ] = "swiglu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    experts: Annotated[
        int | None, typer.Option(help="A stack of so many such layers, as in a mixture of experts.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="How many of them each token goes through. Default: 2.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which way a layer of this size is computed here, in inference and training, and why.

    Measures what has not been measured yet, as a first call would.

    Example: `gatedffn explain --d-model 1024 --tokens 512 --dtype bfloat16`
    """
    if dtype not in DTYPES:
        raise SettingError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if slots is not None and experts is None:
        raise SettingError("--slots says how many experts a token goes through: give --experts too")
    variant = named(variant)
    options: dict[str, Any] = {"variant": variant, "dtype": DTYPES[dtype]}
    width = hidden_size(d_model, variant=variant) if d_hidden is None else d_hidden
    layer = (
        FeedForward(d_model, width, **options)
        if experts is None
        else Experts(d_model, width, experts, **options)
    )
    found = explain_module(layer, tokens=tokens, slots=slots)
    typer.echo(found.to_json() if as_json else str(found))
