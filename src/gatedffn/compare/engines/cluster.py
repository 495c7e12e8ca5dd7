"""The pool that is a Ray cluster: every run is a task of its own."""

import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from gatedffn.compare.engines.pool import Died, Done, Failed
from gatedffn.compare.execute import Prepared, execute
from gatedffn.compare.settings import Run
from gatedffn.compare.store import Claim, Record
from gatedffn.compare.team import Team
from gatedffn.errors import GatedFFNError, MissingExtra, RunError, SettingError


class Cluster:
    """Tasks with one processor each, and a GPU each where the cluster has some.

    The data goes into the object store once. What a task gives comes back to this process, which
    alone writes to the folder; only checkpoints are written where the task runs, and only where
    that sees the same folder.
    """

    processes = 1

    def __init__(self, prepared: Prepared, address: str, most: int | None) -> None:
        self.ray = imported_ray()
        _connect(self.ray, address)
        self.most = most
        self.gpu = self._count("GPU") > 0
        self.data = self.ray.put(prepared)
        needs = {"num_cpus": 1, "num_gpus": 1 if self.gpu else 0}
        # A run that is lost is begun again by whoever counts how often, so not by Ray.
        self.task = self.ray.remote(max_retries=0, **needs)(_task)
        self.running: dict[Any, Run] = {}

    @property
    def size(self) -> int:
        """As many as the cluster has processors or GPUs now; nodes may come and go."""
        there = max(1, self._count("GPU" if self.gpu else "CPU"))
        return there if self.most is None else min(there, self.most)

    def _count(self, kind: str) -> int:
        return int(self.ray.cluster_resources().get(kind, 0))

    def begin(self, run: Run, claim: Claim) -> None:
        """Hands a run to the cluster."""
        seen = (claim.path, claim.words)
        self.running[self.task.remote(self.data, run, claim.place, seen, self.gpu)] = run

    def wait(self, seconds: float) -> list[Done | Died | Failed]:
        """What has ended."""
        ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        if not ready:
            ready, _ = self.ray.wait(list(self.running), timeout=seconds)
        return [self._ended(task, self.running.pop(task)) for task in ready]

    def _ended(self, task: Any, run: Run) -> Done | Died | Failed:
        errors = self.ray.exceptions
        try:
            return Done(run, self.ray.get(task))
        except errors.RayTaskError as error:
            cause = error.cause
            own = isinstance(cause, GatedFFNError)
            return Failed(run, cause if own else RunError(str(error)))
        except errors.RayError as error:
            return Died(run, str(error).strip().splitlines()[0])

    def close(self) -> None:
        """Ends the tasks, and a cluster that was started here."""
        for task in self.running:
            self.ray.cancel(task, force=True)
        self.running.clear()
        self.ray.shutdown()


def imported_ray() -> Any:
    """Ray, which is heavy and need not be installed."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra(
            "--on needs ray; this installs it: pip install 'gatedffn[cluster]'"
        ) from error
    return ray


def _connect(ray: Any, address: str) -> None:
    """Joins a cluster; `ray` is the one that the environment names, or one on this machine."""
    if address == "ray":
        address = os.environ.get("RAY_ADDRESS", "local")
    named: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        named |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        # Its processes know each other by a token, which Ray would write to the home folder.
        if not os.environ.keys() & {f"RAY_AUTH_{name}" for name in ("MODE", "TOKEN", "TOKEN_PATH")}:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        ray.init(address, **named)
    except Exception as error:  # Ray raises these of no kind of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingError(
            f"the Ray cluster {address} does not answer: {reason}; --on takes an address such as "
            "ray://HOST:10001, or ray for a cluster on this machine"
        ) from error


def _task(prepared: Prepared, run: Run, place: Path, seen: tuple[Path, bytes], gpu: bool) -> Record:
    """Does a run on a node of the cluster."""
    import torch

    from gatedffn.compare.machine import on_gpu

    torch.set_num_threads(1)
    if on_gpu() != gpu:
        raise SettingError("Ray gave this task no GPU, or one that PyTorch cannot use")
    with tempfile.TemporaryDirectory(prefix="gatedffn-") as own:
        path, words = seen
        try:
            shared = path.read_bytes() == words
        except OSError:
            shared = False
        return execute(run, prepared, place if shared else Path(own), _no_steps, Team())


def _no_steps(step: int, loss: float | None) -> None:
    """Nobody hears of the steps of a task; its end is told."""
