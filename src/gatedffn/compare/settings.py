"""What a comparison is: its setting, the presets, and which numbers depend on it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from gatedffn.errors import SettingError
from gatedffn.sizing import DEFAULT_MULTIPLE
from gatedffn.variants import PAPER, VARIANTS, get_variant

ModelName = Literal["decoder", "gated-conv", "moe", "t5"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
OPTIMIZERS: Mapping[str, str] = MappingProxyType({"adamw": "AdamW", "adafactor": "Adafactor"})
"""The optimisers as options and as the report calls them."""
LSTM = "lstm"
CONVOLUTION_ARMS = ("glu", "gtu", "bilinear", "relu", "tanh", LSTM)
"""What Dauphin et al. 2016 compare: gates, activations without one, and the LSTM."""

OF_MIXTURES = ("experts", "top_k", "balance")
LACKS: Mapping[ModelName, tuple[str, ...]] = MappingProxyType(
    {
        "decoder": OF_MIXTURES,
        "gated-conv": ("heads", "multiple_of", *OF_MIXTURES),
        "moe": (),
        "t5": OF_MIXTURES,
    }
)
"""Which fields a model has no use for: an option that names one is refused."""

MEASURED_AT_ONCE = 32
"""Sequences that a loss is measured on at a time, where a batch of training has fewer."""
LARGEST_MISMATCH = 0.01
"""Variants whose parameters differ by more than this are not ranked unless one insists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that is the same for all variants of a comparison.

    `context` is in tokens, `batch` in sequences a step, `warmup` a fraction of the steps,
    `selection_tokens` and `held_out_tokens` the parts of the data that losses are measured on.
    `config` is the JSON of a Hugging Face model that stands for the decoder, if there is one.
    `balance` is the factor of the loss that keeps the loads of experts alike.
    """

    model: ModelName = "decoder"
    config: str = ""
    d_model: int
    layers: int
    heads: int = 4
    context: int
    batch: int
    steps: int
    seeds: int
    first_seed: int = 0
    learning_rates: tuple[float, ...]
    variants: tuple[str, ...] = PAPER
    baseline: str = "relu"
    tokenizer: str = "bytes"
    init: str = "fan_in"
    optimizer: str = "adamw"
    multiple_of: int = DEFAULT_MULTIPLE
    kernel_size: int = 4
    experts: int = 8
    top_k: int = 2
    balance: float = 0.01
    warmup: float = 0.1
    evaluations: int = 5
    selection_tokens: int
    held_out_tokens: int
    checkpoint_every: int = 0
    allow_mismatch: bool = False
    needs: str = ""

    @property
    def tokens_per_step(self) -> int:
        return self.context * self.batch

    @property
    def has_experts(self) -> bool:
        """Whether a mixture of experts is in the place of each feed-forward."""
        return self.model == "moe"

    @property
    def tuned(self) -> bool:
        """Whether the learning rate is chosen among several, alike for every variant."""
        return len(self.learning_rates) > 1


PRESETS: Mapping[str, Setting] = MappingProxyType(
    {
        "quick": Setting(
            d_model=128,
            layers=2,
            context=128,
            batch=8,
            steps=450,
            seeds=4,
            learning_rates=(3e-3,),
            multiple_of=1,
            selection_tokens=16_384,
            held_out_tokens=65_536,
            needs="two cores, seven to eight minutes",
        ),
        "hour": Setting(
            d_model=128,
            layers=3,
            context=256,
            batch=8,
            steps=600,
            seeds=4,
            learning_rates=(3e-3,),
            multiple_of=1,
            selection_tokens=65_536,
            held_out_tokens=262_144,
            needs="two cores, an hour",
        ),
        "standard": Setting(
            d_model=384,
            layers=6,
            heads=6,
            context=512,
            batch=16,
            steps=2_000,
            seeds=5,
            learning_rates=(1e-3, 2e-3, 4e-3),
            selection_tokens=131_072,
            held_out_tokens=524_288,
            evaluations=10,
            checkpoint_every=250,
            needs="a GPU for an evening, or eight cores for some days",
        ),
        "large": Setting(
            d_model=768,
            layers=12,
            heads=12,
            context=1024,
            batch=64,
            steps=20_000,
            seeds=5,
            learning_rates=(3e-4, 6e-4, 1.2e-3),
            tokenizer="bpe:8192",
            selection_tokens=524_288,
            held_out_tokens=2_097_152,
            evaluations=20,
            checkpoint_every=1_000,
            needs="a GPU with 40 GB for some weeks, or several under torchrun; a gigabyte of text",
        ),
    }
)


SPREADS: Mapping[str, Mapping[tuple[str, str], float]] = MappingProxyType(
    {
        "quick": {
            ("gated", "gated"): 0.010,
            ("gated", "not gated"): 0.015,
            ("not gated", "not gated"): 0.018,
        }
    }
)
"""For a preset, by the two kinds, the standard deviation over seeds of the difference between two
variants, in nats a token: measured in the studies that docs/compare.md lists."""


def make_setting(preset: str, model: str, **changes: Any) -> Setting:
    """A preset with some fields changed, checked as a whole; None leaves a field as it is.

    Raises:
        SettingError: an unknown preset or model, or values that do not fit together.
        UnknownVariant: a variant that the table does not have.
    """
    if preset not in PRESETS:
        raise SettingError(f"no preset is called {preset!r}: choose from {', '.join(PRESETS)}")
    if model not in MODELS:
        raise SettingError(f"no model is called {model!r}: choose from {', '.join(MODELS)}")
    changes = {name: value for name, value in changes.items() if value not in (None, (), [])}
    setting = replace(PRESETS[preset], model=model)
    if model == "gated-conv":
        setting = replace(setting, variants=CONVOLUTION_ARMS)
    ignored = [name for name in LACKS[setting.model] if name in changes]
    if ignored:
        raise SettingError(f"{' and '.join(ignored)}: the {model} model has no such thing")
    if "config" in changes and model != "decoder":
        raise SettingError(f"config: it makes a decoder, and the model is {model}: leave one out")
    setting = replace(setting, **changes)
    setting = replace(setting, learning_rates=tuple(dict.fromkeys(setting.learning_rates)))
    arms = arm_names(setting.variants, setting.model)
    (baseline,) = arm_names([setting.baseline], setting.model)
    if baseline not in arms:
        if "baseline" in changes:
            raise SettingError(f"the baseline {baseline} is not among {', '.join(arms)}")
        baseline = arms[0]
    setting = replace(setting, variants=arms, baseline=baseline)
    if setting != PRESETS[preset]:
        setting = replace(setting, needs="")  # which is said of the preset as it is
    _check(setting)
    return setting


def arm_names(given: Sequence[str], model: ModelName) -> tuple[str, ...]:
    """The arms that are meant by what was given, each once.

    Raises:
        UnknownVariant: a variant that the table does not have.
        SettingError: the LSTM, in another model than the convolutions.
    """
    return tuple(dict.fromkeys(_arm(name, model) for name in given))


def _arm(name: str, model: ModelName) -> str:
    if name.casefold() == LSTM:
        if model != "gated-conv":
            raise SettingError("the LSTM is compared with convolutions: use --model gated-conv")
        return LSTM
    return get_variant(name).name


def _check(setting: Setting) -> None:
    for name in (
        "d_model",
        "layers",
        "heads",
        "context",
        "batch",
        "steps",
        "seeds",
        "multiple_of",
        "kernel_size",
        "experts",
        "top_k",
        "evaluations",
        "selection_tokens",
        "held_out_tokens",
    ):
        if getattr(setting, name) < 1:
            raise SettingError(f"{name} is {getattr(setting, name)}: it must be at least 1")
    if setting.first_seed < 0:
        raise SettingError(f"first_seed is {setting.first_seed}: it must be at least 0")
    if setting.checkpoint_every < 0:
        raise SettingError(
            f"checkpoint_every is {setting.checkpoint_every}: it must be 0 for none, or above"
        )
    if setting.context < 2:
        raise SettingError("context is 1: the next token cannot be predicted from nothing")
    if setting.top_k > setting.experts:
        raise SettingError(
            f"top_k is {setting.top_k} and experts {setting.experts}: a token goes through no more "
            "experts than there are"
        )
    if not 0 <= setting.balance < math.inf:
        raise SettingError(f"balance is {setting.balance}: it must be 0 for none, or above")
    llama = setting.model in ("decoder", "moe") and not setting.config
    if llama and setting.d_model % (2 * setting.heads):
        raise SettingError(
            f"d_model is {setting.d_model} and heads {setting.heads}: d_model must be a multiple "
            f"of {2 * setting.heads}, twice the heads"
        )
    if setting.model == "t5" and setting.d_model % setting.heads:
        raise SettingError(
            f"d_model is {setting.d_model} and heads {setting.heads}: d_model must be a multiple "
            "of the heads"
        )
    if setting.optimizer not in OPTIMIZERS:
        raise SettingError(
            f"no optimizer is called {setting.optimizer!r}: choose from {', '.join(OPTIMIZERS)}"
        )
    if not all(0 < rate < 1 for rate in setting.learning_rates):
        raise SettingError(f"learning rates {setting.learning_rates}: each must be in (0, 1)")
    if setting.init != "fan_in":
        try:
            spread = float(setting.init)
        except ValueError:
            spread = 0.0
        if not 0 < spread < 10:
            raise SettingError(
                f"init is {setting.init!r}: it must be fan_in, or a standard deviation such as 0.02"
            )
    if setting.tokenizer != "bytes":
        kind, _, size = setting.tokenizer.partition(":")
        if kind != "bpe" or not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
            raise SettingError(
                f"tokenizer is {setting.tokenizer!r}: it must be bytes, or bpe:SIZE with a size "
                "of 257 to 1000000"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run of a comparison."""

    variant: str
    seed: int
    learning_rate: float


SCALES = ("d_model", "steps")
"""What a comparison may be studied at several values of."""

# What changes which runs there are, how often they are saved, or how they are reported, but not
# what one run computes. A comparison that is widened keeps its finished runs.
NOT_OF_A_RUN = {
    "seeds",
    "first_seed",
    "learning_rates",
    "variants",
    "baseline",
    "checkpoint_every",
    "allow_mismatch",
    "needs",
}


def of_a_run(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a setting's fields those that one run's numbers depend on."""
    # A field that the model lacks was none when older runs were made.
    mixture = fields["model"] == "moe"
    left = NOT_OF_A_RUN if mixture else {*NOT_OF_A_RUN, *OF_MIXTURES}
    return {name: value for name, value in fields.items() if name not in left}


def run_key(setting: Setting, run: Run, surroundings: Mapping[str, object]) -> str:
    """A name for everything that a run's numbers depend on; equal keys are the same run.

    Args:
        setting: the comparison.
        run: which of its runs.
        surroundings: what else matters: data, version, processes, device.
    """
    facts = {**of_a_run(asdict(setting)), **asdict(run), **surroundings}
    row = VARIANTS.get(run.variant)
    if row is not None and row.digest is not None:
        facts["definition"] = row.digest  # of a user's functions, whose name says nothing
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
