"""`gatedffn doctor`: what this machine has, what is missing and what that costs."""

import json
import platform
import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.ops import choice, kernels
from gatedffn.ops.feed_forward.products import PRODUCTS, has_onednn

SIZE = 1024  # of the square matrices whose product is timed


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What this machine has: instruction sets, compiler, kernels, matrix products, and choices.

    Builds the kernels if they are not built yet, and times a matrix product of each library.

    Example: `gatedffn doctor`
    """
    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    table = Table(show_header=False, box=None, title="this machine", title_justify="left")
    for name, value in found.items():
        if name == "choices":
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)
    if found["choices"]:
        chosen = Table("choice", "taken", "milliseconds", title="choices measured so far")
        for key, choice_ in found["choices"].items():
            times = ", ".join(f"{way} {ms:.3g}" for way, ms in choice_["milliseconds"].items())
            chosen.add_row(key, choice_["chosen"], times)
        console.print(chosen)


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, as data."""
    missing = kernels.missing()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_sets": list(native.levels()),
        "compiler": _compiler(),
        "openmp": native.openmp() or "none is loaded: the kernels run on one thread",
        "kernels": missing or f"built for {native.levels()[0]}",
        "without_kernels": _cost() if missing else "nothing is missing",
        "cache": _cache(),
        "torch": torch.__version__,
        "blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "tuning": "on" if choice.tuning() else "off: the rule decides",
        "products": _rates(),
        "choices": choice.stored(),
    }


def _processor() -> str:
    for line in native.processor().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
    return (
        "few tokens run at PyTorch's own speed, and gating takes several passes over memory; "
        "`gatedffn bench` says how much that is here"
    )


def _rates() -> list[str]:
    """The GFLOP/s of a square product by each library, the best of three."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIZE, SIZE).to(dtype)
        for name, product in PRODUCTS.items():
            if name == "onednn" and (dtype != torch.float32 or not has_onednn(dtype)):
                continue
            product(a, a, None, False)
            seconds = min(_seconds(product, a) for _ in range(3))
            rate = 2 * SIZE**3 / seconds / 1e9
            found.append(f"{name} {str(dtype).removeprefix('torch.')} {rate:.0f} GFLOP/s")
    return found


def _seconds(product: Any, a: torch.Tensor) -> float:
    start = time.perf_counter()
    product(a, a, None, False)
    return time.perf_counter() - start
