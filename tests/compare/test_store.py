import errno
import json
from pathlib import Path

import pytest

from gatedffn.compare.store import Store
from gatedffn.errors import StorageError


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add({"key": "a", "result": 1})
    store.add({"key": "b", "result": 2})
    store.add({"key": "a", "result": 3})
    store.close()
    again = Store(tmp_path)
    assert again.get("a") == {"key": "a", "result": 3}
    assert again.get("c") is None
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b"]
    again.close()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StorageError, match="in use by another comparison"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("my notes\n")
    with pytest.raises(StorageError, match="line 1, is not a run"):
        Store(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == "my notes\n"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(StorageError, match="choose another folder"):
        Store(path)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.add({"key": "a"})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"results\.jsonl cannot be written: No space left"):
        store.add({"key": "b"})
    monkeypatch.undo()
    store.close()
    again = Store(tmp_path)
    assert again.get("a") is not None
    assert again.get("b") is None
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "results.jsonl"]
