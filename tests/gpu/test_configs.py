"""Which configuration a call of a fused kernel takes: searched, raced, or the first that runs."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar, get_args

import pytest
import torch

from gatedffn.ops import gpu, measure
from gatedffn.ops.feed_forward.gpu import configs, few
from gatedffn.ops.feed_forward.gpu.configs import Config, Fit, chosen, pick

X = torch.empty(8, 8, dtype=torch.bfloat16)
OF = (8192, 14336)


@pytest.fixture(autouse=True)
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A chip that compiles and has not been searched, and no choice kept."""
    monkeypatch.setenv("GATEDFFN_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    monkeypatch.setattr(gpu, "capturing", lambda: False)
    monkeypatch.setattr(gpu, "level", lambda _: "a chip")
    monkeypatch.setattr(configs, "chip_of", lambda _: "sm_90")
    monkeypatch.setattr(measure, "_switched_off", lambda: False)
    for cached in (configs.candidates, measure._file):
        cached.cache_clear()
    made = dict(measure._made)
    measure.forget()
    yield
    measure.forget()
    measure._made.update(made)
    measure._file.cache_clear()
    configs.candidates.cache_clear()


Cut = TypeVar("Cut")


class Chip(Generic[Cut]):
    """Runs all but some configurations, one of them faster than all others."""

    def __init__(self, fastest: Cut, *failing: Cut) -> None:
        self.fastest, self.failing = fastest, failing
        self.ran: list[Cut] = []
        self.threads: set[str] = set()

    def __call__(self, config: Cut) -> None:
        self.ran.append(config)
        self.threads.add(threading.current_thread().name)
        if config in self.failing:
            raise RuntimeError("out of resource: shared memory")
        threading.Event().wait(0.0005 if config == self.fastest else 0.005)


def take(chip: Chip[Config], allowed: configs.Operands = "joined") -> Config:
    return chosen("hidden_values", None, allowed, X, OF, chip)


RULE = pick("hidden_values", "sm_90", "half", *OF)
OTHER = pick("hidden_values", "other", "half", *OF)


def test_candidates_are_few_and_the_rule_is_the_first() -> None:
    for kernel in get_args(configs.Kernel):
        for name in get_args(configs.Chip):
            for allowed in configs.RANKS:
                among = configs.candidates(kernel, name, "half", allowed, *OF)
                assert 2 <= len(set(among)) == len(among) <= 4
                assert all(configs.RANKS[c.operands] <= configs.RANKS[allowed] for c in among)
    assert configs.candidates("hidden_values", "sm_90", "half", "joined", *OF)[0] == RULE


def test_the_fastest_is_taken_compiled_at_once_and_kept() -> None:
    chip = Chip(OTHER)
    assert take(chip) == OTHER
    first = chip.ran[: len(set(chip.ran))]
    assert len(set(first)) == len(first) == 4
    assert len(chip.threads) > 1
    ran = len(chip.ran)
    assert take(chip) == OTHER
    measure.forget()  # as a later process does
    assert take(chip) == OTHER
    assert len(chip.ran) == ran


def test_a_class_has_its_own_choice() -> None:
    take(Chip(OTHER))
    chip = Chip(RULE)
    assert chosen("hidden_values", None, "joined", X, (4096, 9999), chip) == OTHER
    assert not chip.ran
    chosen("hidden_values", None, "joined", X, (64, 9999), chip)
    assert chip.ran


def test_one_that_fails_is_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert take(Chip(OTHER, RULE)) == OTHER
    assert "is out, it failed with: out of resource: shared memory" in caplog.text


def test_where_all_fail_the_error_is_raised() -> None:
    among = configs.candidates("hidden_values", "sm_90", "half", "joined", *OF)
    with pytest.raises(RuntimeError, match="out of resource"):
        take(Chip(RULE, *among))


def test_by_rule_the_first_that_runs_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with measure.by_rule():
        chip = Chip(OTHER)
        assert take(chip) == take(chip) == RULE
        assert chip.ran == [RULE]
        measure.forget()
        with caplog.at_level(logging.WARNING):
            assert take(Chip(OTHER, RULE)) not in (RULE, OTHER)
        assert "is out" in caplog.text


def test_nothing_runs_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    chip = Chip(OTHER)
    assert take(chip) == RULE
    assert not chip.ran


def test_what_a_search_has_found_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    best = replace(RULE, group=4)
    fit = Fit("hidden_values", "sm_90", "half", None, None, best)
    monkeypatch.setattr(configs, "SEARCHED", (fit,))
    chip = Chip(OTHER)
    assert take(chip) == best
    assert take(chip, "descriptors") == replace(best, operands="descriptors")
    assert not chip.ran
    chosen("branch_gradients", None, "joined", X, OF, chip)
    assert chip.ran


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_the_cut_for_few_tokens_is_raced_too(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "_cuts", {})
    monkeypatch.setattr(few, "chip", lambda _: "sm_90")
    rule, *others = few.candidates("sm_90", (few._padded(tokens), True)).values()
    assert rule == few.CUTS["sm_90"][few._padded(tokens), True]
    assert 1 <= len(others) <= 3
    x, chip = torch.empty(tokens, 64, dtype=torch.bfloat16), Chip(others[-1])
    assert few._cut(x, 128, True, chip) == others[-1]
    ran = len(chip.ran)
    assert few._cut(x, 128, True, chip) == others[-1]
    assert len(chip.ran) == ran
    monkeypatch.setattr(gpu, "capturing", lambda: True)
    assert few._cut(x, 256, True, chip) == rule
    monkeypatch.setattr(gpu, "capturing", lambda: False)
    assert few._cut(x, 256, True, chip) == others[-1]  # what was taken meanwhile is not kept
