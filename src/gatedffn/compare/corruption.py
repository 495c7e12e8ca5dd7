"""Span corruption, the task of T5: stretches of the text are cut out, and the model gives them.

In the input a sentinel stands for each stretch; the target has each sentinel and what it stands
for. Raffel et al. 2019 (arXiv 1910.10683), section 3.1.4, with the numbers of Shazeer 2020.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gatedffn.compare.data import Windows

NOISE = 0.15
"""The share of the tokens that is cut out."""
MEAN_SPAN = 3.0
"""The mean length of a stretch in tokens."""

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Corruption:
    """The sizes and the extra vocabulary of corrupted windows.

    A window has `context` tokens below `vocabulary`, which is where the sentinels begin. All
    windows have the same number of stretches, so inputs and targets need no padding.
    """

    context: int
    vocabulary: int

    @property
    def noise(self) -> int:
        """The tokens that are cut out."""
        return min(max(round(self.context * NOISE), 1), self.context - 1)

    @property
    def spans(self) -> int:
        """The stretches that are cut out, and so the sentinels."""
        return max(1, round(self.noise / MEAN_SPAN))

    @property
    def end(self) -> int:
        """The token that ends inputs and targets."""
        return self.vocabulary + self.spans

    @property
    def start(self) -> int:
        """The token that the decoder begins with."""
        return self.end + 1

    @property
    def all_tokens(self) -> int:
        """The vocabulary with the sentinels, the end and the start."""
        return self.start + 1

    @property
    def input_length(self) -> int:
        """Tokens of an input, its end included."""
        return self.context - self.noise + self.spans + 1

    @property
    def target_length(self) -> int:
        """Tokens of a target, its end included."""
        return self.noise + self.spans + 1

    def mask(self, generator: np.random.Generator) -> Mask:
        """Which tokens of a window are cut out: every other stretch, the first one stays."""
        kept = _parts(self.context - self.noise, self.spans, generator)
        cut = _parts(self.noise, self.spans, generator)
        lengths = np.stack([kept, cut], axis=1).reshape(-1)
        return np.repeat(np.arange(2 * self.spans) % 2 == 1, lengths)

    def apply(self, tokens: Ids, mask: Mask) -> tuple[Ids, Ids]:
        """The input and the target of a window."""
        return self._with_sentinels(tokens, mask), self._with_sentinels(tokens, ~mask)

    def _with_sentinels(self, tokens: Ids, left_out: Mask) -> Ids:
        """The tokens with one sentinel in place of each stretch that is left out, then the end."""
        first = left_out & ~np.concatenate([[False], left_out[:-1]])
        marked = np.where(first, self.vocabulary - 1 + np.cumsum(first), tokens)
        return np.append(marked[first | ~left_out], self.end)


def _parts(total: int, count: int, generator: np.random.Generator) -> Ids:
    """Lengths of `count` parts, none empty, that make up `total`; every choice is as likely."""
    cuts = 1 + np.sort(generator.choice(total - 1, count - 1, replace=False))
    return np.diff(cuts, prepend=0, append=total)


class Corrupted(Dataset[dict[str, Tensor]]):
    """Windows with stretches cut out, as the seed and the place in the order say."""

    def __init__(self, windows: Windows, vocabulary: int, seed: int) -> None:
        self.windows, self.seed = windows, seed
        self.corruption = Corruption(windows.context, vocabulary)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = self.corruption.mask(np.random.default_rng((self.seed, index)))
        inputs, target = self.corruption.apply(self.windows[index]["input_ids"].numpy(), mask)
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(target)}
