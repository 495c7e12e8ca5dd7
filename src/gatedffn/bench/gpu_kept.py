"""What searches for configurations have found, in a file that can be cut off at any moment."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gatedffn.bench.records import Record
from gatedffn.files import storing
from gatedffn.ops import gpu

FILE = "gpu_search.jsonl"
SAME = ("gpu", "torch", "triton", "sources")  # what a time holds for


class Kept:
    """The record of all searches in a folder: what is known here already, and what is added.

    A search that came to its end at once in several threads and did not return from it goes on
    candidate by candidate, so that it is known which of them it is.
    """

    def __init__(self, folder: Path, surroundings: Record) -> None:
        self.path, self.surroundings = folder / FILE, surroundings
        self.found: dict[str, Record] = {}
        self.alone = False
        for record in self._read():
            if all(record.get(name) == surroundings[name] for name in SAME):
                if "together" in record:
                    self.alone = record["together"] != "ended"
                else:
                    self.found[key_of(record)] = record

    def _read(self) -> Iterator[Record]:
        """What is in the file, whose last line may have been cut off."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)
        if not text.endswith("\n"):
            with storing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, record: Record) -> None:
        """Adds it; when this returns it is on the disk."""
        if "together" not in record:
            self.found[key_of(record)] = record
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, **self.surroundings}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def together(self, calls: Sequence[Callable[[], object]]) -> None:
        """Calls all of them at once: compiling is most of it, and what fails will do so again."""
        if self.alone:
            return
        self.add({"together": "begun"})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(call) for call in calls]:
                done.exception()
        gpu.finish(torch.device("cuda", torch.cuda.current_device()))
        self.add({"together": "ended"})

    def of(self, kernel: str, dtype: torch.dtype, sizes: Record) -> list[Record]:
        """What is known of the candidates in a shape."""
        name = str(dtype).removeprefix("torch.")
        return [
            record
            for record in self.found.values()
            if (record["kernel"], record["dtype"], record["shape"]) == (kernel, name, sizes)
        ]


def key_of(record: Record) -> str:
    """What a record is of: of two with one key the later one holds."""
    return json.dumps([record[name] for name in ("kernel", "dtype", "shape", "config")])
