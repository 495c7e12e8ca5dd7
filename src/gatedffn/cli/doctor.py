"""`gatedffn doctor`: what this machine has, what is missing and what that costs."""

import contextlib
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from gatedffn import __version__, native
from gatedffn.cli.tables import print_facts, print_table
from gatedffn.errors import BuildError
from gatedffn.explanation import explain
from gatedffn.layers import FeedForward
from gatedffn.ops import gpu, kernels, measure
from gatedffn.ops.feed_forward.products import PRODUCTS, has_onednn

SIZE = 1024  # of the square matrices whose product is timed
SHOWN = 12  # choices that are printed for people


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    forget: Annotated[
        bool,
        typer.Option(help="Delete the choices: each is measured again when it is next needed."),
    ] = False,
) -> None:
    """What this machine has: instruction sets, compiler, kernels, matrix products, and choices.

    Builds the kernels if they are not built yet, times a matrix product of each library, and says
    which way layers would take (`gatedffn explain` says why).

    Example: `gatedffn doctor`
    """
    if forget:
        typer.echo(f"choices deleted: {measure.discard()}", err=as_json)
    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    facts = [
        (
            name.replace("_", " "),
            ", ".join(map(str, value)) if isinstance(value, list) else str(value),
        )
        for name, value in found.items()
        if name != "choices"
    ]
    print_facts(console, facts, "this machine")
    if found["choices"]:
        stored = list(found["choices"].items())
        title = f"choices measured so far: {len(stored)}"
        if doubtful := sum(bool(choice_.get("doubts")) for _, choice_ in stored):
            title += f", {doubtful} doubtful, as rounds disagreed"
        if len(stored) > SHOWN:
            title += f", the last {SHOWN} of them (--json has all)"
        body = [
            (
                key,
                choice_["chosen"] + (", doubtful" if choice_.get("doubts") else ""),
                ", ".join(f"{way} {ms:.3g}" for way, ms in choice_["milliseconds"].items()),
            )
            for key, choice_ in stored[-SHOWN:]
        ]
        print_table(console, ("choice", "taken", "milliseconds"), body, title)


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, as data."""
    missing = kernels.missing()
    return {
        "processor": native.processor_name(),
        "threads": torch.get_num_threads(),
        "instruction_sets": list(native.levels()),
        "compiler": _compiler(),
        "openmp": native.openmp() or "none is loaded: the kernels run on one thread",
        "kernels": missing or native.state(kernels.SOURCE),
        "without_kernels": _cost() if missing else "nothing is missing",
        "cache": _cache(),
        "gpu": _gpu(),
        "versions": _versions(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "tuning": "on" if measure.tuning() else "off: the rule decides",
        "products": _rates(),
        "plans": _plans(),
        "choices": measure.stored(),
    }


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    return "; ".join(
        f"{torch.cuda.get_device_name(index)}: "
        + (f"PyTorch's own operators, as {reason}" if reason else "kernels by Triton")
        for index in range(torch.cuda.device_count())
        for reason in [gpu.missing(torch.device("cuda", index))]
    )


def _versions() -> list[str]:
    """Of Python, of this package, and of what it works with where that is installed."""
    found = [f"python {platform.python_version()}", f"gatedffn {__version__}"]
    for name in ("torch", "triton", "transformers", "safetensors", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def _compiler() -> str:
    try:
        return native.find_compiler()[0]
    except BuildError as error:
        return str(error)


def _cache() -> str:
    try:
        return str(native.cache_folder())
    except BuildError as error:
        return str(error)


def _cost() -> str:
    """One token by PyTorch, beside the reading of the weights, which is all that kernels take."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = FeedForward(2 * SIZE, dtype=dtype)
        x, weights = torch.randn(1, 2 * SIZE, dtype=dtype), [*layer.parameters()]
        with torch.no_grad():
            taken = _least(partial(layer, x))
            read = _least(partial(_read, weights))
        name = str(dtype).removeprefix("torch.")
        found.append(
            f"one token of ({2 * SIZE}, {layer.d_hidden}) {name} takes {1e3 * taken:.1f} ms,"
            f" its weights are read in {1e3 * read:.1f}"
        )
    return "; ".join(found)


def _read(weights: list[torch.nn.Parameter]) -> None:
    for weight in weights:
        weight.view(torch.float32).sum()


def _rates() -> list[str]:
    """The GFLOP/s of a square product by each library, the best of three."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIZE, SIZE).to(dtype)
        for name, product in PRODUCTS.items():
            if name == "onednn" and (dtype != torch.float32 or not has_onednn(dtype)):
                continue
            if name == "blocks" and kernels.missing():
                continue
            rate = 2 * SIZE**3 / _least(partial(product, a, a, None, False)) / 1e9
            found.append(f"{name} {str(dtype).removeprefix('torch.')} {rate:.0f} GFLOP/s")
    return found


def _plans() -> list[str]:
    """What a layer of that width would run, as `explain` has it."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = FeedForward(SIZE, dtype=dtype)
        for tokens in (1, SIZE):
            plans = explain(layer, tokens=tokens)[0].plans
            ways = ", ".join(f"{stage} {plan.chosen}" for stage, plan in plans.items())
            size = f"{SIZE} x {layer.d_hidden} {str(dtype).removeprefix('torch.')}"
            found.append(f"{size}, {tokens} token{'s'[: tokens - 1]}: {ways}")
    return found


def _least(run: Callable[[], object]) -> float:
    """The seconds of the best of three runs, after one."""
    run()
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
