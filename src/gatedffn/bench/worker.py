"""The process that one contestant runs in: `python -m gatedffn.bench.worker MODULE:CLASS`."""

import os
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np

from gatedffn.bench.check import cut, make_slices
from gatedffn.bench.contestants import Contestant
from gatedffn.bench.inputs import make_inputs
from gatedffn.bench.protocol import Message, Turn, serve
from gatedffn.bench.rows import Row

WARM_STEPS = 3
"""At most so many before timing: compilers compile, allocators and caches fill."""
WARM_SHARE = 0.2
"""Of a turn's time, which long steps would otherwise spend on warming."""


def main() -> None:
    """Builds the contestant that the command line names, and times it when told to."""
    module, _, name = sys.argv[1].partition(":")
    serve(lambda message: _make_ready(getattr(import_module(module), name), message))


def _make_ready(kind: type[Contestant], message: Message) -> tuple[Turn, Message]:
    row = Row(**message["row"])
    contestant = kind(row, make_inputs(row), message["threads"])
    for _ in range(WARM_STEPS):
        contestant.step()
    results = contestant.results()
    checked = cut(results, make_slices(row))
    path = Path(message["folder"]) / f"{os.getpid()}.npz"
    arrays = {name: tensor.numpy() for name, tensor in checked.items()}
    np.savez(path, allow_pickle=False, **arrays)
    finite = all(bool(result.isfinite().all()) for result in results.values())

    def turn(message: Message) -> Message:
        seconds = message["seconds"]
        _times(contestant, WARM_SHARE * seconds, fewest=1, most=WARM_STEPS)
        fewest, most = message["fewest"], message["most"]
        return {"times": _times(contestant, seconds, fewest=fewest, most=most)}

    return turn, {"results": str(path), "finite": finite}


def _times(contestant: Contestant, seconds: float, *, fewest: int, most: int) -> list[float]:
    """Of single steps, as many as fit into `seconds`."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < fewest or (len(times) < most and time.perf_counter() < end):
        start = time.perf_counter()
        contestant.step()
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
