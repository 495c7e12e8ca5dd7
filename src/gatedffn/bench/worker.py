"""The process that one contestant runs in: `python -m gatedffn.bench.worker MODULE:CLASS`."""

import os
import sys
from pathlib import Path

import numpy as np

from gatedffn.bench.check import cut, make_slices
from gatedffn.bench.contestants import Contestant, kind_of
from gatedffn.bench.devices import Place, Steps, place_of
from gatedffn.bench.inputs import inputs_of
from gatedffn.bench.messages import Answering, Message, serve
from gatedffn.bench.workloads import Workload

WARM_STEPS = 3
"""So many before the check: compilers compile, allocators and caches fill."""
WARM_SHARE = 0.2
"""Of a turn's time, which long steps would otherwise spend on warming."""


def main() -> None:
    """Builds the contestant that the command line names, and times it when told to."""
    serve(lambda message: _make_ready(kind_of(sys.argv[1]), message))


def _make_ready(kind: type[Contestant], message: Message) -> tuple[Answering, Message]:
    workload = Workload(**message["workload"])
    place = place_of(workload.device)
    contestant = kind(workload, inputs_of(workload), message["threads"])
    steps: Steps = contestant
    with contestant.mode():
        for _ in range(WARM_STEPS):
            steps.prepare()
            steps.step()
        if workload.graph:
            steps = Captured(place, contestant)
            steps.step()
    results = contestant.results()
    checked = cut(results, make_slices(workload))
    path = Path(message["folder"]) / f"{os.getpid()}.npz"
    arrays = {name: tensor.numpy() for name, tensor in checked.items()}
    np.savez(path, allow_pickle=False, **arrays)
    finite = all(bool(result.isfinite().all()) for result in results.values())

    def turn(message: Message) -> Message:
        seconds = message["seconds"]
        fewest, most = message["fewest"], message["most"]
        with contestant.mode():
            place.times(steps, WARM_SHARE * seconds, fewest=1, most=place.warm_samples)
            times = place.times(steps, seconds, fewest=fewest, most=most)
        release()
        return {"times": times}

    def release() -> None:
        # A GPU's memory is for whoever's turn it is.
        if workload.device != "cpu":
            contestant.release()
            place.release()

    ways = contestant.ways()
    results.clear()
    release()
    return turn, {"results": str(path), "finite": finite, "ways": ways}


class Captured:
    """A contestant's steps as replays of a graph."""

    def __init__(self, place: Place, contestant: Contestant) -> None:
        self.prepare = contestant.prepare
        self.step = place.captured(contestant.step)


if __name__ == "__main__":
    main()
