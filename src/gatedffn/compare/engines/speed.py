"""How fast runs are done here, and how many at a time are fastest."""

import json
import platform
import time
from pathlib import Path

import psutil
import torch

from gatedffn.compare.data import measuring_windows
from gatedffn.compare.execute import Prepared
from gatedffn.compare.machine import on_gpu, step_memory
from gatedffn.compare.models import blank, build, initialise
from gatedffn.files import written_aside
from gatedffn.ops.operator import by_rule

MEASURED = 1.5
"""Seconds of steps, side by side, that a measurement takes."""
WORTH_IT = 60.0
"""Seconds of work in one process, below which starting others takes longer than they save."""
OF_A_PROCESS = 700e6
"""Bytes of a worker beside its tensors: Python and its libraries."""


@by_rule()
def sequences_per_second(prepared: Prepared, least: float = MEASURED) -> float:
    """How many sequences of the costliest arm one process trains in a second."""
    setting = prepared.setting
    arm = costliest(prepared)
    device = torch.device("cuda" if on_gpu() else "cpu")
    model = build(setting, arm, prepared.tokens.vocabulary)
    initialise(model, setting.init, 0)
    model.to(device)
    # A small batch stands for a large one; below four sequences the overhead would count.
    batch = min(setting.batch, 4)
    inputs = blank(setting, batch, device)

    def step() -> None:
        model(**inputs)["loss"].backward()
        if on_gpu():
            torch.cuda.synchronize()

    step()  # it makes caches and threads
    count, started = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - started < least:
        step()
        count += 1
    return count * batch / (time.perf_counter() - started)


def costliest(prepared: Prepared) -> str:
    """The arm with the most arithmetic."""
    costs = prepared.costs
    return max(costs, key=lambda arm: costs[arm].flops)


def seconds_of_a_run(prepared: Prepared, speed: float) -> float:
    """How long a run takes at so many sequences a second."""
    setting = prepared.setting
    tokens = prepared.tokens
    selection = measuring_windows(tokens.selection, setting.context, setting.selection_tokens)
    held_out = measuring_windows(tokens.held_out, setting.context, setting.held_out_tokens)
    measured = setting.evaluations * len(selection) + len(held_out)
    # Measuring a loss is the forward pass alone, a third of the arithmetic.
    return (setting.steps * setting.batch + measured / 3) / speed


def faster(together: float, alone: float) -> bool:
    """Whether several workers are to be preferred to one, by what they train in a second.

    At equal speed they are: where others use the machine, one that waits for every core at every
    operation suffers most.
    """
    return together > 0.95 * alone


class Workers:
    """How many workers are fastest on this machine: measured once, and kept in the folder."""

    def __init__(self, prepared: Prepared, folder: Path, runs: int) -> None:
        self.prepared, self.path = prepared, folder / "workers.json"
        self.wanted = min(runs, torch.get_num_threads())
        flops = prepared.costs[costliest(prepared)].flops
        self.key = f"{platform.node()}, {self.wanted} threads, {flops} operations a token"

    def kept(self) -> int | None:
        """What an earlier command measured."""
        found = self._read().get(self.key)
        return found if isinstance(found, int) and found > 0 else None

    def most(self) -> int:
        """As many as there are threads and runs, if the memory is enough for so many."""
        prepared = self.prepared
        vocabulary = prepared.tokens.vocabulary
        each = step_memory(prepared.setting, costliest(prepared), vocabulary) + OF_A_PROCESS
        return max(1, min(self.wanted, int(psutil.virtual_memory().available / each)))

    def choose(self, size: int, together: float, alone: float) -> int:
        """So many or one, by what they train together in a second and what one alone does."""
        chosen = size if faster(together, alone) else 1
        content = self._read() | {self.key: chosen}
        with written_aside(self.path) as aside:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return chosen

    def _read(self) -> dict[str, object]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}
