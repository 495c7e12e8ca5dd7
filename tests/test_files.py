"""Files that appear whole, last, and say what to do when they cannot be written."""

import errno
import os
import stat
from pathlib import Path

import pytest

from gatedffn.errors import StorageError
from gatedffn.files import folder_written_aside, storing, written_aside


def test_the_name_is_brought_to_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    real = os.fsync

    def fsync(opened: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(opened).st_mode), (tmp_path / "x").exists()))
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_aside(tmp_path / "x") as aside:
        aside.write_text("content")
    assert seen == [(False, False), (True, True)]  # the file, the rename, the folder
    (tmp_path / "x").unlink()
    seen.clear()
    with folder_written_aside(tmp_path / "x") as aside:
        (aside / "y").write_text("content")
    assert seen == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "the right to write there"),
        (errno.EROFS, "read-only: choose another folder"),
        (errno.EIO, "choose another folder"),
    ],
)
def test_an_error_says_what_to_do(number: int, advice: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"cannot be written: .*{advice}"), storing(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x"
    message = f"{path} cannot be written: .*; {tmp_path / 'file'} is a file: name another folder"
    with pytest.raises(StorageError, match=message), written_aside(path):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_what_must_be_new_replaces_nothing(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:  # as on a stick, or a bucket that is mounted
        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "x"
    with written_aside(path, new=True) as aside:
        aside.write_text("first")
    taken = pytest.raises(StorageError, match=f"^{path} exists already: choose another name$")
    with taken, written_aside(path, new=True) as aside:
        aside.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
