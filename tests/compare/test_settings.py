from dataclasses import replace
from typing import Any

import pytest

from gatedffn.compare.settings import PRESETS, Run, Setting, make_setting, run_key
from gatedffn.errors import SettingError, UnknownVariant
from gatedffn.variants import PAPER

HERE = {"data": "d", "version": "1", "processes": 1, "gpu": False}
RUN = Run(variant="relu", seed=0, learning_rate=1e-3)


def test_quick_compares_the_papers_eight_with_several_seeds() -> None:
    quick = PRESETS["quick"]
    assert quick.variants == PAPER
    assert len(quick.variants) == 8
    assert quick.seeds >= 2
    assert not quick.tuned


def test_longer_presets_tune_the_rate_on_a_separate_part() -> None:
    for name in ("standard", "large"):
        assert PRESETS[name].tuned
        assert PRESETS[name].checkpoint_every


def test_names_are_looked_up_and_counted_once() -> None:
    setting = make_setting("quick", "decoder", variants=("SwiGLU", "silu_glu", "ReLU"))
    assert setting.variants == ("swiglu", "relu")


def test_the_baseline_falls_back_only_when_it_was_not_asked_for() -> None:
    assert make_setting("quick", "decoder", variants=("glu", "gtu")).baseline == "glu"
    with pytest.raises(SettingError, match="baseline tanh is not among"):
        make_setting("quick", "decoder", baseline="tanh")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"checkpoint_every": -3}, "checkpoint_every is -3"),
        ({"context": 1}, "context is 1"),
        ({"heads": 5}, "must be a multiple of 10"),
        ({"learning_rates": (3.0,)}, r"each must be in \(0, 1\)"),
        ({"learning_rates": (float("nan"),)}, r"each must be in \(0, 1\)"),
        ({"init": "big"}, "init is 'big'"),
        ({"init": "nan"}, "init is 'nan'"),
        ({"tokenizer": "bpe"}, "tokenizer is 'bpe'"),
        ({"tokenizer": "bpe:7"}, "257 to 1000000"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make_setting("quick", "decoder", **changes)


def test_a_rate_given_twice_is_one_rate() -> None:
    setting = make_setting("quick", "decoder", learning_rates=(1e-3, 0.001, 2e-3))
    assert setting.learning_rates == (1e-3, 2e-3)
    assert setting.tuned


def test_what_a_model_does_not_have_is_refused() -> None:
    with pytest.raises(SettingError, match="use --model gated-conv"):
        make_setting("quick", "decoder", variants=("lstm",))
    with pytest.raises(SettingError, match="heads: the gated-conv model"):
        make_setting("quick", "gated-conv", heads=2)


def test_unknown_names() -> None:
    with pytest.raises(SettingError, match="quick, hour, standard, large"):
        make_setting("fast", "decoder")
    with pytest.raises(SettingError, match="decoder, gated-conv, moe, t5"):
        make_setting("quick", "lstm")
    with pytest.raises(UnknownVariant, match="swiglu"):
        make_setting("quick", "decoder", variants=("swigul",))


@pytest.mark.parametrize(
    "changes",
    [{"seeds": 9}, {"variants": ("relu",)}, {"learning_rates": (1.0e-4,)}, {"checkpoint_every": 7}],
)
def test_a_wider_comparison_keeps_its_runs(tiny: Setting, changes: dict[str, Any]) -> None:
    assert run_key(tiny, RUN, HERE) == run_key(replace(tiny, **changes), RUN, HERE)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 13},
        {"d_model": 64},
        {"init": "0.02"},
        {"multiple_of": 4},
        {"tokenizer": "bpe:300"},
        {"held_out_tokens": 960},
        {"warmup": 0.2},
    ],
)
def test_what_changes_the_numbers_changes_the_run(tiny: Setting, changes: dict[str, Any]) -> None:
    assert run_key(tiny, RUN, HERE) != run_key(replace(tiny, **changes), RUN, HERE)


def test_runs_data_versions_and_processes_are_told_apart(tiny: Setting) -> None:
    keys = [
        run_key(tiny, RUN, HERE),
        *(run_key(tiny, RUN, {**HERE, name: "other"}) for name in HERE),
        run_key(tiny, replace(RUN, seed=1), HERE),
        run_key(tiny, replace(RUN, variant="glu"), HERE),
        run_key(tiny, replace(RUN, learning_rate=2e-3), HERE),
    ]
    assert len(set(keys)) == len(keys)
