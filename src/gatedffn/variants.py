"""The table: one row a variant, facts only. Everything else iterates it.

A row says `h = phi(gate) * psi(up)` (gated) or `h = phi(up)` (not gated) by naming the scalar
functions of `gatedffn.activations`. To add a variant, add a row, and a scalar function if it
needs a new one; the tests that then fail are what is left to do.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from gatedffn.errors import UnknownVariant

Granularity = Literal["layer", "unit"]
Entry = TypeVar("Entry")


class Table(Mapping[str, Entry], Generic[Entry]):
    """A mapping that cannot be changed.

    `types.MappingProxyType` is one, but `torch.compile` gives up on it in a model that changes
    any dictionary before it gets there.

    >>> Table({"one": 1})["one"]
    1
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._entries!r})"


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
)

VARIANTS: Mapping[str, Variant] = Table({row.name: row for row in _ROWS})
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

    Raises:
        UnknownVariant: no row has that name; the message lists the nearest ones.

    >>> get_variant("SwiGLU").name
    'swiglu'
    >>> get_variant("gelu_pytorch_tanh").name
    'gelu_tanh'
    """
    if isinstance(name, Variant):
        known = VARIANTS.get(name.name)
        if known is not name and known != name:
            raise UnknownVariant(f"{name!r} is not a row of gatedffn.VARIANTS; take one by name")
        return name
    if not isinstance(name, str):
        raise UnknownVariant(
            f"a variant is named by a string, got {name!r}; the names are {', '.join(VARIANTS)}"
        )
    row = _BY_SPELLING.get(_key(name))
    if row is not None:
        return row
    near = difflib.get_close_matches(_key(name), _BY_SPELLING, n=3, cutoff=0.5)
    nearest = list(dict.fromkeys(_BY_SPELLING[spelling].name for spelling in near))
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see gatedffn.VARIANTS"
    raise UnknownVariant(f"no variant is called {name!r}; {hint}")
