"""The text that variants are compared on: read, cleaned of duplicates, split, made into tokens."""

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gatedffn.compare.sources import name_of, read_documents
from gatedffn.errors import DataError

SPLIT_BY_FILE_FROM = 20
"""Fewer documents are split by position, since one of them could be most of the text."""

_SEPARATOR = b"\0"
_PARTS = ("train", "selection", "held_out")
_SHARES = (0.8, 0.1, 0.1)
_AT_ONCE = 10_000

BYTES = 256
"""The tokens that there are where bytes are tokens."""

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Text:
    """The cleaned text in three parts, and a description of where it is from."""

    train: bytes
    selection: bytes
    held_out: bytes
    description: str
    fingerprint: str


def load_text(
    sources: Sequence[str], field: str | None = None, encoding: str | None = None
) -> Text:
    """Reads the sources, which are of any of the kinds in `kinds.KINDS`, or folders of files.

    Args:
        sources: paths or names; none is the running Python's standard library.
        field: the field that holds the text where there are fields, `DEFAULT_FIELD` if not given.
        encoding: that of files which are not in UTF-8 and have no byte order mark.

    Raises:
        DataError: a path that does not exist, data that is empty, binary or too little, or a field
            or an encoding that nothing uses.
    """
    reading = read_documents(sources, field, encoding)
    unique = {hashlib.sha256(d.strip()).digest(): d for d in reading.documents}
    parts = _split_by_document(unique) if len(unique) >= SPLIT_BY_FILE_FROM else None
    how = "by document" if parts else "by position, since the documents are few or uneven"
    train, selection, held_out = parts or _split_by_position(list(unique.values()))
    sizes = [len(part) for part in (train, selection, held_out)]
    duplicates = len(reading.documents) - len(unique)
    left_out = [*([f"{duplicates} duplicates"] if duplicates else []), *reading.unread()]
    description = (
        f"{name_of(sources)}: {len(unique)} documents, {sum(sizes):,} bytes, split {how} into "
        f"{sizes[0]:,}, {sizes[1]:,} and {sizes[2]:,} bytes; read: {reading.read()}; left out: "
        + ("; ".join(left_out) or "nothing")
    )
    fingerprint = _fingerprint((train, selection, held_out))
    return Text(train, selection, held_out, description, fingerprint)


def _fingerprint(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(b"\1" if number else b"")
        digest.update(part)
    return digest.hexdigest()[:16]


def _split_by_document(unique: dict[bytes, bytes]) -> list[bytes] | None:
    """Documents in the order of their hashes, so that order and names do not matter.

    None where a part would be far from its share.
    """
    total = sum(map(len, unique.values()))
    parts: list[list[bytes]] = [[] for _ in _PARTS]
    part, size, limit = 2, 0, _SHARES[2] * total
    for digest in sorted(unique):
        if size >= limit and part:
            part -= 1
            limit += _SHARES[part] * total
        parts[part].append(unique[digest])
        size += len(unique[digest])
    if not _near_shares([sum(map(len, part)) + max(0, len(part) - 1) for part in parts]):
        return None
    return [_SEPARATOR.join(part) for part in parts]


def _near_shares(sizes: Sequence[int]) -> bool:
    """Whether every part is between half its share and twice it."""
    wanted = [share * sum(sizes) for share in _SHARES]
    return all(w / 2 <= size <= 2 * w for size, w in zip(sizes, wanted, strict=True))


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

    train: Ids
    selection: Ids
    held_out: Ids
    vocabulary: int
    bytes_per_token: float


def tokenize(text: Text, tokenizer: str) -> Tokens:
    """Bytes as they are, or byte-pair tokens whose merges are learned on the training part."""
    parts = (text.train, text.selection, text.held_out)
    train: Ids
    selection: Ids
    held_out: Ids
    if tokenizer == "bytes":
        # No copies: the numbers are the bytes.
        train, selection, held_out = (np.frombuffer(part, np.uint8) for part in parts)
        return Tokens(train, selection, held_out, BYTES, 1.0)
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
    train, selection, held_out = (_encoded(pairs, part) for part in parts)
    bytes_per_token = len(text.held_out) / max(1, len(held_out))
    return Tokens(train, selection, held_out, pairs.get_vocab_size(), bytes_per_token)


def _encoded(pairs: Any, part: bytes) -> Ids:
    """The tokens of a part, some lines at a time: an encoding takes far more room than its ids."""
    pieces, ids = _pieces(part), [np.empty(0, np.int32)]
    while some := list(itertools.islice(pieces, _AT_ONCE)):
        ids.append(np.array([i for e in pairs.encode_batch(some) for i in e.ids], np.int32))
    return np.concatenate(ids)


def _pieces(part: bytes) -> Iterator[str]:
    """Lines, kept whole: a tokenizer is slow on megabytes in one string."""
    for line in io.TextIOWrapper(io.BytesIO(part), "utf-8", errors="replace", newline=""):
        yield from line.splitlines(keepends=True)


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

    def __init__(self, tokens: Ids, starts: NDArray[np.int64], context: int) -> None:
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


def measuring_windows(part: Ids, context: int, most_tokens: int) -> Windows:
    """Windows that follow each other without overlap, evenly spread over the part."""
    available = len(part) // context
    count = max(1, min(available, most_tokens // context))
    starts = (np.arange(count) * available // count) * context
    return Windows(part, starts.astype(np.int64), context)
