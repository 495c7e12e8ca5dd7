"""Going on from a checkpoint: the numbers of a run that nobody cut, whatever is torn."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compare.conftest import TINY, Log, numbers
from gatedffn.compare.checkpoints import SEAL, drop_torn, newest
from gatedffn.compare.settings import Run, make_setting
from gatedffn.compare.study import Prepared, prepare, study

FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "training_args.bin", "config.json", "generation_config.json", SEAL),
)


class Cut(Log):
    """Ends a run after a checkpoint at 9, in the middle of a point of the training curve."""

    def step(self, run: Run, step: int, loss: float | None) -> None:
        super().step(run, step, loss)
        if step == 10:
            raise InterruptedError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("".join(f"line {i} says {i * i % 89}\n" for i in range(2000)))
    changes = {"steps": 100, "seeds": 1, "variants": ("relu",), "checkpoint_every": 3}
    return prepare(make_setting("quick", "decoder", **TINY | changes), [str(text)])


@pytest.fixture(scope="module")
def cut_once(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(InterruptedError):
        study(prepared, folder, Cut())
    return folder


@pytest.fixture
def place(cut_once: Path, tmp_path: Path) -> Path:
    """What a run that was cut left, in a folder of a comparison."""
    shutil.copytree(cut_once, tmp_path / "cut")
    [place] = (tmp_path / "cut" / "unfinished").iterdir()
    return place


def remove(path: Path) -> None:
    path.unlink()


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scramble(path: Path) -> None:
    """As long as it was, but with what a disk makes of pages that were never written."""
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def test_a_run_that_was_cut_has_the_curves_of_a_whole_one(
    prepared: Prepared, place: Path, tmp_path: Path
) -> None:
    study(prepared, tmp_path / "whole", Log())
    whole = numbers(tmp_path / "whole")
    [result] = whole.values()
    assert [step for step, _ in result["training_curve"]] == list(range(2, 101, 2))

    shutil.copytree(place.parents[1], tmp_path / "torn")
    log = Log()
    study(prepared, place.parents[1], log)
    assert (log.steps[0], log.notes) == (10, [])
    assert numbers(place.parents[1]) == whole

    tear(tmp_path / "torn" / "unfinished" / place.name / "checkpoint-9" / "trainer_state.json")
    log = Log()
    study(prepared, tmp_path / "torn", log)
    assert log.steps[0] == 7
    assert log.notes == [
        "ReLU, seed 0, learning rate 0.003: checkpoint-9 cannot be read to the end, so the run "
        "goes on from step 6"
    ]
    assert numbers(tmp_path / "torn") == whole


@pytest.mark.parametrize("damage", [remove, tear, scramble])
def test_a_checkpoint_with_any_damaged_file_is_dropped(
    place: Path, damage: Callable[[Path], None]
) -> None:
    assert {path.name for path in (place / "checkpoint-9").iterdir()} == set(FILES)
    kept = shutil.copytree(place / "checkpoint-9", place.parent / "kept")
    for name in FILES:
        damage(place / "checkpoint-9" / name)
        assert drop_torn(place) == ["checkpoint-9"], name
        assert newest(place) == 6
        shutil.copytree(kept, place / "checkpoint-9")
    assert drop_torn(place) == []
    assert newest(place) == 9


def test_without_a_checkpoint_that_can_be_read_a_run_begins_again(
    prepared: Prepared, place: Path
) -> None:
    for step in (6, 9):
        (place / f"checkpoint-{step}" / SEAL).unlink()  # as of a kill while it was written
    log = Cut()
    with pytest.raises(InterruptedError):
        study(prepared, place.parents[1], log)
    assert log.steps[0] == 1
    [note] = log.notes
    assert note.endswith(
        "checkpoint-9 and checkpoint-6 cannot be read to the end, so the run begins again"
    )
