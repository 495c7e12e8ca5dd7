"""The steps of a run on a GPU, the most telling first, and what each of them does.

A step has a process of its own and calls what there is: the checks, `gatedffn bench` of one
workload, the search. What it finds it adds to its folder as it goes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from gatedffn.bench import gpu_bars as bars
from gatedffn.bench import gpu_check, gpu_search
from gatedffn.bench.workloads import GPU_EXPERTS, Workload
from gatedffn.cli.app import app
from gatedffn.errors import GatedFFNError

UNFINISHED = 75
"""How a process ends whose time was up before all was done; what it has done it need not repeat."""
REST = 5.0
"""Seconds of its share that a search keeps for its end."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the run, in a process of its own.

    `seconds` is its share, after which it is ended. `place` is the module and function that does
    it: of a folder, the seconds and the `arguments`, returning how the process is to end.
    """

    name: str
    seconds: float
    place: str
    arguments: tuple[str, ...] = ()

    def call(self, folder: Path, seconds: float) -> int:
        """Does it."""
        module, _, name = self.place.partition(":")
        function: Callable[..., int] = getattr(import_module(module), name)
        return function(folder, seconds, *self.arguments)


def check(folder: Path, seconds: float) -> int:
    """Whether what is taken by rule is right."""
    del seconds
    return gpu_check.check(folder)


def bench(folder: Path, seconds: float, *options: str) -> int:
    """One workload of `gatedffn bench`. Who gives no answer for half the time is out."""
    arguments = ("bench", "--device=cuda", f"--patience={seconds / 2}", f"--out={folder}", *options)
    try:
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except GatedFFNError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def search(folder: Path, seconds: float) -> int:
    """Configurations of the fused kernels. Its record is beside the folder, for later tries."""
    minutes = max(seconds - REST, 0.0) / 60
    out = folder.parent / "search"
    code = gpu_search.main([f"--out={out}", f"--minutes={minutes}"])
    return UNFINISHED if code == gpu_search.LEFT else code


HERE = "gatedffn.bench.gpu_steps"


def _bench(workload: Workload, seconds: float, who: str, suite: str = "main") -> Step:
    options = (f"--suite={suite}", f"--workload={workload.name}", f"--contestants={who}")
    return Step(workload.name, seconds, f"{HERE}:bench", options)


_LAYER = "gatedffn,eager,compile,liger,products"
_DECODER = "gatedffn,eager,compile,gatedffn-compile"

STEPS: tuple[Step, ...] = (
    Step("checks", 90.0, f"{HERE}:check"),
    _bench(bars.GATING, 60.0, "gatedffn,eager,compile,liger"),
    _bench(bars.GATING_BACKWARD, 60.0, "gatedffn,eager,compile,liger"),
    _bench(bars.FORWARD, 90.0, _LAYER),
    _bench(bars.TRAINING, 120.0, _LAYER),
    _bench(bars.TOKEN, 60.0, _LAYER),
    _bench(bars.TILED, 90.0, "gatedffn"),
    *(_bench(each, 90.0, "gatedffn,eager,grouped_mm,compile", "experts") for each in GPU_EXPERTS),
    _bench(bars.DECODER_TRAINING, 150.0, _DECODER, "decoder"),
    _bench(bars.DECODER, 120.0, _DECODER, "decoder"),
    Step("search", 480.0, f"{HERE}:search"),
)
