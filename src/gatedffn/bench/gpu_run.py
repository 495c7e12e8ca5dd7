"""Everything that is to be known about this library on a GPU, by one command that can be cut off.

    python -m gatedffn.bench.gpu_run --out DIR --minutes 9

The steps run in the order of their value, each in a process of its own that is ended when its
share of the time is over. After each, DIR/gpu.json and DIR/summary.md are written anew, so that
whatever ends the command loses the step in progress at most. The same command goes on where the
last one ended: first with the steps that no call has come to, then with those that failed. What
was measured of other sources than those that are here is measured again.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gatedffn.bench.devices import check_device
from gatedffn.bench.gpu_steps import STEPS, UNFINISHED, Step
from gatedffn.bench.gpu_summary import summary
from gatedffn.bench.process import ended
from gatedffn.bench.records import FILE, key, read
from gatedffn.errors import GatedFFNError, SettingError
from gatedffn.files import alone, json_ready, written_aside
from gatedffn.machine import sources

RECORD, SUMMARY, LOG = "gpu.json", "summary.md", "log.txt"
SHORTEST = 20.0
"""Seconds below which no step is begun: they would be over before its processes have started."""
ENDING = 10.0
"""Seconds that a process has to end when it is told to."""

State = dict[str, Any]


class Run:
    """A folder with what is known of each step."""

    def __init__(self, folder: Path, steps: Sequence[Step] = STEPS) -> None:
        self.folder, self.steps, self.source = folder, steps, sources()
        path = folder / RECORD
        self.state: State = {"steps": {}, "calls": []}
        if path.exists():
            self.state = _read(path)
        for step in steps:
            of = self.of(step)
            if of["source"] != self.source:
                self.state["steps"][step.name] = _unknown(self.source, of["tries"])
            elif of["state"] == "running":
                self._take(step, "cut off", ["the command was ended while it ran"])

    def of(self, step: Step) -> State:
        """What is known of a step."""
        found: State = self.state["steps"].setdefault(step.name, _unknown(self.source))
        return found

    def waiting(self) -> list[Step]:
        """The steps that are not done, in the order in which they are tried."""
        undone = [step for step in self.steps if self.of(step)["state"] != "done"]
        # The first time that it was cut off says nothing against a step.
        return sorted(
            undone, key=lambda step: self.of(step)["failures"] + max(self.of(step)["cuts"] - 1, 0)
        )

    def call(self, minutes: float) -> bool:
        """Does what is not done in so many minutes; says whether all is done."""
        end = time.monotonic() + 60 * minutes
        self.state["calls"].append({"began": _now(), "minutes": minutes})
        self.write()
        for step in self.waiting():
            seconds = min(step.seconds, end - time.monotonic())
            if seconds < min(SHORTEST, step.seconds):
                continue
            self._say(f"{step.name}, at most {seconds:.0f} seconds")
            state, why = self._try(step, seconds)
            self._take(step, state, why)
            self._say(f"{step.name}: {'; '.join((state, *self.of(step)['why']))}")
        self.write()
        return not self.waiting()

    def _say(self, words: str) -> None:
        sys.stdout.write(words + "\n")
        sys.stdout.flush()

    def _place(self, step: Step) -> Path:
        name = step.name.replace(" ", "-")
        return self.folder / "steps" / f"{name}-{self.of(step)['tries']}"

    def _try(self, step: Step, seconds: float) -> tuple[str, list[str]]:
        of = self.of(step)
        of |= {"state": "running", "tries": of["tries"] + 1, "began": _now()}
        place, begun = self._place(step), time.monotonic()
        place.mkdir(parents=True, exist_ok=True)
        self.write()
        process = _CONTEXT.Process(target=_do, args=(step, place, seconds))
        process.start()
        try:
            process.join(seconds)
            over = process.is_alive()
        finally:
            _end(process)
            of["seconds"] = time.monotonic() - begun
        if over:
            return "failed", [f"it took longer than its share of {seconds:.0f} seconds"]
        if process.exitcode == 0:
            return "done", []
        if process.exitcode == UNFINISHED:
            return "unfinished", ["its time was up; the next call goes on with it"]
        return "failed", [f"its process {ended(process.exitcode or 0)}{_last_words(place / LOG)}"]

    def _take(self, step: Step, state: str, why: list[str]) -> None:
        """Adds what a try has left in its folder; a figure is not displaced by a reason."""
        of = self.of(step)
        records = {key(record): record for record in of["records"]}
        new = read(self._place(step) / FILE)
        for record in new:
            if record.get("reason") is None or key(record) not in records:
                records[key(record)] = record
        faults = [_fault(record) for record in new if _is_fault(record)]
        if faults and state == "done":
            state = "failed"
        of |= {"state": state, "why": [*why, *faults], "records": list(records.values())}
        of["failures"] += state == "failed"
        of["cuts"] += state == "cut off"
        self.write()

    def write(self) -> None:
        """Brings what is known to the disk."""
        state = json_ready({**self.state, "source": self.source})
        found = {step.name: self.of(step) for step in self.steps}
        text, bars = summary(found)
        content = json.dumps({**state, "bars": json_ready(bars)}, indent=1, ensure_ascii=False)
        for name, written in ((RECORD, content), (SUMMARY, text)):
            with written_aside(self.folder / name) as aside:
                aside.write_text(written, encoding="utf-8")


def _read(path: Path) -> State:
    with contextlib.suppress(ValueError):
        found: State = json.loads(path.read_text(encoding="utf-8"))
        match found:
            case {"steps": dict(), "calls": list()}:
                return found
    raise SettingError(f"{path} is no record of a run: move it away, or name another --out")


def _unknown(source: str, tries: int = 0) -> State:
    counts = {"tries": tries, "failures": 0, "cuts": 0}
    return {"state": "left", "why": [], "records": [], "source": source, **counts}


def _is_fault(record: State) -> bool:
    return record.get("reason") is not None and not record.get("declined", False)


def _fault(record: State) -> str:
    who = record.get("contestant") or record.get("mode") or record["row"]["name"]
    return f"{who}: {record['reason']}"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f": {said[-1][:300]}" if said else ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# The process of a step. Its server has imported what steps need, and has not touched the GPU.

_CONTEXT = multiprocessing.get_context("forkserver")


def _do(step: Step, folder: Path, seconds: float) -> None:
    os.setsid()  # what it starts is ended with it
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.exit(step.call(folder, seconds))


def _end_with_the_command() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _end(process: BaseProcess) -> None:
    """Ends a process and all that it started, which may outlive it."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left, or it has not come to the beginning
        process.kill()
    process.join(ENDING)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gatedffn.bench.gpu_run")
    parser.add_argument("--out", type=Path, required=True, help="folder, the same in each call")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, at most")
    options = parser.parse_args(arguments)
    try:
        if options.minutes <= 0:
            raise SettingError(f"--minutes is {options.minutes:g}: it must be above 0")
        check_device("cuda")
        return _called(options.out, options.minutes)
    except GatedFFNError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        return 130


def _called(folder: Path, minutes: float) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".lock", 1.0):
        run = Run(folder)
        all_done = run.call(minutes)
    sys.stdout.write((folder / SUMMARY).read_text(encoding="utf-8"))
    if not all_done:
        left = ", ".join(step.name for step in run.waiting())
        sys.stdout.write(f"\nnot done: {left}; the same command goes on\n")
    return int(not all_done)


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["gatedffn.bench.gpu_steps", "gatedffn.bench.report"])
    raise SystemExit(main())
