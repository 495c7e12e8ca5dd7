"""Several processes that run the same cases once, so that many tests need one launch."""

import importlib
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Case = Callable[[], None]
LONGEST = 240.0  # seconds for all cases on a machine with other things to do


def outcomes(modules: Sequence[str], count: int, folder: Path) -> dict[str, str]:
    """What went wrong in each of the `CASES` of some modules; empty where nothing did."""
    context = spawn(_process, (modules, count, folder), count, join=False)  # type: ignore[no-untyped-call]
    end = time.monotonic() + LONGEST
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < end, f"the processes have not ended after {LONGEST} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    told = [json.loads((folder / str(rank)).read_text()) for rank in range(count)]
    return {name: "\n".join(filter(None, (of[name] for of in told))) for name in told[0]}


def _process(rank: int, modules: Sequence[str], count: int, folder: Path) -> None:
    cases: dict[str, Case] = {}
    for module in modules:
        cases |= importlib.import_module(module).CASES
    torch.set_num_threads(1)
    os.environ["GATEDFFN_TUNE"] = "off"  # to measure ways takes longer than the cases
    # They meet in a file, so that no port is needed; who waits for one that failed does not hang.
    where, patience = f"file://{folder / 'meet'}", timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=count, timeout=patience
    )
    told = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
            told[name] = ""
        except BaseException:
            told[name] = f"process {rank}: {traceback.format_exc()}"
    (folder / str(rank)).write_text(json.dumps(told))
    dist.destroy_process_group()
