"""The output folder: a JSON line for each contestant of a workload, added as each is done."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gatedffn.bench.figures import figures, limit_record
from gatedffn.bench.memory import Memory
from gatedffn.bench.outcomes import Measured
from gatedffn.bench.protocol import Protocol
from gatedffn.bench.workloads import Workload
from gatedffn.files import json_ready, storing, written_aside

Record = dict[str, Any]

FILE = "bench.jsonl"


def time_records(measured: Measured, protocol: Protocol, surroundings: Record) -> list[Record]:
    """A record for each contestant; without a figure `reason` says why and `figures` is None."""
    limits = limit_record(measured)
    records = []
    for outcome in measured.outcomes:
        found = figures(measured, outcome)
        records.append(
            {
                "kind": "time",
                "row": _named(measured.workload),
                "contestant": outcome.entry.contestant,
                "label": outcome.entry.label,
                "version": outcome.entry.version,
                "reason": outcome.reason,
                "declined": outcome.entry.declined,
                "check": None if outcome.verdict is None else asdict(outcome.verdict),
                "tolerance": outcome.entry.tolerance,
                "figures": None if found is None else asdict(found),
                "rounds": [1e3 * seconds for seconds in outcome.rounds],
                "repetitions": [timing.samples for timing in outcome.timings],
                "limit": limits,
                "protocol": asdict(protocol),
                **({"ways": dict(outcome.ways)} if outcome.ways else {}),
                **surroundings,
            }
        )
    return records


def memory_record(workload: Workload, memory: Memory | str, surroundings: Record) -> Record:
    """The record of one mode's training step; without figures `reason` says why."""
    found = (
        {"mode": memory.partition(":")[0], "reason": memory}
        if isinstance(memory, str)
        else {**asdict(memory), "saved_per_token": memory.saved_per_token}
    )
    return {"kind": "memory", "row": _named(workload), **found, **surroundings}


def fault_record(workload: Workload, error: Exception, surroundings: Record) -> Record:
    """Of a workload that could not be measured."""
    return {"kind": "fault", "row": _named(workload), "reason": str(error), **surroundings}


def _named(workload: Workload) -> Record:
    return {"name": workload.name, **asdict(workload)}


def key(record: Record) -> tuple[str, ...]:
    """What a record is of: of two with one key the later one holds."""
    who = record.get("contestant") or record.get("mode") or ""
    return record["kind"], record["row"]["name"], who


def read(path: Path) -> list[Record]:
    """The records of a file; none where it is not there yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def add(folder: Path, records: list[Record]) -> Path:
    """Adds records to the folder's file; when this returns they are on the disk.

    What earlier runs have put there stays.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    path = folder / FILE
    with storing(path):
        before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    lines = "".join(json.dumps(json_ready(r), ensure_ascii=False) + "\n" for r in records)
    with written_aside(path) as aside:
        aside.write_bytes(before + lines.encode())
    return path
