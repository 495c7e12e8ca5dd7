"""Span corruption, by its properties."""

import numpy as np
import pytest

from gatedffn.compare.corruption import MEAN_SPAN, NOISE, Corrupted, Corruption
from gatedffn.compare.data import Windows

WORDS = 256


def lengths(mask: np.ndarray, kind: bool) -> list[int]:
    """The lengths of the stretches of a kind, in their order."""
    borders = np.flatnonzero(np.diff(mask)) + 1
    parts = np.split(mask, borders)
    return [len(part) for part in parts if part[0] == kind]


def restored(inputs: np.ndarray, target: np.ndarray) -> list[int]:
    """The text, by putting behind each sentinel of the input what the target has behind it."""
    said: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= WORDS:
            said[token] = []
        else:
            said[list(said)[-1]].append(token)
    text: list[int] = []
    for token in inputs[:-1].tolist():
        text += said[token] if token >= WORDS else [token]
    return text


@pytest.mark.parametrize("context", [2, 3, 7, 20, 64, 256, 512])
def test_every_window_has_the_same_share_and_number_of_stretches(context: int) -> None:
    corruption = Corruption(context, WORDS)
    generator = np.random.default_rng(0)
    for _ in range(50):
        mask = corruption.mask(generator)
        assert mask.shape == (context,)
        assert mask.sum() == corruption.noise
        assert len(lengths(mask, True)) == len(lengths(mask, False)) == corruption.spans
        assert not mask[0]
    # Rounded, and at least one.
    assert abs(corruption.noise - max(1, NOISE * context)) <= 0.5
    assert abs(corruption.spans - max(1, corruption.noise / MEAN_SPAN)) <= 0.5


def test_stretches_vary_in_length_and_place() -> None:
    corruption = Corruption(256, WORDS)
    generator = np.random.default_rng(1)
    masks = np.stack([corruption.mask(generator) for _ in range(2000)])
    found = np.concatenate([lengths(mask, True) for mask in masks[:200]])
    # 38 tokens in 13 parts, all ways alike: a part is 1 with probability 12 / 37.
    assert np.mean(found == 1) == pytest.approx(12 / 37, abs=0.04)
    assert found.max() > 8
    # In the middle every token is cut out as often; its spread over 2000 masks is 0.008.
    middle = masks[:, 64:192].mean(axis=0)
    assert np.abs(middle - NOISE).max() < 0.045


@pytest.mark.parametrize("context", [2, 3, 20, 256])
def test_input_and_target_give_the_text_back(context: int) -> None:
    corruption = Corruption(context, WORDS)
    generator = np.random.default_rng(2)
    for _ in range(20):
        text = generator.integers(0, WORDS, context)
        inputs, target = corruption.apply(text, corruption.mask(generator))
        assert restored(inputs, target) == text.tolist()
        sentinels = list(range(WORDS, WORDS + corruption.spans))
        for part in (inputs, target):
            assert [t for t in part[:-1].tolist() if t >= WORDS] == sentinels
            assert part[-1] == corruption.end == WORDS + corruption.spans
        assert len(inputs) == corruption.input_length
        assert len(target) == corruption.target_length
    assert corruption.all_tokens == corruption.start + 1 == corruption.end + 2


def test_what_is_cut_out_depends_on_the_seed_and_the_place_alone() -> None:
    text = np.arange(2000, dtype=np.int32) % WORDS
    windows = Windows(text, np.array([0, 0, 500]), 64)
    first, again, other = (Corrupted(windows, WORDS, seed) for seed in (3, 3, 4))
    assert len(first) == 3
    for i in (2, 0, 1):
        for name in ("input_ids", "labels"):
            assert (first[i][name] == again[i][name]).all()
    assert not (first[0]["labels"] == first[1]["labels"]).all()
    assert not (first[0]["labels"] == other[0]["labels"]).all()
