"""Layers that several processes share give what one process gives, or say why they do not."""

from pathlib import Path

import pytest
from support.processes import outcomes
from support.shared import CASES


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two processes tell of all cases, from one launch."""
    folder: Path = tmp_path_factory.mktemp("processes")
    return outcomes("support.shared", 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(told: dict[str, str], name: str) -> None:
    assert told[name] == ""
