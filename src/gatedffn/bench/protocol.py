"""How a workload is measured: how many rounds, and how long a turn is."""

from dataclasses import dataclass, replace

from gatedffn.bench.workloads import Device, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """So many rounds, in each of which everyone has one turn.

    A turn has as many samples as fit into `turn` seconds, but at least `fewest` and at most `most`.
    Whoever gives no answer for `patience` seconds is out.
    """

    rounds: int = 7
    turn: float = 0.4
    fewest: int = 3
    most: int = 200
    patience: float = 600.0

    def of(self, workload: Workload) -> "Protocol":
        """For a workload: steps of the largest take so long that two rounds are enough."""
        return replace(self, rounds=min(self.rounds, 2), fewest=2) if workload.large else self


FULL = Protocol()
QUICK = Protocol(rounds=5, turn=0.2)
GPU_FULL = Protocol(rounds=5, turn=0.15, patience=180.0)
GPU_QUICK = Protocol(rounds=3, turn=0.1, patience=180.0)
"""A GPU's steps are short, and its clock is steadier."""


def get_protocol(device: Device, *, quick: bool) -> Protocol:
    """How that device is measured."""
    if device == "cpu":
        return QUICK if quick else FULL
    return GPU_QUICK if quick else GPU_FULL
