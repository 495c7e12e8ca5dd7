"""From what is named as data to its documents, with an account of what was left out and why."""

import codecs
import csv
import io
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gatedffn.compare.kinds import (
    BY_NAME,
    KINDS,
    LARGEST_BYTES,
    SAVED,
    TEXT,
    Kind,
    TooLarge,
    Unread,
    encoding_of,
    has_known_ending,
    in_words,
    kind_of,
    looks_like_lines,
    opened,
    printable,
)
from gatedffn.errors import DataError, first_line
from gatedffn.files import expanded

STANDARD_LIBRARY = "the Python standard library's source files"
DEFAULT_FIELD = "text"

# Why something is left out.
EMPTY = "empty"
NULL = "null or without the field"
NO_STRING = "with no string in the field"
BROKEN = "not UTF-8 or with a NUL"
HIDDEN = "hidden"
NO_FILE = "neither file nor folder"
CLOSED = "closed to this user"
LINKED = "behind a link to a folder (name the folder to read it)"
OTHER_SPLIT = "not the split train (name the folder to read it)"
NO_PART = "not of the data set saved beside it"

# How `datasets` marks the folders that it saves.
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"

# What files that are damaged, or are no such files, raise in what reads them.
_DAMAGED = (OSError, EOFError, ValueError, csv.Error, zlib.error, lzma.LZMAError)

_NAME_OF_A_DATA_SET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.-]*)?")
_SHOWN = 3


@dataclass(slots=True)
class Reading:
    """Documents, how many there are of each kind and encoding, and what was left out."""

    documents: list[bytes] = field(default_factory=list)
    size: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)
    like_lines: list[str] = field(default_factory=list)
    """The names of files read as text that look like JSON lines."""
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many, by the reason and the name of the file."""

    def take(self, document: bytes, kind: Kind) -> None:
        """Adds a document."""
        self.documents.append(document)
        self.kinds[kind.name] += 1
        self.size += len(document)
        self.check()

    def leave(self, why: str, name: str, detail: str = "") -> None:
        """Counts one that is left out."""
        self.left_out[why, printable(f"{name} ({detail})" if detail else name)] += 1

    def add(self, other: "Reading") -> None:
        """Adds what was read elsewhere."""
        self.documents += other.documents
        self.size += other.size
        self.kinds += other.kinds
        self.encodings += other.encodings
        self.like_lines += other.like_lines
        self.left_out += other.left_out
        self.check()

    def check(self) -> None:
        """Raises `TooLarge` where this is more than can be used."""
        if self.size > LARGEST_BYTES:
            raise TooLarge

    def read(self) -> str:
        """What was read, in words."""
        words = []
        for name, count in self.kinds.items():
            words.append(f"{count} of {name}")
            if name == TEXT.name and self.like_lines:
                words.append(
                    f"{len(self.like_lines)} of which look like JSON lines: rename to .jsonl "
                    f"({_few(self.like_lines)})"
                )
        words += [f"{count} files in {n}" for n, count in self.encodings.items() if n != "utf-8"]
        return ", ".join(words)

    def unread(self) -> list[str]:
        """What was left out, in words: how many, why, and a few names."""
        reasons: dict[str, list[str]] = {}
        for why, name in self.left_out:
            reasons.setdefault(why, []).append(name)
        lines = []
        for why, names in reasons.items():
            count = sum(self.left_out[why, name] for name in names)
            lines.append(f"{count} {why}: {_few(names)}")
        return lines


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class _Item(NamedTuple):
    """Something to read, under the name by which it is shown."""

    name: str
    place: Path | str
    kind: Kind


def name_of(sources: Sequence[str]) -> str:
    """What was given as data, in words."""
    return printable(", ".join(sources)) if sources else STANDARD_LIBRARY


def read_documents(sources: Sequence[str], field: str | None, encoding: str | None) -> Reading:
    """Reads all sources, or the standard library without any.

    Raises:
        DataError: a source that gives no document, or a field or an encoding that none needs.
    """
    used = None if encoding is None else codec(encoding)
    sought = DEFAULT_FIELD if field is None else field
    found = [_find(source) for source in sources]
    if field is not None and not any(item.kind.fields for items, _ in found for item in items):
        raise DataError(
            f"field is {field!r}, and {name_of(sources)} has no fields, only text: leave out "
            "--field, or give what has some"
        )
    whole = Reading()
    try:
        for source, (items, of_folder) in zip(sources, found, strict=True):
            whole.add(_read_source(source, items, of_folder, sought, encoding))
        if not sources:
            whole.add(_standard_library())
    except TooLarge as error:
        raise DataError(
            f"{name_of(sources)} is more than {LARGEST_BYTES >> 20} MiB of text: give a part"
        ) from error
    if field is not None and not any(kind.fields and kind.name in whole.kinds for kind in KINDS):
        raise DataError(f"field is {field!r}, which nothing has: {'; '.join(whole.unread())}")
    if used is not None and used not in map(codec, whole.encodings):
        raise DataError(
            f"encoding is {encoding!r}, and nothing in {name_of(sources)} is read with it, since "
            "all text is in UTF-8 or has a byte order mark: leave out --encoding"
        )
    return whole


def codec(encoding: str) -> str:
    """Python's own name of an encoding.

    Raises:
        DataError: Python has no encoding of text by that name.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)  # which takes encodings of text alone
        return codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise DataError(
            f"encoding is {encoding!r}, which Python does not know: give one such as latin-1"
        ) from error


def _find(source: str) -> tuple[list[_Item], Reading | None]:
    """What there is to read, and for a folder what of it is left out."""
    if not source:
        raise DataError("an empty name was given as data: give a path or a data set's name")
    path = expanded(source)
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:
        raise DataError(f"{source[:60]}...: {error.strerror}") from error
    if is_folder:
        left_out = Reading()
        return sorted(_folder(path, left_out), key=lambda item: Path(item.place)), left_out
    if is_file:
        return [_Item(source, path, kind_of(path))], None
    if exists:
        raise DataError(f"{source} is neither a file nor a folder")
    if _NAME_OF_A_DATA_SET.fullmatch(source) and (":" in source or not _file_like(path)):
        return [_Item(source, source, BY_NAME)], None
    raise DataError(f"{source}: there is no such file or folder")


def _file_like(path: Path) -> bool:
    """Whether a name that nothing has is a file's: names of data sets can have points too."""
    return path.suffix != "" and (path.parent.is_dir() or has_known_ending(path))


def _folder(root: Path, left_out: Reading) -> Iterator[_Item]:
    """What there is to read in a folder, at any depth."""

    def name_in_it(path: Path) -> str:
        return str(path.relative_to(root)) if path != root else str(root)

    def closed(error: OSError) -> None:
        left_out.leave(CLOSED, name_in_it(Path(error.filename)))

    for name, folders, files in os.walk(root, onerror=closed):
        folder = Path(name)
        own, of_splits = _own_files(folder, files), _SPLITS in files
        if own:
            yield _Item(name_in_it(folder), folder, SAVED)
        for file in sorted(set(files) - own - {_SPLITS}):
            path = folder / file
            why = _why_not_file(path, of_saved=bool(own))
            if why is None:
                yield _Item(name_in_it(path), path, kind_of(path))
            else:
                left_out.leave(why, name_in_it(path))
        for inner in sorted(folders):
            path = folder / inner
            why = _why_not_folder(path, of_splits=of_splits)
            if why is not None:
                left_out.leave(why, name_in_it(path))
                folders.remove(inner)


def _why_not_file(path: Path, *, of_saved: bool) -> str | None:
    if path.name.startswith("."):
        return HIDDEN
    if not path.is_file():
        return NO_FILE
    return NO_PART if of_saved and path.suffix == ".arrow" else None


def _why_not_folder(path: Path, *, of_splits: bool) -> str | None:
    if path.name.startswith("."):
        return HIDDEN
    if path.is_symlink():
        return LINKED
    other = of_splits and path.name != "train" and (path / _STATE).is_file()
    return OTHER_SPLIT if other else None


def _own_files(folder: Path, files: Sequence[str]) -> set[str]:
    """The files of a saved data set, if the folder is one."""
    if not {_STATE, _INFO} <= set(files):
        return set()
    try:
        parts = json.loads((folder / _STATE).read_text(encoding="utf-8"))["_data_files"]
        return {_STATE, _INFO, *(part["filename"] for part in parts)}
    except (OSError, ValueError, LookupError, TypeError):
        return set()  # another program's


def _read_source(
    source: str, items: Sequence[_Item], left_out: Reading | None, field: str, encoding: str | None
) -> Reading:
    """Reads what was found: in a folder what cannot be read is left out, else it is refused."""
    whole = left_out or Reading()
    for item in items:
        try:
            whole.add(_read(item, field, encoding))
        except Unread as error:
            if left_out is None:
                known = f"; what can be read is {in_words()}" if item.kind is TEXT else ""
                raise DataError(f"{source}: {error}{known}") from error
            whole.leave(error.why, item.name, error.detail)
    if not whole.documents:
        why = "; ".join(whole.unread())
        raise DataError(f"{source}: there is no text in it" + (f" ({why})" if why else ""))
    return whole


def _read(item: _Item, field: str, encoding: str | None) -> Reading:
    """The documents of one file or data set; what is no text among its values is left out."""
    import pyarrow

    found = Reading()
    value = None
    try:
        for value in _values(item, field, encoding, found):
            if value is None:
                found.leave(NULL, item.name)
            elif not isinstance(value, str if item.kind.fields else bytes):
                found.leave(NO_STRING, item.name)
            elif document := _document(value):
                found.take(document, item.kind)
                if item.kind is TEXT and looks_like_lines(document):
                    found.like_lines.append(printable(item.name))
            else:
                found.leave(EMPTY, item.name)
    except (*_DAMAGED, pyarrow.ArrowException) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise Unread(f"cannot be read as {item.kind.name}", why) from error
    if not (found.documents or found.left_out):
        found.leave(EMPTY, item.name)
    return found


def _values(item: _Item, field: str, encoding: str | None, found: Reading) -> Iterator[object]:
    if not item.kind.encoded:
        yield from item.kind.read(item.place, field)
        return
    path = Path(item.place)
    own = encoding_of(path, encoding)
    found.encodings[own.removesuffix("-sig")] += 1
    with opened(path, own) as file:
        yield from item.kind.read(file, field)


def _document(value: str | bytes) -> bytes:
    """The text in UTF-8; nothing where it is blank."""
    if isinstance(value, bytes):
        return value
    text = value.replace("\0", "")  # which stands between documents
    # JSON can hold half of a surrogate pair, which UTF-8 cannot.
    return b"" if text.isspace() else text.encode(errors="replace")


def _standard_library() -> Reading:
    """Byte for byte, byte order marks too: stored results are of these bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = Reading()
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "__pycache__"} & set(path.parts):
            continue
        content, name = path.read_bytes(), str(path.relative_to(root))
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = "\0"
        # A few test files are broken on purpose.
        if "\0" in text:
            found.leave(BROKEN, name)
        elif not text or text.isspace():
            found.leave(EMPTY, name)
        else:
            found.take(content, TEXT)
    return found
