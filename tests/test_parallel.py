"""Layers that several processes share give what one process gives, or say why they do not."""

from pathlib import Path

import pytest
from support import loaders, shared, shared_checkpoints, shared_experts
from support.processes import outcomes

MODULES = (shared, loaders, shared_experts, shared_checkpoints)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two processes tell of all cases, from one launch."""
    folder: Path = tmp_path_factory.mktemp("processes")
    return outcomes([module.__name__ for module in MODULES], 2, folder)


@pytest.mark.parametrize("name", [name for module in MODULES for name in module.CASES])
def test_two_processes(told: dict[str, str], name: str) -> None:
    assert told[name] == ""
