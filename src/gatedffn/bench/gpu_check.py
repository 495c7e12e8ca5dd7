"""Whether the ways that are taken on a GPU by rule are right: each operator, at odd sizes, in turn.

The bars check what they measure; this comes before them, takes seconds, and tells which operator
and dtype is wrong where one is.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gatedffn.bench import devices
from gatedffn.bench.check import cut, make_judge, make_slices
from gatedffn.bench.contestants import OURS, find, for_workload, kind_of
from gatedffn.bench.inputs import inputs_of
from gatedffn.bench.records import Record, add
from gatedffn.bench.workloads import Dtype, Workload
from gatedffn.machine import card
from gatedffn.ops import measure

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32", "float16")
SIZES: dict[str, Any] = {"d_model": 1032, "d_hidden": 2824}


def _workloads() -> Iterator[Workload]:
    for dtype in DTYPES:
        of: dict[str, Any] = {"device": "cuda", "dtype": dtype}
        for training in (False, True):
            gating: dict[str, Any] = {"part": "gating", "training": training, "backward": training}
            yield Workload(tokens=777, d_model=0, d_hidden=2824, **gating, **of)
        for tokens, training in ((1, False), (13, False), (777, False), (777, True)):
            yield Workload(tokens=tokens, training=training, **SIZES, **of)
        for training in (False, True):
            experts: dict[str, Any] = {
                "part": "experts",
                "experts": 8,
                "slots": 2,
                "training": training,
            }
            yield Workload(tokens=300, d_model=264, d_hidden=520, **experts, **of)


WORKLOADS: tuple[Workload, ...] = tuple(_workloads())


def checked(workload: Workload) -> Record:
    """The error of a workload over what is allowed, or the reason why there is none."""
    kind = kind_of(for_workload(find((OURS,), "cuda"), workload)[OURS])
    record: Record = {"kind": "check", "row": {"name": workload.name, **asdict(workload)}}
    try:
        inputs, slices = inputs_of(workload), make_slices(workload)
        judge = make_judge(workload, inputs, slices)
        contestant = kind(workload, inputs, torch.get_num_threads())
        with measure.by_rule(), contestant.mode():
            contestant.prepare()
            contestant.step()
        verdict = judge.verdict(cut(contestant.results(), slices))
    except Exception as error:  # whatever the compiler or the chip has against it
        return {**record, "ratio": None, "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    wrong = f"the error of its {verdict.name} is {verdict.ratio:.3g} times what is allowed"
    return {**record, "ratio": verdict.ratio, "reason": None if verdict.ratio <= 1.0 else wrong}


def check(folder: Path, workloads: tuple[Workload, ...] = WORKLOADS) -> int:
    """Checks each, adds its record to the folder at once, and says whether all were right."""
    machine, wrong = card() | {"gpu": devices.cuda().card()}, 0
    for workload in workloads:
        record = checked(workload)
        add(folder, [{**record, "machine": machine}])
        wrong += record["reason"] is not None
        sys.stdout.write(f"{workload.name}: {record['reason'] or 'right'}\n")
    return int(bool(wrong))
