"""The comparison on a Ray cluster on this machine, with a worker that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from compare.conftest import Log, command, numbers
from gatedffn import native
from gatedffn.compare.checkpoints import SEAL
from gatedffn.compare.study import Prepared, study
from gatedffn.errors import MissingExtra, SettingError


@pytest.mark.slow
def test_a_killed_worker_of_a_cluster_changes_nothing(
    from_the_command_line: Prepared, prose: Path, tmp_path: Path
) -> None:
    study(from_the_command_line, tmp_path / "whole", Log())
    folder, home = tmp_path / "cluster", tmp_path / "home"
    home.mkdir()
    started = subprocess.Popen(
        command(prose, folder, "--on=ray", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(home), "GATEDFFN_CACHE": str(native.cache_folder())},
    )
    try:
        worker = _at_work(started, folder)
        worker.send_signal(signal.SIGKILL)
        shown, told = started.communicate(timeout=120)
    finally:
        started.kill()
    assert started.returncode == 0, told
    assert {row["seeds"] for row in json.loads(shown)["rows"]} == {2}
    assert told.count("it is begun again") == 1
    assert numbers(folder) == numbers(tmp_path / "whole")
    assert not (home / ".ray").exists()


def _at_work(command: subprocess.Popen[str], folder: Path) -> psutil.Process:
    """A process of Ray that does a run which has a checkpoint."""
    while True:
        assert command.poll() is None, command.communicate()
        if list(folder.glob(f"unfinished/*/checkpoint-*/{SEAL}")):
            for process in psutil.Process(command.pid).children(recursive=True):
                if process.name().startswith("ray::_task"):
                    return process
        time.sleep(0.02)


def test_a_cluster_that_does_not_answer_is_one_line(
    from_the_command_line: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(address: str, **_: object) -> None:
        raise ConnectionError(f"no cluster at {address}\nand much more")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    wanted = "cluster nowhere:1 does not answer: no cluster at nowhere:1; --on takes an address"
    with pytest.raises(SettingError, match=wanted):
        study(from_the_command_line, tmp_path, Log(), on="nowhere:1")


def test_without_ray_one_line_says_what_to_install(
    from_the_command_line: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gatedffn\[cluster\]'"):
        study(from_the_command_line, tmp_path, Log(), on="ray")
