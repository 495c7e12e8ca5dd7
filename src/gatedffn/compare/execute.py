"""One run of a comparison from its setting to its record."""

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gatedffn
from gatedffn.compare.checkpoints import at_step, newest
from gatedffn.compare.data import Tokens
from gatedffn.compare.machine import card, on_gpu, step_memory
from gatedffn.compare.models import Cost
from gatedffn.compare.settings import Run, Setting, run_key
from gatedffn.compare.store import Record
from gatedffn.compare.team import Team
from gatedffn.files import json_ready
from gatedffn.ops.operator import by_rule
from gatedffn.variants import Variant

if TYPE_CHECKING:
    from gatedffn.compare.training import Progress


@dataclass(frozen=True, slots=True)
class Prepared:
    """A setting with its data, and what each arm of it costs.

    `data` is what is said of the data; every record has it, so that a report needs records alone.
    """

    setting: Setting
    data: dict[str, Any]
    tokens: Tokens
    costs: dict[str, Cost]
    mismatch: dict[str, float]
    rows: tuple[Variant, ...] = ()
    """Of the arms: what a process needs of those that users made."""


def surroundings(prepared: Prepared, processes: int, gpu: bool) -> dict[str, object]:
    """What the numbers of a run depend on beside its setting."""
    return {
        "data": prepared.data["fingerprint"],
        "version": gatedffn.__version__,
        "processes": processes,
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "ways": "by rule",
    }


@by_rule()  # what is measured in one cache folder would differ from another's
def execute(run: Run, prepared: Prepared, place: Path, progress: "Progress", team: Team) -> Record:
    """Does one run, going on from a checkpoint in `place` if there is one."""
    from gatedffn.compare.training import train

    setting = prepared.setting
    # Whoever gave the run out has dropped what is torn.
    step = team.share(newest(place))
    checkpoint = str(at_step(place, step)) if step else None
    started = time.perf_counter()
    # Kept with the run: on a terminal they would tear the table, and nobody reads them there.
    with warnings.catch_warnings(record=True) as caught:
        outcome = train(setting, run, prepared.tokens, place, checkpoint, progress, team.processes)
    seconds = time.perf_counter() - started
    around = surroundings(prepared, team.processes, on_gpu())
    return {
        "key": run_key(setting, run, around),
        "run": asdict(run),
        "result": json_ready(asdict(outcome)),
        "cost": _cost(prepared, run.variant),
        "setting": asdict(setting),
        "surroundings": around,
        "data": prepared.data,
        "machine": card(),
        "warnings": list(dict.fromkeys(str(warning.message) for warning in caught)),
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


_step_memory: Callable[[Setting, str, int], int] = functools.cache(step_memory)


def _cost(prepared: Prepared, arm: str) -> dict[str, Any]:
    memory = _step_memory(prepared.setting, arm, prepared.tokens.vocabulary)
    return asdict(prepared.costs[arm]) | {"memory": memory}
