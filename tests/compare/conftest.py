from pathlib import Path
from typing import Any

import pytest

from gatedffn.compare.settings import Setting, make_setting

TINY: dict[str, Any] = {
    "steps": 12,
    "seeds": 2,
    "d_model": 32,
    "layers": 1,
    "context": 32,
    "batch": 4,
    "variants": ("relu", "swiglu"),
    "selection_tokens": 320,
    "held_out_tokens": 640,
    "evaluations": 3,
}


class Silent:
    """A display that shows nothing."""

    def begin(self, run: object) -> None: ...
    def step(self, step: int, loss: float | None) -> None: ...
    def finish(self, record: object, *, reused: bool) -> None: ...


@pytest.fixture
def tiny() -> Setting:
    """A comparison of a few seconds."""
    return make_setting("quick", "decoder", **TINY)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A folder of thirty short texts, all different."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for i in range(30):
        words = " ".join(f"word{(i * j) % 97} sits by item {i + j}," for j in range(80))
        (folder / f"{i}.txt").write_text(words + "\n")
    return folder
