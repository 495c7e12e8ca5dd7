"""What was published, for orientation: other models, data and budgets."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SOURCE = (
    "Shazeer 2020 (arXiv 2002.05202), table 1: T5-base, C4, 65,536 steps (mean of four runs) and "
    "524,288 steps (one run). Narang et al. 2021 (arXiv 2102.11972), table 1: T5-base, C4, 65,536 "
    "steps (mean of five runs) and 524,288 steps. Log-perplexity in nats a token."
)


@dataclass(frozen=True, slots=True)
class Published:
    """Held-out log-perplexities after a short and a long training, as each paper has them."""

    shazeer_short: float | None
    shazeer_long: float | None
    narang_short: float
    narang_long: float


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "relu": Published(1.997, 1.677, 2.182, 1.838),
        "gelu": Published(1.983, 1.679, 2.179, 1.838),
        "swish": Published(1.994, 1.683, 2.186, 1.847),
        "glu": Published(1.982, 1.663, 2.174, 1.814),
        "bilinear": Published(1.960, 1.648, 2.149, 1.798),
        "geglu": Published(1.942, 1.633, 2.130, 1.792),
        "swiglu": Published(1.944, 1.636, 2.127, 1.789),
        "reglu": Published(1.953, 1.645, 2.145, 1.803),
        "elu": Published(None, None, 2.270, 1.932),
        "selu": Published(None, None, 2.315, 1.948),
        "sigmoid": Published(None, None, 2.291, 1.867),
        "softplus": Published(None, None, 2.207, 1.850),
    }
)
