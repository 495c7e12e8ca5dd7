"""What a run learns and is measured on: the next token, or what was cut out."""

from typing import Any, NamedTuple

from torch.utils.data import Dataset

from gatedffn.compare.corruption import Corrupted
from gatedffn.compare.data import Tokens, measuring_windows, training_windows
from gatedffn.compare.settings import Setting


class Task(NamedTuple):
    """The windows of a run, in their order."""

    train: Dataset[Any]
    selection: Dataset[Any]
    held_out: Dataset[Any]


def task_of(setting: Setting, tokens: Tokens, seed: int) -> Task:
    """The windows that a run with that seed trains on, and those that every run is measured on."""
    count = setting.steps * setting.batch
    train = training_windows(tokens, setting.context, count, seed)
    selection = measuring_windows(tokens.selection, setting.context, setting.selection_tokens)
    held_out = measuring_windows(tokens.held_out, setting.context, setting.held_out_tokens)
    if setting.model != "t5":
        return Task(train, selection, held_out)
    return Task(
        Corrupted(train, tokens.vocabulary, seed),
        Corrupted(selection, tokens.vocabulary, 0),
        Corrupted(held_out, tokens.vocabulary, 0),
    )
