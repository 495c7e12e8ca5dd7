"""The folder of runs: each is kept once, whoever dies, sleeps or comes late."""

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gatedffn.compare.checkpoints import SEAL
from gatedffn.compare.store import Claim, Record, Store, read_runs
from gatedffn.errors import StorageError

A, B = "a" * 16, "b" * 16


def record(key: str, loss: float = 1.0) -> Record:
    result = {"held_out": loss, "selection": loss, "diverged": False, "curve": [], "step_time": 0.1}
    run = {"variant": "relu", "seed": 0, "learning_rate": 0.1}
    rest: Record = {n: {} for n in ("cost", "setting", "surroundings", "data", "machine")}
    return {"key": key, "run": run, "result": result, **rest, "seconds": 1.0, "finished": ""}


def claim(store: Store, key: str) -> Claim:
    claimed = store.claim(key)
    assert claimed is not None
    return claimed


def checkpoint(claimed: Claim, step: int) -> None:
    folder = claimed.place / f"checkpoint-{step}"
    folder.mkdir()
    (folder / SEAL).write_text("{}")


@contextmanager
def held_by_another(folder: Path, key: str) -> Iterator[multiprocessing.process.BaseProcess]:
    """A process of its own that holds a claim and does nothing more."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(folder, key, there))
    process.start()
    assert here.recv() == "held"
    try:
        yield process
    finally:
        process.kill()
        process.join()


def hold(folder: Path, key: str, told: Connection) -> None:
    claim(Store(folder), key)
    told.send("held")
    time.sleep(600)


def test_what_was_put_is_there_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.put(claim(store, A), record(A))
        assert store.put(claim(store, B), record(B, loss=2.0))
    assert read_runs(tmp_path) == {A: record(A), B: record(B, loss=2.0)}
    with Store(tmp_path) as store:
        assert store.claim(A) is None
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [f"runs/{A}.json", f"runs/{B}.json"]


def test_what_another_finishes_shows(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as two:
        one.put(claim(one, A), record(A))
        assert list(two.runs()) == [A]


def test_a_claimed_run_is_not_claimed_again_before_it_is_released(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as two:
        claimed = claim(one, A)
        assert two.claim(A) is None
        claim(two, B)
        one.release(claimed)
        claim(two, A)
    assert not any((tmp_path / "claims").iterdir())


def test_checkpoints_go_to_the_next_and_away_with_the_result(tmp_path: Path) -> None:
    with Store(tmp_path) as one:
        checkpoint(claim(one, A), 8)
    with Store(tmp_path) as two:
        second = claim(two, A)
        assert (second.place / "checkpoint-8").is_dir()
        two.put(second, record(A))
    assert not any((tmp_path / "unfinished").iterdir())


def test_of_several_leftovers_the_most_advanced_is_taken(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for step, token in ((8, "f"), (100, "0"), (9, "a")):
            folder = tmp_path / "unfinished" / f"{A}.{token}" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / SEAL).write_text("{}")
            (folder.parent / "claimed").touch()
        claimed = claim(store, A)
        assert [path.name for path in claimed.place.glob("check*")] == ["checkpoint-100"]
        assert list((tmp_path / "unfinished").iterdir()) == [claimed.place]


def test_what_a_replaced_holder_still_writes_is_not_taken_up(tmp_path: Path) -> None:
    with Store(tmp_path, beat=600) as sleeper, Store(tmp_path, beat=600, stale=0.2) as other:
        first = claim(sleeper, A)
        checkpoint(first, 8)
        assert other.claim(A) is None
        time.sleep(0.3)
        second = claim(other, A)
        assert not first.place.exists()
        # The end of a checkpoint whose beginning was moved away with its folder.
        first.place.mkdir()
        checkpoint(first, 16)
        other.release(second)
        third = claim(other, A)
        assert [path.name for path in third.place.glob("check*")] == ["checkpoint-8"]


def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store, held_by_another(tmp_path, A) as process:
        assert store.claim(A) is None
        process.kill()
        process.join()
        claim(store, A)


def test_a_silent_holder_is_replaced_and_dropped_when_it_wakes(tmp_path: Path) -> None:
    with Store(tmp_path, beat=600) as sleeper, Store(tmp_path, stale=0.2) as other:
        first = claim(sleeper, A)
        checkpoint(first, 8)
        assert other.claim(A) is None
        time.sleep(0.3)
        second = claim(other, A)
        assert (second.place / "checkpoint-8").is_dir()
        assert other.put(second, record(A, loss=2.0))
        assert not first.look()
        assert not sleeper.put(first, record(A, loss=3.0))
    assert read_runs(tmp_path) == {A: record(A, loss=2.0)}
    assert not any((tmp_path / "unfinished").iterdir())
    assert not any((tmp_path / "claims").iterdir())


def test_a_holder_that_wakes_first_counts(tmp_path: Path) -> None:
    with Store(tmp_path, beat=600) as sleeper, Store(tmp_path, stale=0.2) as other:
        first = claim(sleeper, A)
        assert other.claim(A) is None
        time.sleep(0.3)
        second = claim(other, A)
        assert sleeper.put(first, record(A, loss=2.0))
        assert second.look(), "the other's claim is not the sleeper's to remove"
        assert not other.put(second, record(A, loss=3.0))
    assert read_runs(tmp_path) == {A: record(A, loss=2.0)}


def test_a_heartbeat_keeps_a_claim(tmp_path: Path) -> None:
    with Store(tmp_path, beat=0.05) as one, Store(tmp_path, stale=0.4) as two:
        claim(one, A)
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert two.claim(A) is None
            time.sleep(0.05)


def test_a_claim_that_is_not_yet_written_or_is_none_is_left_until_it_is_old(tmp_path: Path) -> None:
    with Store(tmp_path, stale=0.2) as store:
        for words in (b"", b"notes", b"[]"):
            (tmp_path / "claims" / A).write_bytes(words)
            assert store.claim(A) is None
            time.sleep(0.3)
            store.release(claim(store, A))


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b"\xff\xfe\n",
        b'{"key": "a"}\n',
        b"[1]\n",
        b"[" * 100_000,
        json.dumps(record(A)).encode()[:-9],
        json.dumps(record(B)).encode(),
        json.dumps(record(A) | {"run": {"variant": "relu"}}).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "runs" / f"{A}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"{path} is not a run of a comparison"):
        Store(tmp_path)
    assert path.read_bytes() == content
    path.unlink()
    Store(tmp_path).close()


@pytest.mark.parametrize("name", ["notes.txt", f"{A}", "x.json", f"{A}.json.json"])
def test_a_file_of_another_name_is_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "runs" / name
    path.parent.mkdir()
    path.write_text(json.dumps(record(A)))
    with pytest.raises(StorageError, match="is not a run of a comparison"):
        read_runs(tmp_path)


def test_hidden_files_of_the_system_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".nfs0001").write_text("")
    assert read_runs(tmp_path) == {}


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(StorageError, match="is a file: name another folder"):
        Store(path)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as store:
        store.put(claim(store, A), record(A))
        claimed = claim(store, B)
        checkpoint(claimed, 8)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"b\.json cannot be written: No space left"):
            store.put(claimed, record(B))
        monkeypatch.undo()
    with Store(tmp_path) as store:
        assert list(store.runs()) == [A]
        assert (claim(store, B).place / "checkpoint-8").is_dir()
