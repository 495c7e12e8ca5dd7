"""The output folder of a comparison: its finished runs, one line each."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from gatedffn.errors import StorageError
from gatedffn.files import storing, written_aside

Record = dict[str, Any]

FIELDS = {"key", "run", "result", "cost", "machine"}
RESULT = {"held_out", "selection", "diverged", "curve", "step_time"}


def checkpoints_of(folder: Path, key: str) -> Path:
    """Where the checkpoints of a run are while it is not finished."""
    return folder / "unfinished" / key


class Store:
    """The finished runs in `results.jsonl`, by key. One process at a time may hold a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        self._hold()
        self.path = folder / "results.jsonl"
        try:
            self._records = self._read()
        except StorageError:
            self.close()
            raise

    def _hold(self) -> None:
        try:
            import fcntl
        except ImportError:
            # Windows has no such lock; there nothing guards against two at once.
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise StorageError(
                f"{self.folder} is in use by another comparison: wait for it, or choose another "
                "folder with --out"
            ) from error

    def _read(self) -> dict[str, Record]:
        if not self.path.exists():
            return {}
        with storing(self.path):
            content = self.path.read_bytes()
        records = {}
        for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
            try:
                record = json.loads(line.decode())
                if not (record.keys() >= FIELDS and record["result"].keys() >= RESULT):
                    raise KeyError("a field is missing")
                records[record["key"]] = record
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise StorageError(
                    f"{self.path}, line {number}, is not a run of a comparison: move the file "
                    "away, or choose another folder with --out"
                ) from error
        return records

    def get(self, key: str) -> Record | None:
        """The finished run with that key, if there is one."""
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Keeps a finished run; when this returns it is on the disk and its checkpoints are not."""
        self._records[record["key"]] = record
        lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in self._records.values())
        with written_aside(self.path) as aside:
            aside.write_text("".join(lines), encoding="utf-8")
        # Only now: a kill before it must not cost the checkpoints as well.
        checkpoints = checkpoints_of(self.folder, record["key"])
        shutil.rmtree(checkpoints, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds other runs, or was never made
            checkpoints.parent.rmdir()

    def close(self) -> None:
        """Lets go of the folder."""
        self._lock.close()
