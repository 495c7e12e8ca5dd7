import json
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gatedffn.compare.data import (
    STANDARD_LIBRARY,
    Tokens,
    check_enough,
    load_text,
    measuring_windows,
    tokenize,
    training_windows,
)
from gatedffn.errors import DataError


def test_the_default_is_the_standard_library() -> None:
    text = load_text([], "text")
    assert text.description.startswith(STANDARD_LIBRARY)
    source = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_bytes()
    assert sum(source in part for part in (text.train, text.selection, text.held_out)) == 1


def test_parts_are_whole_documents_in_eighty_ten_ten(prose: Path) -> None:
    text = load_text([str(prose)], "text")
    parts = [part.split(b"\0") for part in (text.train, text.selection, text.held_out)]
    documents = {path.read_bytes() for path in prose.iterdir()}
    assert {d for part in parts for d in part} == documents
    assert sum(map(len, parts)) == len(documents)
    assert [len(part) for part in parts] == [24, 3, 3]


def test_one_long_document_among_short_ones_is_cut(prose: Path) -> None:
    (prose / "long.txt").write_text("".join(f"line {i}\n" for i in range(30_000)))
    text = load_text([str(prose)], "text")
    sizes = [len(part) for part in (text.train, text.selection, text.held_out)]
    assert "uneven" in text.description
    assert [round(size / sum(sizes), 2) for size in sizes] == [0.8, 0.1, 0.1]


def test_jsonl_with_separators_and_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"a\u2028b\x85 {i}"}, ensure_ascii=False) for i in range(30)]
    path.write_text("\n".join([*rows, '{"text": "cut \\ud83d"}']), encoding="utf-8")
    text = load_text([str(path)], "text")
    assert "31 documents" in text.description
    assert b"cut ?" in text.train + text.selection + text.held_out


def test_duplicates_are_left_out(prose: Path) -> None:
    before = load_text([str(prose)], "text")
    (prose / "copy.txt").write_text((prose / "3.txt").read_text() + "\n")
    after = load_text([str(prose)], "text")
    assert "1 duplicates" in after.description
    sizes = [len(text.train + text.selection + text.held_out) for text in (before, after)]
    assert abs(sizes[1] - sizes[0]) <= 1


def test_the_split_does_not_depend_on_names_or_order(prose: Path) -> None:
    before = load_text([str(prose)], "text")
    for i, path in enumerate(sorted(prose.iterdir())):
        path.rename(prose / f"renamed-{99 - i}.txt")
    assert load_text([str(prose)], "text").fingerprint == before.fingerprint


def test_one_long_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    text = load_text([str(path)], "text")
    assert "by position" in text.description
    assert text.train + text.selection + text.held_out == path.read_bytes()
    assert text.held_out.endswith(b"line 999\n")


def test_jsonl_and_parquet_give_the_same_text(tmp_path: Path) -> None:
    texts = [f"document number {i}" for i in range(40)]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    pyarrow.parquet.write_table(pa.table({"body": texts}), table)
    read = [load_text([str(path)], "body").fingerprint for path in (lines, table)]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n", "no text"),
        ("binary.txt", b"\xff\xfe\x00", "not text in UTF-8"),
        ("nul.txt", b"a\0b", "not text in UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"te', "line 2: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("field.jsonl", b'{"body": "a"}', "its fields: body; name one with --field"),
        ("list.jsonl", b"[1]", "no text in the field 'text'"),
        ("broken.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text([str(path)], "text")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_parquet_column_names_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match="its columns: body"):
        load_text([str(path)], "text")


@pytest.mark.parametrize("path", ["", "x" * 300 + ".txt"])
def test_a_path_that_cannot_be_one(path: str) -> None:
    with pytest.raises(DataError, match=r"empty name|File name too long"):
        load_text([path], "text")


@pytest.mark.parametrize("path", ["missing.txt", "./missing", "~/no/such/place/at/all"])
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_text([path], "text")


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        load_text([str(tmp_path)], "text")
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match="none of its 1 files is text"):
        load_text([str(tmp_path)], "text")


def test_too_little_data(prose: Path) -> None:
    tokens = tokenize(load_text([str(prose)], "text"), "bytes")
    check_enough(tokens, 32, 4)
    with pytest.raises(DataError, match=r"too little data: the selection part has .* needs 40,960"):
        check_enough(tokens, 1024, 40)


def test_bytes_are_the_bytes(prose: Path) -> None:
    text = load_text([str(prose)], "text")
    tokens = tokenize(text, "bytes")
    assert bytes(tokens.held_out.astype(np.uint8)) == text.held_out
    assert (tokens.vocabulary, tokens.bytes_per_token) == (256, 1.0)


def test_byte_pairs_are_learned_on_the_training_part(prose: Path) -> None:
    text = load_text([str(prose)], "text")
    tokens = tokenize(text, "bpe:300")
    assert 257 <= tokens.vocabulary <= 300
    assert tokens.bytes_per_token == len(text.held_out) / len(tokens.held_out)
    assert tokens.bytes_per_token > 1.5
    again = tokenize(text, "bpe:300")
    assert np.array_equal(tokens.train, again.train)


def _numbers(count: int) -> Tokens:
    array = np.arange(count, dtype=np.int32)
    return Tokens(array, array, array, count, 1.0)


def test_training_windows_depend_on_the_seed_alone() -> None:
    tokens = _numbers(1000)
    first, again = (training_windows(tokens, 16, 50, seed=3) for _ in range(2))
    other = training_windows(tokens, 16, 50, seed=4)
    starts = [[int(w[i]["input_ids"][0]) for i in range(50)] for w in (first, again, other)]
    assert starts[0] == starts[1] != starts[2]
    # Every place must be possible, the last one too.
    ends = training_windows(_numbers(17), 16, 200, seed=0)
    assert {int(ends[i]["input_ids"][0]) for i in range(200)} == {0, 1}


def test_measuring_windows_do_not_overlap() -> None:
    windows = measuring_windows(_numbers(1000).held_out, 16, 320)
    seen = [int(t) for i in range(len(windows)) for t in windows[i]["input_ids"]]
    assert len(seen) == len(set(seen)) == 320
    assert max(seen) > 900


def test_a_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"body": [f"row {i}" for i in range(30)]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = load_text(["somebody/texts:small"], "body")
    assert asked == [("somebody/texts", "small", "train")]
    assert b"row 29" in text.train + text.selection + text.held_out


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no way out\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"cannot be loaded: no way out$"):
        load_text(["somebody/texts"], "text")
