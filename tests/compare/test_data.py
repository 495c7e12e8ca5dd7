import sysconfig
from pathlib import Path

import numpy as np
import pytest

from gatedffn.compare.data import (
    Tokens,
    check_enough,
    load_text,
    measuring_windows,
    tokenize,
    training_windows,
)
from gatedffn.compare.sources import STANDARD_LIBRARY
from gatedffn.errors import DataError


def test_the_default_is_the_standard_library() -> None:
    text = load_text([])
    assert text.description.startswith(STANDARD_LIBRARY)
    source = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_bytes()
    assert sum(source in part for part in (text.train, text.selection, text.held_out)) == 1


def test_parts_are_whole_documents_in_eighty_ten_ten(prose: Path) -> None:
    text = load_text([str(prose)])
    parts = [part.split(b"\0") for part in (text.train, text.selection, text.held_out)]
    documents = {path.read_bytes() for path in prose.iterdir()}
    assert {d for part in parts for d in part} == documents
    assert sum(map(len, parts)) == len(documents)
    assert [len(part) for part in parts] == [24, 3, 3]


def test_one_long_document_among_short_ones_is_cut(prose: Path) -> None:
    (prose / "long.txt").write_text("".join(f"line {i}\n" for i in range(30_000)))
    text = load_text([str(prose)])
    sizes = [len(part) for part in (text.train, text.selection, text.held_out)]
    assert "uneven" in text.description
    assert [round(size / sum(sizes), 2) for size in sizes] == [0.8, 0.1, 0.1]


def test_duplicates_are_left_out(prose: Path) -> None:
    before = load_text([str(prose)])
    (prose / "copy.txt").write_text((prose / "3.txt").read_text() + "\n")
    after = load_text([str(prose)])
    assert "1 duplicates" in after.description
    sizes = [len(text.train + text.selection + text.held_out) for text in (before, after)]
    assert abs(sizes[1] - sizes[0]) <= 1


def test_the_split_does_not_depend_on_names_or_order(prose: Path) -> None:
    before = load_text([str(prose)])
    for i, path in enumerate(sorted(prose.iterdir())):
        path.rename(prose / f"renamed-{99 - i}.txt")
    assert load_text([str(prose)]).fingerprint == before.fingerprint


def test_one_long_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    text = load_text([str(path)])
    assert "by position" in text.description
    assert text.train + text.selection + text.held_out == path.read_bytes()
    assert text.held_out.endswith(b"line 999\n")


def test_too_little_data(prose: Path) -> None:
    tokens = tokenize(load_text([str(prose)]), "bytes")
    check_enough(tokens, 32, 4)
    with pytest.raises(DataError, match=r"too little data: the selection part has .* needs 40,960"):
        check_enough(tokens, 1024, 40)


def test_bytes_are_the_bytes(prose: Path) -> None:
    text = load_text([str(prose)])
    tokens = tokenize(text, "bytes")
    assert bytes(tokens.held_out.astype(np.uint8)) == text.held_out
    assert (tokens.vocabulary, tokens.bytes_per_token) == (256, 1.0)


def test_byte_pairs_are_learned_on_the_training_part(prose: Path) -> None:
    text = load_text([str(prose)])
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
