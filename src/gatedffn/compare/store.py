"""The output folder of a comparison, which any number of processes and machines may share.

    runs/KEY.json             a finished run, put in place by a hard link: the first one counts
    claims/KEY                who does a run now; its time of change is a heartbeat
    unfinished/KEY.TOKEN/     what the holder of a claim has of a run that is not finished

A claim is made by exclusive creation. Whoever finds that its holder died, or has been silent for
long, removes it and claims the run anew. A holder that only slept then finds its claim lost: what
it still writes lies in a folder of its own, and of two results the first one counts. So a mistake
about a holder costs time, and never a number.
"""

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gatedffn.compare.checkpoints import newest
from gatedffn.errors import StorageError
from gatedffn.files import storing, sync_folder

Record = dict[str, Any]

FIELDS = {
    *("key", "run", "result", "cost", "setting"),
    *("surroundings", "data", "machine", "seconds", "finished"),
}
RUN = {"variant", "seed", "learning_rate"}
RESULT = {"held_out", "selection", "diverged", "curve", "step_time"}
KEY = re.compile(r"[0-9a-f]{16}")
MARK = "claimed"
BEAT = 10.0
STALE = 60.0
"""Seconds of silence after which a claim may be taken over."""


@dataclass(slots=True)
class Claim:
    """The right to do a run: `place` is for its checkpoints and nobody else's."""

    key: str
    path: Path
    words: bytes
    opened: int
    place: Path
    lost: bool = False

    def look(self) -> bool:
        """Whether it still holds; once lost, it stays lost."""
        if not self.lost:
            try:
                self.lost = self.path.read_bytes() != self.words
            except FileNotFoundError:
                self.lost = True
        return not self.lost


def read_runs(folder: Path, known: dict[str, Record] | None = None) -> dict[str, Record]:
    """The finished runs of a folder by key, after those that are known already.

    Raises:
        StorageError: a file among them is none.
    """
    found = dict(known or {})
    with contextlib.suppress(FileNotFoundError):
        for path in sorted((folder / "runs").iterdir()):
            if not path.name.startswith(".") and path.name.removesuffix(".json") not in found:
                record = _read_run(path)
                found[record["key"]] = record
    return found


def outdated(folder: Path) -> list[str]:
    """What a folder has of versions that kept runs in another form, said in words."""
    path = folder / "results.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return []
    return [f"{path} is of an older version of gatedffn, and the runs in it are not used"]


def _read_run(path: Path) -> Record:
    try:
        record = json.loads(path.read_bytes().decode())
        if not (record.keys() >= FIELDS and record["result"].keys() >= RESULT):
            raise KeyError("a field is missing")
        if record["run"].keys() != RUN:
            raise KeyError("it does not say which run it is")
        if not KEY.fullmatch(path.stem) or path.name != f"{record['key']}.json":
            raise ValueError("the name is of another run")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{path} is not a run of a comparison: move the file away, or choose another folder "
            "with --out"
        ) from error
    assert isinstance(record, dict)
    return record


class Store:
    """A folder of runs: those finished, by key, and the claims of this process on others."""

    def __init__(self, folder: Path, beat: float = BEAT, stale: float = STALE) -> None:
        self.folder, self.beat, self.stale = folder.resolve(), beat, stale
        self._runs: dict[str, Record] = {}
        self._claims: dict[str, Claim] = {}
        self._seen: dict[str, tuple[object, float]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        with storing(folder):
            for name in ("runs", "claims", "unfinished"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.runs()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def runs(self) -> dict[str, Record]:
        """The finished runs by key, whoever did them."""
        self._runs = read_runs(self.folder, self._runs)
        return self._runs

    def claim(self, key: str) -> Claim | None:
        """The right to do a run; None where another has it, or the run is finished."""
        assert KEY.fullmatch(key), key
        path = self.folder / "claims" / key
        if not self._is_free(path):
            return None
        token = secrets.token_hex(6)
        words = json.dumps(
            {"machine": _machine(), "host": platform.node(), "pid": os.getpid(), "token": token}
        ).encode()
        place = self.folder / "unfinished" / f"{key}.{token}"
        with storing(path):
            try:
                opened = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
            except FileExistsError:
                return None
            # A claim is empty until it is locked: only then may others judge by the lock.
            _locked(opened)
            os.write(opened, words)
            claim = Claim(key, path, words, opened, place)
            with self._lock:
                self._claims[key] = claim
            if (self.folder / "runs" / f"{key}.json").exists():
                self.release(claim)
                return None
            self._take_up(claim)
        return claim

    def put(self, claim: Claim, record: Record) -> bool:
        """Keeps a finished run and ends its claim; False where another was first.

        When this returns the run is on the disk, and its checkpoints are not.
        """
        assert record["key"] == claim.key
        path = self.folder / "runs" / f"{claim.key}.json"
        aside = claim.place / path.name
        with storing(path):
            claim.place.mkdir(parents=True, exist_ok=True)
            with aside.open("w", encoding="utf-8") as file:
                json.dump(record, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            first = _linked(aside, path)
            sync_folder(path.parent)
        # Only now: a kill before it must not cost the checkpoints as well.
        shutil.rmtree(claim.place, ignore_errors=True)
        self.release(claim)
        return first

    def release(self, claim: Claim) -> None:
        """Gives a claim back; checkpoints stay, for whoever claims the run next."""
        with self._lock:
            self._claims.pop(claim.key, None)
        with contextlib.suppress(OSError):
            if claim.look():
                claim.path.unlink()
        if not newest(claim.place):
            shutil.rmtree(claim.place, ignore_errors=True)
        os.close(claim.opened)

    def close(self) -> None:
        """Gives all claims back, and removes what belongs to no run."""
        self._closed.set()
        for claim in list(self._claims.values()):
            self.release(claim)
        with contextlib.suppress(OSError):
            finished = self.runs()
            for left in (self.folder / "unfinished").iterdir():
                if left.name.partition(".")[0] in finished:
                    shutil.rmtree(left, ignore_errors=True)
            for left in (self.folder / "claims").iterdir():
                if left.name in finished:
                    left.unlink(missing_ok=True)

    def _is_free(self, path: Path) -> bool:
        """Whether a run can be claimed; the claim of a holder that died is removed."""
        try:
            file = path.open("rb+")
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        with file:
            words, found = file.read(), os.fstat(file.fileno())
            # Clocks of machines differ: how long it has not changed is taken by this one's own.
            mark = (words, found.st_mtime_ns)
            seen, since = self._seen.get(path.name, (None, 0.0))
            if seen != mark:
                seen, since = self._seen[path.name] = (mark, time.monotonic())
            silent = time.monotonic() - since > self.stale
            if not silent and not (_machine_in(words) == _machine() and _locked(file.fileno())):
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), found):
                    path.unlink()
            return True

    def _take_up(self, claim: Claim) -> None:
        """Moves to a claim's place what an earlier holder left of the run: the most advanced."""
        left = sorted((self.folder / "unfinished").glob(f"{claim.key}.*"), key=newest)
        # A holder whose place was moved away may write on for a moment: what it makes has no mark.
        whole = [place for place in left if (place / MARK).exists()]
        if whole:
            whole[-1].rename(claim.place)
        for place in left:
            shutil.rmtree(place, ignore_errors=True)
        claim.place.mkdir(exist_ok=True)
        (claim.place / MARK).touch()

    def _keep_alive(self) -> None:
        while not self._closed.wait(self.beat):
            with self._lock:
                claims = list(self._claims.values())
            for claim in claims:
                with contextlib.suppress(OSError):  # a file system that is away for a while
                    if claim.look():
                        os.utime(claim.path)


def _linked(aside: Path, path: Path) -> bool:
    """Gives a file its name unless another has it."""
    try:
        os.link(aside, path)
    except FileExistsError:
        # Over a network the answer to a link that was made can be lost, and it is made twice.
        return aside.samefile(path)
    return True


def _locked(opened: int) -> bool:
    """Locks a file until its process ends; False where another process of this machine has it."""
    try:
        import fcntl
    except ImportError:
        return False  # Windows: there a holder's silence alone says that it died
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _machine() -> str:
    """A name for this machine since its start, by which alone two processes share locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _machine_in(words: bytes) -> str | None:
    try:
        machine = json.loads(words)["machine"]
    except (ValueError, LookupError, TypeError):
        return None  # not yet written, or no claim at all: its age decides
    return str(machine)
