"""The kinds of data that can be read: one row for each, which the docs, the help and errors show.

JSON and CSV are read with Python's own modules. `datasets` guesses types: of a column of dates it
makes no text, and of the text NA nothing.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TextIO

from gatedffn.errors import first_line

LARGEST_BYTES = 1 << 30

_PIECE = 1 << 20
_LONGEST_LOOKED_AT = 1 << 24
_ROWS = 1000
_NAMES = 20
_MISSING = object()


class Unread(Exception):
    """Why something cannot be read: the same words for all of its sort, and what is its own."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(f"{why} ({detail})" if detail else why)
        self.why, self.detail = why, detail


class TooLarge(Exception):
    """More than `LARGEST_BYTES` of text."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of data.

    `document` says what is a document of it. `read` gives the values of a field, or without
    `fields` the one document. With `encoded` it is given a file of characters, which may be
    compressed; else a path, or a name.
    """

    name: str
    document: str
    read: Callable[[Any, str], Iterator[object]]
    endings: tuple[str, ...] = ()
    given: str = ""
    encoded: bool = False
    fields: bool = True

    @property
    def shown(self) -> str:
        """What one gives, in Markdown."""
        return self.given or _or(self.endings)


def _or(endings: Iterable[str]) -> str:
    return " or ".join(f"`{ending}`" for ending in endings)


def _whole(file: TextIO, field: str) -> Iterator[bytes]:  # noqa: ARG001 - it has no fields
    """All of a file; nothing where all of it is blank."""
    whole, blank = io.BytesIO(), True
    for piece in _pieces(file):
        blank = blank and piece.isspace()
        if whole.tell() + whole.write(piece.encode(errors="replace")) > LARGEST_BYTES:
            raise TooLarge
    yield b"" if blank else whole.getvalue()


def _json_lines(file: Iterable[str], field: str) -> Iterator[object]:
    return _values(_lines(file), field)


def _lines(file: Iterable[str]) -> Iterator[object]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", first_line(error))
                raise Unread("not JSON", f"line {number}: {why}") from error


def _json(file: TextIO, field: str) -> Iterator[object]:
    text = file.read(LARGEST_BYTES + 1)
    if len(text) > LARGEST_BYTES:
        raise TooLarge
    try:
        first, end = json.JSONDecoder().raw_decode(text, _after_blanks(text, 0))
    except (ValueError, RecursionError) as error:
        raise Unread("not JSON", first_line(error)) from error
    if _after_blanks(text, end) < len(text):
        # Ends of lines as a file of JSON lines has them.
        lines = re.finditer(r"[^\r\n]*(?:\r\n?|\n)?", text)
        return _json_lines((line[0] for line in lines), field)
    return _values(first if isinstance(first, list) else [first], field)


def _after_blanks(text: str, position: int) -> int:
    found = re.compile(r"\s*").match(text, position)
    return found.end() if found else position


def _table(file: TextIO, field: str, dialect: type[csv.Dialect]) -> Iterator[object]:
    before = csv.field_size_limit(LARGEST_BYTES)
    try:
        rows = csv.reader(file, dialect, strict=True)
        names = next(rows, [])
        if field not in names:
            raise _no_field(field, names)
        place = names.index(_once(field, names))
        for row in rows:
            if len(row) == len(names):
                yield row[place]
            elif row:
                raise Unread(
                    "not a table",
                    f"line {rows.line_num} has {len(row)} cells, and the first {len(names)}",
                )
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, field: str) -> Iterator[object]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        column = _column(file.schema_arrow.names, field)
        batches = file.iter_batches(batch_size=_ROWS, columns=[column])
        yield from _of_batches(batches, column, field)


def _arrow(path: Path, field: str) -> Iterator[object]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        yield from _of_batches(batches, _column(reader.schema.names, field), field)


def _saved(path: Path, field: str) -> Iterator[object]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever its code raises of files that are not as it wrote them
        raise Unread("cannot be read as saved data sets", first_line(error)) from error
    return _rows(rows, field)


def _by_name(source: str, field: str) -> Iterator[object]:
    import datasets

    # Its retries are told on the terminal one by one; the error below says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise Unread(
            "no file or folder here, and as a Hugging Face data set it cannot be loaded",
            first_line(error),
        ) from error
    return _rows(rows, field)


def _rows(rows: Any, field: str) -> Iterator[object]:
    """The values of a data set of `datasets`, whose other columns are not touched."""
    column = _column(rows.column_names, field)
    batches = rows.select_columns([column]).with_format("arrow").iter(_ROWS)
    return _of_batches(batches, column, field)


def _of_batches(batches: Iterable[Any], column: str, field: str) -> Iterator[object]:
    values = (value for batch in batches for value in batch.column(column).to_pylist())
    return _values(({column: value} for value in values), field)


def _column(names: list[str], field: str) -> str:
    """The column with a field, or with the structure that it is in."""
    for name in (field, field.partition(".")[0]):
        if name in names:
            return _once(name, names)
    raise _no_field(field, names)


def _once(name: str, names: list[str]) -> str:
    if names.count(name) > 1:
        raise Unread(f"more than one column {name!r}")
    return name


def _values(records: Iterable[object], field: str) -> Iterator[object]:
    """The field's value in each record, None where it has none; in some it must be."""
    names: dict[str, None] = {}
    records_seen = found = 0
    for record in records:
        records_seen += 1
        value = _value(record, field)
        if value is _MISSING:
            names |= dict.fromkeys(record if isinstance(record, dict) else ())
            yield None
        else:
            found += 1
            yield value
    if records_seen and not found:
        raise _no_field(field, names)


def _value(record: object, field: str) -> object:
    """`a.b` is b in a, unless a field is called so."""
    if not isinstance(record, dict):
        return _MISSING
    if field in record:
        return record[field]
    head, _, rest = field.partition(".")
    return _value(record[head], rest) if rest and head in record else _MISSING


def _no_field(field: str, names: Iterable[str]) -> Unread:
    shown = [printable(name)[:40] for name in itertools.islice(names, _NAMES)]
    more = ", ..." if len(shown) == _NAMES else ""
    return Unread(
        f"no field {field!r}", f"its fields: {', '.join(shown) or 'none'}{more}; --field names one"
    )


def printable(name: str) -> str:
    """A name that a terminal and UTF-8 can show in a line: names of files can hold anything."""
    return "".join(sign if sign.isprintable() else "?" for sign in name)


TEXT = Kind(
    "text",
    "all of it",
    _whole,
    given="a text file, whose name ends otherwise",
    encoded=True,
    fields=False,
)
SAVED = Kind(
    "saved data sets",
    "the field of a row; of several splits those of `train`",
    _saved,
    given="a folder that `save_to_disk` of `datasets` made",
)
BY_NAME = Kind(
    "Hugging Face data sets",
    "the field of a row of the split `train`",
    _by_name,
    given="`NAME` or `NAME:CONFIGURATION` at Hugging Face",
)
KINDS = (
    TEXT,
    Kind(
        "JSON lines",
        "the field of a line's object",
        _json_lines,
        endings=(".jsonl", ".ndjson", ".jsonlines", ".jl", ".ldjson"),
        encoded=True,
    ),
    Kind(
        "JSON",
        "the field of an object: of each in an array, of each line's, or of the only one",
        _json,
        endings=(".json",),
        encoded=True,
    ),
    Kind(
        "CSV",
        "the field of a row; the first row has the fields' names",
        partial(_table, dialect=csv.excel),
        endings=(".csv",),
        encoded=True,
    ),
    Kind(
        "TSV",
        "the same, with tabs between the fields",
        partial(_table, dialect=csv.excel_tab),
        endings=(".tsv",),
        encoded=True,
    ),
    Kind("parquet", "the field of a row", _parquet, endings=(".parquet",)),
    Kind("Arrow", "the field of a row, in a stream or a file", _arrow, endings=(".arrow",)),
    SAVED,
    BY_NAME,
)
"""The order in which they are shown."""


def _zstandard(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSIONS: Mapping[str, Callable[[Path], Any]] = MappingProxyType(
    {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}
)
"""How files are opened whose names end so, after the ending of their kind."""

MARKS: Mapping[bytes, str] = MappingProxyType(
    {
        codecs.BOM_UTF8: "utf-8-sig",
        # Before those of UTF-16, one of which begins alike.
        codecs.BOM_UTF32_LE: "utf-32",
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
)
"""Byte order marks, and what text after them is decoded with, which takes them off."""


def rows_for_docs() -> list[tuple[str, str]]:
    """What can be given, and what a document is then."""
    named = ", ".join(kind.name for kind in KINDS if kind.encoded)
    return [
        *((kind.shown, kind.document) for kind in KINDS),
        (f"{named} with {_or(COMPRESSIONS)} after its ending", "the same, decompressed"),
        ("a folder of these", "those of its files, at any depth"),
    ]


def in_words() -> str:
    """What can be given, for a line of help or of an error."""
    return ", ".join(given.replace("`", "") for given, _ in rows_for_docs())


def has_known_ending(path: Path) -> bool:
    """Whether a name's ending is that of a kind or of a compression."""
    return kind_of(path) is not TEXT or path.suffix.lower() in COMPRESSIONS


def looks_like_lines(text: bytes) -> bool:
    """Whether the first line of a text is a JSON object, if it is not too long to look at."""
    first = re.compile(rb"\s*({[^\r\n]*)").match(text, 0, _LONGEST_LOOKED_AT)
    try:
        return first is not None and isinstance(json.loads(first[1]), dict)
    except (ValueError, RecursionError):
        return False


def kind_of(path: Path) -> Kind:
    """The kind of a file, by its name."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return next((kind for kind in KINDS if endings and endings[-1] in kind.endings), TEXT)


def encoding_of(path: Path, named: str | None) -> str:
    """How a file's text is encoded: as its mark says, else in UTF-8, else in the named one.

    Raises:
        Unread: in none of them, or with a NUL in it, which no text has.
    """
    with _opened(path) as file:
        start = file.read(max(map(len, MARKS)))
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    tried = [marked] if marked else ["utf-8", *([named] if named else [])]
    for encoding in tried:
        if _is_text(path, encoding):
            return encoding
    if not marked and _has_nul(path):
        raise Unread("binary")
    raise Unread(f"not text in {' or '.join(tried)} (--encoding names another)")


def _is_text(path: Path, encoding: str) -> bool:
    try:
        with opened(path, encoding) as file:
            return not any("\0" in piece for piece in _pieces(file))
    except UnicodeError:
        return False


def _has_nul(path: Path) -> bool:
    with _opened(path) as file:
        return any(b"\0" in piece for piece in iter(partial(file.read, _PIECE), b""))


def _pieces(file: TextIO) -> Iterator[str]:
    return iter(partial(file.read, _PIECE), "")


@contextmanager
def opened(path: Path, encoding: str) -> Iterator[TextIO]:
    """The characters of a file, its ends of lines as they are."""
    with _opened(path) as file, io.TextIOWrapper(file, encoding, newline="") as text:
        yield text


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    opener = COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") if opener is None else opener(path) as file:
        yield file
