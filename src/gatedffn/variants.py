"""The table: one row a variant, facts only. Everything else iterates it.

A row says `h = phi(gate) * psi(up)` (gated) or `h = phi(up)` (not gated) by naming the scalar
functions of `gatedffn.activations`. To add a variant, add a row, and a scalar function if it
needs a new one; the tests that then fail are what is left to do.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from gatedffn.errors import ParameterError, UnknownVariant

LARGEST = 3.4028234663852886e38
"""Of float32, the numbers that parameters meet: a larger one is infinite there."""
Granularity = Literal["layer", "unit"]
Entry = TypeVar("Entry")


class Table(Mapping[str, Entry], Generic[Entry]):
    """A mapping that cannot be changed. It lists the library's own entries; by name it also finds
    those that users made in this process.

    `types.MappingProxyType` is one, but `torch.compile` gives up on it in a model that changes
    any dictionary before it gets there.

    >>> Table({"one": 1})["one"]
    1
    """

    __slots__ = ("_entries", "_listed")

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        self._listed = tuple(entries)

    def made(self) -> list[str]:
        """The names of users' entries, in the order they were made."""
        return list(self._entries)[len(self._listed) :]

    def _hold(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A number in a variant's formula.

    `learnable` parameters may be tensors and get gradients; the others are numbers. `above` is an
    open lower bound, `below` an open upper one; a learned parameter is kept above its bound.
    Infinity is a value only where `unbounded` says so.
    """

    name: str
    default: float
    meaning: str
    learnable: bool = False
    above: float | None = None
    below: float | None = None
    unbounded: bool = False

    def check(self, variant: str, value: object) -> None:
        """Raises unless a value is a number that it takes.

        Raises:
            ParameterError: it is not; the message names the variant.
        """
        where = f"{self.name} of {variant!r}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ParameterError(f"{where} is {value!r}: it must be a number")
        if value != value:
            raise ParameterError(f"{where} is NaN")
        if abs(value) > LARGEST and not (self.unbounded and value == math.inf):
            raise ParameterError(f"{where} must be finite, in the range of float32")
        if self.above is not None and value <= self.above:
            raise ParameterError(f"{where} is {value}: it must be above {self.above}")
        if self.below is not None and value >= self.below:
            raise ParameterError(f"{where} is {value}: it must be below {self.below}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: how the hidden values of a feed-forward layer are computed, and where from.

    `phi` is the scalar function of the gate; `psi` that of the up branch, None when not gated.
    `learned` is the granularity at which the source learns the parameters: one per layer, one per
    hidden unit, or None where it does not.
    """

    name: str
    label: str
    phi: str
    psi: str | None
    formula: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    learned: Granularity | None = None
    aliases: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        root, colon, values = self.name.partition(":")
        if colon:
            return _with_values, (VARIANTS[root], values)
        return self._reduced()

    def _reduced(self) -> tuple[Any, ...]:
        if VARIANTS.get(self.name) is self and self.name in list(VARIANTS):
            return get_variant, (self.name,)
        return _restored, ({f.name: getattr(self, f.name) for f in fields(self)},)

    @property
    def digest(self) -> str | None:
        """What tells a row that says in another program something else; None of facts alone."""
        return None

    @property
    def told(self) -> tuple[str, dict[str, float]]:
        """The name without the numbers behind it, and these."""
        root, _, values = self.name.partition(":")
        names = [part.partition("=")[0] for part in values.split(",") if part]
        return root, {name: self.defaults[name] for name in names}

    @property
    def gated(self) -> bool:
        """Whether there is a gate and an up branch; `psi` decides it, nowhere else."""
        return self.psi is not None

    @property
    def projections(self) -> tuple[str, ...]:
        """The matrices that map d_model to d_hidden, in the order they are initialised."""
        return ("gate_proj", "up_proj") if self.gated else ("up_proj",)

    @property
    def defaults(self) -> dict[str, float]:
        """The value of every parameter unless told otherwise, in the order of the formula."""
        return {parameter.name: parameter.default for parameter in self.parameters}


SHAZEER = "Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202)"
RAMACHANDRAN = "Ramachandran et al. 2017, Searching for Activation Functions (arXiv 1710.05941)"
HENDRYCKS = "Hendrycks and Gimpel 2016, Gaussian Error Linear Units (arXiv 1606.08415)"
DAUPHIN = "Dauphin et al. 2016, Gated Convolutional Networks (arXiv 1612.08083)"
PRIMER = "So et al. 2021, Primer (arXiv 2109.08668)"
XIELU = "Huang and Schlag 2024, Deriving Activation Functions (arXiv 2411.13010)"
EXPANDED = "Huang 2024, Expanded Gating Ranges (arXiv 2405.20768)"
MISRA = "Misra 2019, Mish (arXiv 1908.08681), eq. 1"
HOWARD = "Howard et al. 2019, MobileNetV3 (arXiv 1905.02244), section 5.2"


def _beta(default: float = 1.0) -> Parameter:
    return Parameter(
        name="beta", default=default, learnable=True, meaning="sharpness of the sigmoid"
    )


def _limit(default: float) -> Parameter:
    return Parameter(
        name="limit",
        default=default,
        above=0.0,
        unbounded=True,
        meaning="largest gate, and largest |up|; math.inf for none",
    )


_PRELU_SLOPE = Parameter(
    name="slope", default=0.25, learnable=True, meaning="slope for negative inputs"
)
_EXPANSION = Parameter(
    name="alpha",
    default=0.0,
    learnable=True,
    meaning="how far the gate's range grows beyond [0, 1]; 0 is the variant it expands",
)

_ROWS = (
    Variant(
        name="relu",
        label="ReLU",
        phi="relu",
        psi=None,
        formula="max(0, u)",
        source="Vaswani et al. 2017 (arXiv 1706.03762), eq. 2; " + SHAZEER + ", eq. 1",
    ),
    Variant(
        name="gelu",
        label="GELU",
        phi="gelu",
        psi=None,
        formula="u Phi(u)",
        source=HENDRYCKS + ", section 2; " + SHAZEER + ", eq. 3",
        aliases=("gelu_erf", "gelu_python", "gelu_exact"),
    ),
    Variant(
        name="gelu_tanh",
        label="GELU (tanh)",
        phi="gelu_tanh",
        psi=None,
        formula="u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))",
        source=HENDRYCKS + ", section 2",
        aliases=("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_approximate", "approx_gelu"),
    ),
    Variant(
        name="swish",
        label="Swish",
        phi="swish",
        psi=None,
        formula="u sigmoid(beta u)",
        source=RAMACHANDRAN + ", section 4; " + SHAZEER + ", eq. 3",
        parameters=(_beta(),),
        aliases=("silu", "SiL", "swish1"),
    ),
    Variant(
        name="relu2",
        label="ReLU²",
        phi="relu2",
        psi=None,
        formula="max(0, u)^2",
        source=PRIMER,
        aliases=("relu_squared", "squared_relu", "sq_relu", "relu^2"),
    ),
    Variant(
        name="leaky_relu",
        label="LeakyReLU",
        phi="leaky_relu",
        psi=None,
        formula="u if u > 0 else slope u",
        source=RAMACHANDRAN + ", section 5",
        parameters=(
            Parameter(name="slope", default=0.01, meaning="slope for negative inputs, fixed"),
        ),
        aliases=("lrelu",),
    ),
    Variant(
        name="prelu",
        label="PReLU",
        phi="leaky_relu",
        psi=None,
        formula="u if u > 0 else slope u, slope learned",
        source=RAMACHANDRAN + ", section 5",
        parameters=(_PRELU_SLOPE,),
        learned="unit",
        aliases=("parametric_relu",),
    ),
    Variant(
        name="softplus",
        label="Softplus",
        phi="softplus",
        psi=None,
        formula="log(1 + e^u)",
        source=RAMACHANDRAN + ", section 5",
    ),
    Variant(
        name="elu",
        label="ELU",
        phi="elu",
        psi=None,
        formula="u if u > 0 else alpha (e^u - 1)",
        source=RAMACHANDRAN + ", section 5",
        parameters=(
            Parameter(name="alpha", default=1.0, meaning="minus the limit for negative inputs"),
        ),
    ),
    Variant(
        name="selu",
        label="SELU",
        phi="selu",
        psi=None,
        formula="1.05070099 (u if u > 0 else 1.67326324 (e^u - 1))",
        source=RAMACHANDRAN + ", section 5",
    ),
    Variant(
        name="quick_gelu",
        label="quick GELU",
        phi="swish",
        psi=None,
        formula="u sigmoid(beta u), beta = 1.702",
        source=HENDRYCKS + ", section 2",
        parameters=(_beta(1.702),),
        aliases=("gelu_quick", "quickgelu", "gelu_sigmoid"),
    ),
    Variant(
        name="sigmoid",
        label="Sigmoid",
        phi="sigmoid",
        psi=None,
        formula="1 / (1 + e^-u)",
        source="Narang et al. 2021 (arXiv 2102.11972), table 1",
        aliases=("logistic",),
    ),
    Variant(
        name="tanh",
        label="Tanh",
        phi="tanh",
        psi=None,
        formula="tanh(u)",
        source=DAUPHIN + ", section 5",
    ),
    Variant(
        name="xielu",
        label="xIELU",
        phi="xielu",
        psi=None,
        formula="alpha_p u^2 + u/2 if u > 0 else alpha_n (e^u - 1 - u) + u/2",
        source=XIELU,
        parameters=(
            Parameter(
                name="alpha_p",
                default=0.8,
                learnable=True,
                above=0.0,
                meaning="curvature for positive inputs",
            ),
            Parameter(
                name="alpha_n",
                default=0.8,
                learnable=True,
                above=0.5,
                meaning="strength of the negative part",
            ),
        ),
        learned="layer",
    ),
    Variant(
        name="mish",
        label="Mish",
        phi="mish",
        psi=None,
        formula="u tanh(log(1 + e^u))",
        source=MISRA,
    ),
    Variant(
        name="hard_swish",
        label="hard Swish",
        phi="hard_swish",
        psi=None,
        formula="u min(max(0, u + 3), 6) / 6",
        source=HOWARD,
        aliases=("h_swish", "hard_silu"),
    ),
    Variant(
        name="glu",
        label="GLU",
        phi="sigmoid",
        psi="identity",
        formula="sigmoid(g) * u",
        source=DAUPHIN + ", eq. 1; " + SHAZEER + ", eq. 4",
        aliases=("sigmoid_glu", "siglu", "gated-sigmoid"),
    ),
    Variant(
        name="bilinear",
        label="Bilinear",
        phi="identity",
        psi="identity",
        formula="g * u",
        source="Mnih and Hinton 2007; " + SHAZEER + ", eq. 4",
        aliases=("liglu", "linear_glu", "gated-linear"),
    ),
    Variant(
        name="reglu",
        label="ReGLU",
        phi="relu",
        psi="identity",
        formula="max(0, g) * u",
        source=SHAZEER + ", eq. 5",
        aliases=("relu_glu", "gated-relu"),
    ),
    Variant(
        name="geglu",
        label="GEGLU",
        phi="gelu",
        psi="identity",
        formula="g Phi(g) * u",
        source=SHAZEER + ", eq. 5",
        aliases=("gelu_glu", "geglu_erf"),
    ),
    Variant(
        name="geglu_tanh",
        label="GEGLU (tanh)",
        phi="gelu_tanh",
        psi="identity",
        formula="gelu_tanh(g) * u",
        source=SHAZEER + ", eq. 5, as its own code and T5 v1.1 compute it",
        aliases=("gated-gelu", "geglu_new", "geglu_pytorch_tanh"),
    ),
    Variant(
        name="swiglu",
        label="SwiGLU",
        phi="swish",
        psi="identity",
        formula="g sigmoid(beta g) * u",
        source=SHAZEER + ", eq. 5",
        parameters=(_beta(),),
        aliases=("silu_glu", "swish_glu", "gated-silu", "gated-swish"),
    ),
    Variant(
        name="gtu",
        label="GTU",
        phi="sigmoid",
        psi="tanh",
        formula="sigmoid(g) * tanh(u)",
        source=DAUPHIN + ", section 3",
        aliases=("gated_tanh_unit",),
    ),
    Variant(
        name="relu2_glu",
        label="ReLU²-GLU",
        phi="relu2",
        psi="identity",
        formula="max(0, g)^2 * u",
        source="Ma et al. 2025, BitNet b1.58 2B4T (arXiv 2504.12285), section 2",
        aliases=("relu_squared_glu", "squared_relu_glu", "re2glu"),
    ),
    Variant(
        name="quick_geglu",
        label="quick GEGLU",
        phi="swish",
        psi="identity",
        formula="g sigmoid(beta g) * u, beta = 1.702",
        source=HENDRYCKS + ", section 2; " + SHAZEER + ", eq. 5",
        parameters=(_beta(1.702),),
        aliases=("quick_gelu_glu",),
    ),
    Variant(
        name="swiglu_oai",
        label="SwiGLU (gpt-oss)",
        phi="capped_swish",
        psi="clip_plus_one",
        formula="min(g, L) sigmoid(beta min(g, L)) * (clip(u, -L, L) + 1), "
        "beta = 1.702, L = limit = 7",
        source="OpenAI 2025, gpt-oss, reference code of the model",
        parameters=(_beta(1.702), _limit(7.0)),
        aliases=("gpt_oss", "swigluoai", "swiglu_gpt_oss"),
    ),
    Variant(
        name="swiglu_clamp",
        label="SwiGLU (clamped)",
        phi="capped_swish",
        psi="clip",
        formula="min(g, L) sigmoid(beta min(g, L)) * clip(u, -L, L), beta = 1, L = limit = 10",
        source="DeepSeek-V4, as its published inference code computes it",
        parameters=(_beta(), _limit(10.0)),
        aliases=("swiglu_clip", "clamped_swiglu"),
    ),
    Variant(
        name="drelu",
        label="dReLU",
        phi="relu",
        psi="relu",
        formula="max(0, g) * max(0, u)",
        source="Song et al. 2024, TurboSparse (arXiv 2406.05955)",
        aliases=("double_relu",),
    ),
    Variant(
        name="situ_glu",
        label="SiTU-GLU",
        phi="situ",
        psi="soft_cap",
        formula="a tanh(g/a) sigmoid(g) * b tanh(u/b), a = gate_cap = 4, b = up_cap = 25",
        source="Kimi K3 (arXiv 2607.24653), as its published code computes it",
        parameters=(
            Parameter(name="gate_cap", default=4.0, above=0.0, meaning="limit of the gate's tanh"),
            Parameter(name="up_cap", default=25.0, above=0.0, meaning="limit of the up branch"),
        ),
        aliases=("situ",),
    ),
    Variant(
        name="powglu",
        label="PowGLU",
        phi="pow_gate",
        psi="identity",
        formula="g^(m / (sqrt(g) + 1)) sigmoid(g) * u if g > 0 else g sigmoid(g) * u, m = 3",
        source="PowLU (arXiv 2605.25704)",
        parameters=(
            Parameter(
                name="m", default=3.0, above=0.0, below=10.0, meaning="power of the gate near 0"
            ),
        ),
        aliases=("powlu",),
    ),
    Variant(
        name="xswiglu",
        label="xSwiGLU",
        phi="expanded_swish",
        psi="identity",
        formula="g (sigmoid(g) (1 + 2 alpha) - alpha) * u",
        source=EXPANDED + ", second order: alpha = 0 is SwiGLU",
        parameters=(_EXPANSION,),
        learned="layer",
    ),
    Variant(
        name="xgeglu",
        label="xGEGLU",
        phi="expanded_gelu",
        psi="identity",
        formula="g (Phi(g) (1 + 2 alpha) - alpha) * u",
        source=EXPANDED + ", second order: alpha = 0 is GEGLU",
        parameters=(_EXPANSION,),
        learned="layer",
    ),
    Variant(
        name="mish_glu",
        label="Mish-GLU",
        phi="mish",
        psi="identity",
        formula="g tanh(log(1 + e^g)) * u",
        source=MISRA + "; " + SHAZEER + ", eq. 5",
        aliases=("gated-mish",),
    ),
    Variant(
        name="hard_swish_glu",
        label="hard SwiGLU",
        phi="hard_swish",
        psi="identity",
        formula="g min(max(0, g + 3), 6) / 6 * u",
        source=HOWARD + "; " + SHAZEER + ", eq. 5",
        aliases=("gated-hard-swish",),
    ),
)

VARIANTS: Table[Variant] = Table({row.name: row for row in _ROWS})
"""Every variant by name, read-only, in the order that tables and plots use."""

# The eight rows of Shazeer 2020, table 1, in its order: what `compare` runs unless told otherwise.
PAPER = ("relu", "gelu", "swish", "glu", "bilinear", "geglu", "swiglu", "reglu")


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold().replace("²", "2") if letter.isalnum())


def _spellings() -> Iterator[tuple[str, Variant]]:
    for row in _ROWS:
        for spelling in (row.name, row.label, *row.aliases):
            yield _key(spelling), row


_BY_SPELLING = dict(_spellings())


def get_variant(name: str | Variant) -> Variant:
    """The row for a name, an alias or a label, in any case and punctuation.

    With parameters behind a colon it is the row with other defaults. A `Variant` that a user made
    of the functions of the table is taken up, and from then on found by its name too.

    Raises:
        UnknownVariant: no row has that name, the message lists the nearest ones; or a user's row
            does not fit to the table.
        ParameterError: a parameter that the row does not have, or a value out of range.

    >>> get_variant("SwiGLU").name
    'swiglu'
    >>> get_variant("gelu_pytorch_tanh").name
    'gelu_tanh'
    >>> get_variant("swiglu:beta=2").defaults
    {'beta': 2.0}
    """
    if isinstance(name, Variant):
        known = VARIANTS.get(name.name)
        return name if known is name else _taken_up(name, known)
    if not isinstance(name, str):
        raise UnknownVariant(
            f"a variant is named by a string, got {name!r}; the names are {', '.join(VARIANTS)}"
        )
    base, colon, assigned = name.partition(":")
    row = _BY_SPELLING.get(_key(base))
    if row is not None:
        return _with_values(row, assigned) if colon else row
    near = difflib.get_close_matches(_key(base), _BY_SPELLING, n=3, cutoff=0.5)
    nearest = list(dict.fromkeys(_BY_SPELLING[spelling].name for spelling in near))
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see gatedffn.VARIANTS"
    raise UnknownVariant(f"no variant is called {name!r}; {hint}")


class Function(NamedTuple):
    """The parameters of a scalar function in their order, and those with a derivative by them."""

    parameters: tuple[str, ...] = ()
    learnable: tuple[str, ...] = ()


FUNCTIONS: dict[str, Function] = {}
"""The scalar functions that rows may name; `gatedffn.activations` has them."""


def _taken_up(row: Variant, known: Variant | None) -> Variant:
    """A user's row, found by its name from now on; the one of that name where it is the same."""
    if known == row:
        assert known is not None
        return known
    if known is not None:
        raise UnknownVariant(
            f"{row.name!r} is another variant in this process, and this is not a row like it: give "
            "it another name"
        )
    _check(row)
    return hold(row)


def hold(row: Variant) -> Variant:
    """Has a user's row found by its names."""
    for spelling in (row.name, row.label, *row.aliases):
        _BY_SPELLING[_key(spelling)] = row
    VARIANTS._hold(row.name, row)
    return row


def _check(row: Variant) -> None:
    """Raises unless a user's row can stand beside those of the table."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row.name):
        raise UnknownVariant(
            f"{row.name!r} cannot name a variant: take small letters, digits and underscores"
        )
    for spelling in (row.name, row.label, *row.aliases):
        other = _BY_SPELLING.get(_key(spelling))
        if other is not None:
            raise UnknownVariant(f"{spelling!r} is a name of {other.name!r}: choose another")
    names = row.phi, *([] if row.psi is None else [row.psi])
    for name in names:
        if name not in FUNCTIONS:
            raise UnknownVariant(
                f"{row.name!r} names a function {name!r}: there are {', '.join(FUNCTIONS)}; a "
                "function of your own is given to gatedffn.variant"
            )
    used = {name for function in names for name in FUNCTIONS[function].parameters}
    if used != set(row.defaults):
        raise ParameterError(
            f"{row.name!r} has the parameters {sorted(row.defaults)}, and its functions take "
            f"{sorted(used)}: name the same"
        )
    of_psi = () if row.psi is None else FUNCTIONS[row.psi].parameters
    for parameter in row.parameters:
        parameter.check(row.name, parameter.default)
        learns = parameter.name in FUNCTIONS[row.phi].learnable and parameter.name not in of_psi
        if parameter.learnable and not learns:
            raise ParameterError(
                f"{parameter.name} of {row.name!r} cannot be learned: there is no derivative by it"
            )


def _with_values(base: Variant, assigned: str) -> Variant:
    """A row with other defaults; the row itself where they are its own."""
    given: dict[str, float] = {}
    for words in assigned.split(","):
        name, equals, text = (part.strip() for part in words.partition("="))
        parameter = next((p for p in base.parameters if p.name == name), None)
        if not equals or parameter is None:
            known = ", ".join(base.defaults) or "none"
            raise ParameterError(
                f"{words!r} sets no parameter of {base.name!r}, whose parameters are {known}: "
                "write NAME:PARAMETER=NUMBER, more of them with a comma between"
            )
        if name in given:
            raise ParameterError(f"{assigned!r} sets {name} of {base.name!r} twice: once is enough")
        try:
            value = float(text)
        except ValueError:
            raise ParameterError(
                f"{name} of {base.name!r} is {text!r}: it must be a number"
            ) from None
        parameter.check(base.name, value)
        given[name] = value
    changed = {n: v for n, v in {**base.defaults, **given}.items() if v != base.defaults[n]}
    if not changed:
        return base
    words = ",".join(f"{name}={_short(value)}" for name, value in changed.items())
    # A row that was itself made so keeps what it has beside what changes now.
    root, _, before = base.name.partition(":")
    if before:
        rest = [part for part in before.split(",") if part.partition("=")[0] not in changed]
        return _with_values(VARIANTS[root], ",".join([*rest, words]))
    name = f"{base.name}:{words}"
    if (made := VARIANTS.get(name)) is not None:
        return made
    formula = base.formula
    for one, value in changed.items():
        formula, count = re.subn(rf"\b({one} = )[\d.]+", rf"\g<1>{_short(value)}", formula)
        formula += "" if count else f", {one} = {_short(value)}"
    row = replace(
        base,
        name=name,
        label=f"{base.label} {words.replace(',', ' ')}",
        formula=formula,
        aliases=(),
        parameters=tuple(
            replace(p, default=changed.get(p.name, p.default)) for p in base.parameters
        ),
    )
    VARIANTS._hold(name, row)
    return row


def _short(value: float) -> str:
    return repr(value).removesuffix(".0")


def _restored(facts: dict[str, Any]) -> Variant:
    """A user's row as it was pickled."""
    return get_variant(Variant(**facts))
