"""What is read of what was given, and what is said of the rest."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sysconfig
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gatedffn.compare import sources
from gatedffn.compare.data import load_text
from gatedffn.compare.kinds import COMPRESSIONS, KINDS, rows_for_docs
from gatedffn.compare.sources import Reading, read_documents
from gatedffn.errors import DataError

TEXTS = [f'document "{i}",\tcafé\r\n and more' for i in range(30)]
ROWS = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS))
TABLE = pa.table({"id": list(range(30)), "body": TEXTS})


def read(*given: Path | str, field: str | None = None, encoding: str | None = None) -> Reading:
    return read_documents([str(one) for one in given], field, encoding)


def left_out(reading: Reading) -> dict[str, set[str]]:
    """The names of what was left out, by the reason."""
    reasons: dict[str, set[str]] = {}
    for why, name in reading.left_out:
        reasons.setdefault(why, set()).add(name)
    return reasons


def separated(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "body"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def arrow(make: Callable[..., Any]) -> bytes:
    sink = pa.BufferOutputStream()
    with make(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return bytes(sink.getvalue())


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(TABLE, sink)
    return bytes(sink.getvalue())


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


FILES: dict[str, bytes] = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "A.JSONL": LINES.encode(),
    "a.jsonlines": LINES.encode(),
    "a.jl": LINES.encode(),
    "a.ldjson": LINES.encode(),
    "cr.jsonl": LINES.replace("\n", "\r").encode(),
    "cr.json": LINES.replace("\n", "\r").encode(),
    "crlf.json": LINES.replace("\n", "\r\n").encode(),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "wide.jsonl": LINES.encode("utf-16"),
    "lines.json": LINES.encode(),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "wider.json": json.dumps(ROWS).encode("utf-32"),
    "a.csv": separated(","),
    "mark.csv": b"\xef\xbb\xbf" + separated(","),
    "a.tsv": separated("\t"),
    "a.parquet": parquet(),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.JSON.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.csv.xz": lzma.compress(separated(",")),
    "a.jsonl.zst": zstandard(LINES.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    reading = read(tmp_path / name, field="body")
    assert reading.documents == [text.encode() for text in TEXTS]
    assert not reading.left_out
    # In a folder as by name.
    assert read(tmp_path, field="body").documents == reading.documents


def test_every_ending_and_compression_is_tried() -> None:
    names = [name.lower() for name in FILES]
    for kind in KINDS:
        for ending in kind.endings:
            assert any(name.endswith(ending) for name in names), ending
    for ending in COMPRESSIONS:
        assert any(name.endswith(ending) for name in names), ending


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_one_document_in_utf_8(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("café\r\nline\n".encode(encoding)))
    assert read(path).documents == ["café\r\nline\n".encode()]


def test_a_folder_in_three_encodings(tmp_path: Path) -> None:
    for i in range(20):
        for encoding in ("utf-8", "latin-1", "utf-16"):
            path = tmp_path / f"{encoding}-{i}.txt"
            path.write_bytes(f"{encoding} café {i}".encode(encoding))
    text = load_text([str(tmp_path)])
    assert "40 documents" in text.description
    assert "20 files in utf-16" in text.description
    assert re.search(r"20 not text in utf-8 .*: latin-1-0.txt, .* and 17 more", text.description)
    text = load_text([str(tmp_path)], encoding="latin-1")
    assert "60 documents" in text.description
    assert "20 files in latin-1" in text.description
    assert text.description.endswith("left out: nothing")
    whole = text.train + text.selection + text.held_out
    assert whole.count("café".encode()) == 60


def test_an_encoding_is_one_and_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"not text in utf-8 \(--encoding names another\)"):
        read(path)
    with pytest.raises(DataError, match="not text in utf-8 or ascii"):
        read(path, encoding="ascii")
    for name in ("latin-9000", "rot13", "a\0b"):
        with pytest.raises(DataError, match="Python does not know"):
            read("missing", encoding=name)
    path.write_bytes("café".encode())
    assert read(path, encoding="UTF8").documents
    with pytest.raises(DataError, match=r"nothing in .* is read with it"):
        read(path, encoding="latin-1")


def test_one_rule_for_rows_without_text(tmp_path: Path) -> None:
    given: list[Any] = ["text", None, "", " \n", "other"]
    table = pa.table({"text": given})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": v}) for v in given))
    for name in ("a.parquet", "a.jsonl"):
        path = tmp_path / name
        reading = read(path)
        assert reading.documents == [b"text", b"other"]
        assert dict(reading.left_out) == {
            (sources.NULL, str(path)): 1,
            (sources.EMPTY, str(path)): 2,
        }
    (tmp_path / "b.jsonl").write_text('{"text": 5}\n{"text": ["a"]}\n{"other": 1}\n7\n{"text":"a"}')
    reading = read(tmp_path / "b.jsonl")
    assert sorted(reading.left_out.values()) == [2, 2]
    assert left_out(reading).keys() == {sources.NULL, sources.NO_STRING}


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"a", b"b"], [None, None]])
def test_a_field_that_is_never_text_is_refused(tmp_path: Path, values: list[Any]) -> None:
    pyarrow.parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"there is no text in it \(2 (with no string|null)"):
        read(tmp_path / "a.parquet")


def test_a_field_in_a_field(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "a"}}, {"meta": None}, {"meta.text": "b"}, {"meta": {"text": "c"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl", field="meta.text").documents == [b"a", b"b", b"c"]
    table = pa.table({"meta": [{"id": 1, "text": "a"}, None], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="meta.text").documents == [b"a"]
    pyarrow.parquet.write_table(table.flatten(), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="meta.text").documents == [b"a"]


def test_a_field_that_nothing_uses_is_refused(prose: Path) -> None:
    for given in ([], [prose]):
        with pytest.raises(DataError, match="no fields, only text: leave out --field"):
            read(*given, field="text")
    (prose / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match="no field ''"):
        read(prose / "a.jsonl", field="")
    assert len(read(prose, field="text").documents) == 31
    with pytest.raises(DataError, match=r"which nothing has: 1 no field 'body': a.jsonl"):
        read(prose, field="body")


def test_a_folder_with_all_sorts(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inner = root / "inner"
    inner.mkdir(parents=True)
    (inner / "a.py").write_text("print()\n")
    (inner / "README").write_text("read me")
    (root / "same.py").symlink_to(inner / "a.py")
    (root / "loop").symlink_to(root)
    (root / "outside").symlink_to(tmp_path)
    (root / "broken").symlink_to(tmp_path / "nothing")
    (root / ".hidden").write_text("hidden")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden too")
    (root / "picture.png").write_bytes(b"\x89PNG\0")
    (root / "empty.txt").write_text("")
    (root / "empty.jsonl").write_text("\n")
    (root / "a.jsonl").write_text('{"text": "row"}')
    (root / "cut.jsonl").write_text('{"text": "never"}\n{"te')
    (root / "cut.gz").write_bytes(gzip.compress(os.urandom(100))[:-20])
    (root / "package.json").write_text('{"name": "a"}')
    os.mkfifo(root / "pipe")
    (inner / os.fsdecode(b"\xff\n.bin")).write_bytes(b"\0")
    reading = read(root)
    assert sorted(reading.documents) == [b"print()\n", b"print()\n", b"read me", b"row"]
    assert dict(reading.kinds) == {"JSON lines": 1, "text": 3}
    found = left_out(reading)
    assert {why: len(names) for why, names in found.items() if "cannot" not in why} == {
        sources.HIDDEN: 2,
        sources.LINKED: 2,
        sources.NO_FILE: 2,
        sources.EMPTY: 2,
        "binary": 2,
        "not JSON": 1,
        "no field 'text'": 1,
    }
    assert found["cannot be read as text"]
    assert "cut.jsonl (line 2: Unterminated string starting at)" in found["not JSON"]
    assert "inner/??.bin" in found["binary"]


def test_a_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"body": TEXTS[:20], "id": range(20)})
    other = datasets.Dataset.from_dict({"body": TEXTS[20:]})
    root = tmp_path / "root"
    datasets.DatasetDict({"train": saved, "test": other}).save_to_disk(str(root / "saved"))
    (root / "saved" / "train" / "cache-1.arrow").write_bytes(b"other")
    (root / "saved" / "notes.txt").write_text("beside it")
    datasets.enable_progress_bars()
    for place in (root / "saved", root):
        reading = read(place, field="body")
        assert dict(reading.kinds) == {"text": 1, "saved data sets": 20}
        assert left_out(reading).keys() == {sources.OTHER_SPLIT, sources.NO_PART}
    both = read(root / "saved" / "train", root / "saved" / "test", field="body")
    assert both.documents == [text.encode() for text in TEXTS]
    with pytest.raises(DataError, match=r"no field 'text': .*its fields: body, id"):
        read(root / "saved" / "train")
    (root / "saved" / "train" / "dataset_info.json").write_text("[1]")
    with pytest.raises(DataError, match="cannot be read as saved data sets"):
        read(root / "saved" / "train")


@pytest.mark.parametrize(
    ("given", "name", "configuration"),
    [
        ("somebody/texts:small", "somebody/texts", "small"),
        ("wikimedia/wikipedia:20231101.en", "wikimedia/wikipedia", "20231101.en"),
        ("user/data-v1.5", "user/data-v1.5", None),
        ("texts-v1:a.json", "texts-v1", "a.json"),
    ],
)
def test_a_data_set_by_name(
    given: str, name: str, configuration: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"body": [*TEXTS, None]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    reading = read(given, field="body")
    assert asked == [(name, configuration, "train")]
    assert reading.documents == [text.encode() for text in TEXTS]
    assert left_out(reading) == {sources.NULL: {given}}


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no way out\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"cannot be loaded \(no way out\)$"):
        read("somebody/texts")


def test_what_json_allows_inside_a_string(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "a\u2028b\x85"}, ensure_ascii=False)
    path.write_text(line + '\n{"text": "cut \\ud83d \\u0000"}', encoding="utf-8")
    assert read(path).documents == ["a\u2028b\x85".encode(), b"cut ? "]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"no text in it \(1 empty"),
        ("blank.txt", " \n\u3000".encode(), r"no text in it \(1 empty"),
        ("half.txt", b"\xff\xfe\x00", "not text in utf-16"),
        (
            "nul.txt",
            b"a\0b",
            "binary; what can be read is a text file, .*, .jsonl or .ndjson or ",
        ),
        ("broken.jsonl", b'{"text": "a"}\n{"te', r"not JSON \(line 2: Unterminated"),
        ("deep.jsonl", b"[" * 100_000, r"not JSON \(line 1"),
        ("broken.json", b"{'a': 1}", r"not JSON \(Expecting"),
        ("deep.json", b"[" * 100_000, "not JSON"),
        ("field.jsonl", b'{"body": "a"}', r"no field 'text' \(its fields: body; --field names one"),
        ("list.jsonl", b"[1]", "its fields: none"),
        ("field.csv", b"a\n" * 3, "its fields: a"),
        ("more.csv", b"id,text\n1,a\n2,b, c\n", "line 3 has 3 cells, and the first 2"),
        ("twice.csv", b"text,text\na,b\n", "more than one column 'text'"),
        ("quote.csv", b'id,text\n1,"a\n', "cannot be read as CSV"),
        ("wide.csv", b'"a\nb' + b"x" * 999 + b'"' + b",c" * 30, r"its fields: a\?bx{37}, c"),
        ("broken.parquet", b"PAR1", "cannot be read as parquet"),
        ("broken.arrow", b"ARROW1", "cannot be read as Arrow"),
        ("short.arrow", b"", "cannot be read as Arrow"),
        ("plain.txt.gz", b"text", "cannot be read as text"),
        ("cut.txt.xz", lzma.compress(b"text")[:-9], "cannot be read as text"),
        ("plain.txt.zst", b"text", "cannot be read as text"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    limit = csv.field_size_limit()
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert csv.field_size_limit() == limit


def test_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'a' * 200_000}\n")
    assert read(tmp_path / "a.csv").size == 200_000


@pytest.mark.parametrize("path", ["", "x" * 300 + ".txt"])
def test_a_path_that_cannot_be_one(path: str) -> None:
    with pytest.raises(DataError, match=r"empty name|File name too long"):
        read(path)


@pytest.mark.parametrize(
    "path",
    [
        "missing.txt",
        "./missing",
        "~/no/such/place/at/all",
        "~nosuchuser/x",
        "texts/missing.txt",
        "nowhere/a.jsonl",
        "nowhere/a.txt.gz",
    ],
)
def test_a_path_that_does_not_exist(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    with pytest.raises(DataError, match="there is no such file or folder"):
        read(path)


def test_text_that_looks_like_json_lines_is_told(tmp_path: Path) -> None:
    lines = {"a.log": LINES, "b": LINES.replace("\n", "\r"), "c.txt": "\n" + LINES, "d.x": LINES}
    others = {"e.txt": "{not json}\n", "f.py": "{\n}\n", "g.txt": "[1]\n", "h.txt": "5\n"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path).read() == "4 of text"
    for name, text in lines.items():
        (tmp_path / name).write_bytes(text.encode())
    account = (
        "8 of text, 4 of which look like JSON lines: rename to .jsonl (a.log, b, c.txt and 1 more)"
    )
    assert read(tmp_path).read() == account
    assert account in load_text([str(tmp_path)]).description


@pytest.mark.parametrize("at", [0, 3 << 20])
@pytest.mark.parametrize("start", [b"", b"\xff"])
def test_a_nul_anywhere_is_binary(start: bytes, at: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(start + b"a" * at + b"\0")
    with pytest.raises(DataError, match=r"a.txt: binary; what can be read"):
        read(tmp_path / "a.txt")


def test_every_source_must_give_text(prose: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=rf"^{empty}: there is no text in it$"):
        read(prose, empty)
    (empty / "picture").write_bytes(b"\x89PNG\0")
    with pytest.raises(DataError, match=rf"^{empty}: there is no text in it \(1 binary: picture\)"):
        read(prose, empty)


def test_the_default_text_is_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored results are of the files as they are, whatever is made of other people's."""
    files = {
        "mark.py": b"\xef\xbb\xbf# a mark\r\n",
        "latin.py": "# é\n".encode("latin-1"),
        "wide.py": "# wide\n".encode("utf-16"),
        "__init__.py": b"",
        "data.json": b'{"text": "no source"}',
        "inner/a.py": b"a = 1\n",
        "site-packages/b.py": b"b = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    reading = read()
    assert reading.documents == [files["inner/a.py"], files["mark.py"]]
    assert left_out(reading) == {
        sources.BROKEN: {"latin.py", "wide.py"},
        sources.EMPTY: {"__init__.py"},
    }


def test_a_large_file_is_not_held_many_times(tmp_path: Path) -> None:
    rows = ({"text": f"{i}" + "x" * 1000, "other": "x" * 1000} for i in range(4000))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("line é\n" * 600_000, encoding="utf-8")
    for name in ("a.jsonl", "a.txt"):
        tracemalloc.start()
        text = load_text([str(tmp_path / name)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = len(text.train + text.selection + text.held_out)
        assert size > 4_000_000
        assert peak < 2.5 * size, name


def test_more_than_can_be_used(prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_BYTES", 1000)
    with pytest.raises(DataError, match=r"is more than .* of text: give a part"):
        read(prose)


def test_the_docs_have_every_kind() -> None:
    given = [row for row, _ in rows_for_docs()]
    assert all(kind.shown in given for kind in KINDS)
