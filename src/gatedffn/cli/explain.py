"""`gatedffn explain`: which way a layer of some size would be computed here, and why."""

from typing import Annotated

import torch
import typer

from gatedffn.errors import SettingError
from gatedffn.explanation import explain as explain_module
from gatedffn.layers import FeedForward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def explain(
    d_model: Annotated[int, typer.Option(help="Width of the layer.")] = 1024,
    d_hidden: Annotated[
        int | None, typer.Option(help="Hidden width. Default: the one at equal parameters.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a call.")] = 1,
    variant: Annotated[str, typer.Option(help="The variant.")] = "swiglu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which way a layer of this size is computed here, in inference and training, and why.

    Measures what has not been measured yet, as a first call would.

    Example: `gatedffn explain --d-model 1024 --tokens 512 --dtype bfloat16`
    """
    if dtype not in DTYPES:
        raise SettingError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    layer = FeedForward(d_model, d_hidden, variant=variant, dtype=DTYPES[dtype])
    found = explain_module(layer, tokens=tokens)
    typer.echo(found.to_json() if as_json else str(found))
