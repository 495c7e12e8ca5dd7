import errno
import json
from pathlib import Path

import pytest

from gatedffn.compare.store import Record, Store, checkpoints_of
from gatedffn.errors import StorageError


def record(key: str, loss: float = 1.0) -> Record:
    result = {"held_out": loss, "selection": loss, "diverged": False, "curve": [], "step_time": 0.1}
    return {"key": key, "run": {}, "result": result, "cost": {}, "machine": {}}


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(record("a"))
    store.add(record("b"))
    store.add(record("a", loss=3.0))
    store.close()
    again = Store(tmp_path)
    assert again.get("a") == record("a", loss=3.0)
    assert again.get("c") is None
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b"]
    again.close()


def test_checkpoints_go_when_their_run_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("a", "b"):
        (checkpoints_of(tmp_path, key) / "checkpoint-8").mkdir(parents=True)
    store.add(record("a"))
    assert not checkpoints_of(tmp_path, "a").exists()
    assert checkpoints_of(tmp_path, "b").exists()
    store.add(record("b"))
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "results.jsonl"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StorageError, match="in use by another comparison"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b"\xff\xfe\n",
        b'{"key": "a"}\n',
        b"[1]\n",
        b"[" * 100_000,
        b'{"key": "a", "re',
    ],
)
def test_a_foreign_file_is_not_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="line 1, is not a run"):
        Store(tmp_path)
    assert path.read_bytes() == content
    path.unlink()
    Store(tmp_path).close()


def test_separators_inside_a_record_do_not_split_it(tmp_path: Path) -> None:
    odd = record("a") | {"data": "text\u2028with\x85separators"}
    store = Store(tmp_path)
    store.add(odd)
    store.close()
    again = Store(tmp_path)
    assert again.get("a") == odd
    again.close()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(StorageError, match="is a file: name another folder"):
        Store(path)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.add(record("a"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"results\.jsonl cannot be written: No space left"):
        store.add(record("b"))
    monkeypatch.undo()
    store.close()
    again = Store(tmp_path)
    assert again.get("a") is not None
    assert again.get("b") is None
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "results.jsonl"]
