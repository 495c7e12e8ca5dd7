"""The text that variants are compared on: read, cleaned of duplicates, split, made into tokens."""

import hashlib
import json
import logging
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gatedffn.errors import DataError

STANDARD_LIBRARY = "the Python standard library's source files"
LARGEST_BYTES = 1 << 30
SPLIT_BY_FILE_FROM = 20
"""Fewer documents are split by position, since one of them could be most of the text."""

_SEPARATOR = b"\0"
_NAME_OF_A_DATA_SET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.-]*)?")
_PARTS = ("train", "selection", "held_out")
_SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True, slots=True)
class Text:
    """The cleaned text in three parts, and a description of where it is from."""

    train: bytes
    selection: bytes
    held_out: bytes
    description: str
    fingerprint: str


def load_text(sources: Sequence[str], field: str) -> Text:
    """Reads the sources: text files, folders, jsonl, parquet, or names of Hugging Face data sets.

    Args:
        sources: paths or names; none is the running Python's standard library.
        field: the field that holds the text in jsonl, parquet and data sets.

    Raises:
        DataError: a path that does not exist, or data that is empty, binary or too little.
    """
    # JSON can hold half of a surrogate pair, which UTF-8 cannot.
    documents = [d.encode(errors="replace") for d in _documents(sources, field) if d.strip()]
    unique = {hashlib.sha256(document.strip()).digest(): document for document in documents}
    if not unique:
        raise DataError(f"{_name(sources)}: there is no text in it")
    parts = _split_by_file(unique)
    by_file = len(unique) >= SPLIT_BY_FILE_FROM and _near_shares(parts)
    if not by_file:
        parts = _split_by_position(list(unique.values()))
    train, selection, held_out = parts
    fingerprint = hashlib.sha256(b"\1".join(parts)).hexdigest()[:16]
    removed = len(documents) - len(unique)
    description = (
        f"{_name(sources)}: {len(unique)} documents, {sum(map(len, parts)):,} bytes, "
        f"{removed} duplicates left out, split "
        + ("by document" if by_file else "by position, since the documents are few or uneven")
        + f" into {len(train):,}, {len(selection):,} and {len(held_out):,} bytes"
    )
    return Text(train, selection, held_out, description, fingerprint)


def _name(sources: Sequence[str]) -> str:
    return ", ".join(sources) if sources else STANDARD_LIBRARY


def _documents(sources: Sequence[str], field: str) -> Iterator[str]:
    if not sources:
        yield from _standard_library()
        return
    size = 0
    for source in sources:
        if not source:
            raise DataError("an empty name was given as data: give a path or a data set's name")
        path = Path(source).expanduser()
        try:
            is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
        except OSError as error:
            raise DataError(f"{source[:60]}...: {error.strerror}") from error
        if is_folder:
            found = _folder(path, field)
        elif is_file:
            found = _file(path, field)
        elif exists:
            raise DataError(f"{source} is neither a file nor a folder")
        elif _NAME_OF_A_DATA_SET.fullmatch(source) and not path.suffix:
            found = _data_set(source, field)
        else:
            raise DataError(f"{source}: there is no such file or folder")
        for document in found:
            size += len(document)
            if size > LARGEST_BYTES:
                raise DataError(
                    f"{_name(sources)} is more than {LARGEST_BYTES >> 20} MiB of text: give a part"
                )
            yield document


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts):
            text = _decoded(path.read_bytes())
            # A few test files are broken on purpose; they are not source text.
            if text is not None:
                yield text


def _folder(root: Path, field: str) -> Iterator[str]:
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and not _hidden(p, root)]
    if not files:
        raise DataError(f"{root}: the folder holds no files")
    readable = 0
    for path in files:
        if path.suffix in (".jsonl", ".parquet"):
            readable += 1
            yield from _file(path, field)
        elif (text := _decoded(_read(path))) is not None:
            readable += 1
            yield text
    if not readable:
        raise DataError(f"{root}: none of its {len(files)} files is text in UTF-8")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _file(path: Path, field: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _json_lines(path, field)
    elif path.suffix == ".parquet":
        yield from _parquet(path, field)
    else:
        text = _decoded(_read(path))
        if text is None:
            raise DataError(f"{path} is not text in UTF-8: it must be text, .jsonl or .parquet")
        yield text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(content: bytes) -> str | None:
    """The text, or None where it is not text: not UTF-8, or with a NUL in it."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _json_lines(path: Path, field: str) -> Iterator[str]:
    text = _decoded(_read(path))
    if text is None:
        raise DataError(f"{path} is not text in UTF-8")
    # Not splitlines(), which also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({first_line(error)})") from error
        yield _field_of(record, field, f"{path}, line {number}")


def _field_of(record: Any, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        fields = ", ".join(record) if isinstance(record, dict) else "none"
        raise DataError(
            f"{where}: no text in the field {field!r}; its fields: {fields}; name one with --field"
        )
    return value.replace("\0", "")


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise DataError(
                    f"{path}: no column {field!r}; its columns: "
                    f"{', '.join(file.schema_arrow.names)}; name one with --field"
                )
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield _field_of({field: value}, field, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def _data_set(source: str, field: str) -> Iterator[str]:
    import datasets

    # Its retries are told on the terminal one by one; the error below says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source} is no file or folder here, and as a Hugging Face data set it cannot be "
            f"loaded: {first_line(error)}"
        ) from error
    for row in rows:
        yield _field_of(row, field, source)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _split_by_file(unique: dict[bytes, bytes]) -> list[bytes]:
    """Documents in the order of their hashes, so that order and names do not matter."""
    total = sum(map(len, unique.values()))
    parts: list[list[bytes]] = [[] for _ in _PARTS]
    part, size, limit = 2, 0, _SHARES[2] * total
    for digest in sorted(unique):
        if size >= limit and part:
            part -= 1
            limit += _SHARES[part] * total
        parts[part].append(unique[digest])
        size += len(unique[digest])
    return [_SEPARATOR.join(part) for part in parts]


def _near_shares(parts: list[bytes]) -> bool:
    """Whether every part is between half its share and twice it."""
    total = sum(map(len, parts))
    wanted = [share * total for share in _SHARES]
    return all(w / 2 <= len(part) <= 2 * w for part, w in zip(parts, wanted, strict=True))


def _split_by_position(documents: list[bytes]) -> list[bytes]:
    text = _SEPARATOR.join(documents)
    first = _next_line(text, int(_SHARES[0] * len(text)))
    second = _next_line(text, int((_SHARES[0] + _SHARES[1]) * len(text)))
    return [text[:first], text[first:second], text[second:]]


def _next_line(text: bytes, position: int) -> int:
    newline = text.find(b"\n", position)
    return position if newline < 0 or newline - position > 10_000 else newline + 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """The three parts as token numbers; `bytes_per_token` is that of the held-out part."""

    train: NDArray[np.int32]
    selection: NDArray[np.int32]
    held_out: NDArray[np.int32]
    vocabulary: int
    bytes_per_token: float


def tokenize(text: Text, tokenizer: str) -> Tokens:
    """Bytes as they are, or byte-pair tokens whose merges are learned on the training part."""
    parts = (text.train, text.selection, text.held_out)
    if tokenizer == "bytes":
        train, selection, held_out = (np.frombuffer(p, np.uint8).astype(np.int32) for p in parts)
        return Tokens(train, selection, held_out, 256, 1.0)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = int(tokenizer.partition(":")[2])
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(_pieces(text.train), trainer)
    train, selection, held_out = (
        np.array([i for e in pairs.encode_batch(list(_pieces(p))) for i in e.ids], np.int32)
        for p in parts
    )
    bytes_per_token = len(text.held_out) / max(1, len(held_out))
    return Tokens(train, selection, held_out, pairs.get_vocab_size(), bytes_per_token)


def _pieces(part: bytes) -> Iterator[str]:
    """Lines, kept whole: a tokenizer is slow on megabytes in one string."""
    yield from part.decode(errors="replace").splitlines(keepends=True)


def check_enough(tokens: Tokens, context: int, batch: int) -> None:
    """Raises `DataError` where a part does not fill one batch of windows."""
    for name in _PARTS:
        have, need = len(getattr(tokens, name)), batch * context
        if have < need:
            raise DataError(
                f"too little data: the {name.replace('_', '-')} part has {have:,} tokens and needs "
                f"{need:,}, {batch} windows of {context}; give about "
                f"{10 * need:,} tokens in all, or a smaller --context or --batch"
            )


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of `context` tokens that start at given places."""

    def __init__(self, tokens: NDArray[np.int32], starts: NDArray[np.int64], context: int) -> None:
        self.tokens, self.starts, self.context = tokens, starts, context

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.starts[index]
        ids = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def training_windows(tokens: Tokens, context: int, count: int, seed: int) -> Windows:
    """The windows of a run in order: random places that depend on the seed alone."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, len(tokens.train) - context + 1, size=count)
    return Windows(tokens.train, starts, context)


def measuring_windows(part: NDArray[np.int32], context: int, most_tokens: int) -> Windows:
    """Windows that follow each other without overlap, evenly spread over the part."""
    available = len(part) // context
    count = max(1, min(available, most_tokens // context))
    starts = (np.arange(count) * available // count) * context
    return Windows(part, starts.astype(np.int64), context)
