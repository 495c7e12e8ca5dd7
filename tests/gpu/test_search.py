"""The search for configurations: what it tries, what it rejects, what it leaves on the disk."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gatedffn.bench import gpu_search
from gatedffn.bench.gpu_kept import Kept
from gatedffn.bench.gpu_search import Shape, candidates, fit_of, measured
from gatedffn.bench.records import Record
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs
from gatedffn.ops.feed_forward.gpu.configs import Config

SHAPE = Shape(150, 40, 72)
PLAIN = Config(tokens=64, units=64, deep=64, warps=4, stages=2)


def once(call: Callable[[], object]) -> float:
    call()
    return 1e-3


@pytest.mark.parametrize("kernel", ["hidden_values", "branch_gradients"])
def test_candidates_are_those_of_the_table_and_more(kernel: configs.Kernel) -> None:
    of_table = {fit.config for fit in configs.TABLE if (fit.kernel, fit.kind) == (kernel, "half")}
    found = candidates(kernel, "half", descriptors=True)
    assert of_table < set(found)
    assert len(set(found)) == len(found) <= 64
    assert all(c.operands == "pointers" for c in candidates(kernel, "half", descriptors=False))
    assert candidates(kernel, "float32", descriptors=True)


@pytest.mark.parametrize("kernel", ["hidden_values", "branch_gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_right_candidates_are_timed(
    kernel: configs.Kernel, dtype: torch.dtype, device: torch.device
) -> None:
    _, record = measured(kernel, SHAPE, dtype, device, [PLAIN], once)
    assert record["reason"] is None
    assert record["seconds"] == 1e-3
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("kernel", ["hidden_values", "branch_gradients"])
def test_wrong_candidates_are_not(
    kernel: configs.Kernel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = gpu_search.CALLS[kernel]
    run = call.run

    def off(self: gpu_search.HiddenValues, config: Config) -> None:
        run(self, config)  # type: ignore[arg-type]
        self.results()[0][-1, -1] += 1.0

    monkeypatch.setattr(call, "run", off)
    _, record = measured(kernel, SHAPE, torch.float32, device, [PLAIN], once)
    assert "its error is" in record["reason"]
    monkeypatch.setattr(call, "run", lambda *_: None)
    _, record = measured(kernel, SHAPE, torch.float32, device, [PLAIN], once)
    assert record["reason"] == "it left values unwritten"
    assert record["seconds"] is None


def test_a_candidate_that_fails_is_recorded(device: torch.device) -> None:
    odd = Shape(16, 41, 72)  # rows that no descriptor takes
    config = Config(tokens=16, units=16, deep=16, warps=4, stages=2, operands="joined")
    _, record = measured("hidden_values", odd, torch.float32, device, [config], once)
    assert record["reason"].startswith("BackendError: ")


def test_the_best_is_printed_as_a_row(device: torch.device) -> None:
    _, record = measured("hidden_values", SHAPE, torch.float32, device, [PLAIN], once)
    written = fit_of(record, "sm_90", "float32")
    assert eval(written.split(",  #")[0], vars(configs)) == configs.Fit(
        "hidden_values", "sm_90", "float32", configs.SOME_TOKENS, None, PLAIN
    )


HERE: Record = {"gpu": "none", "torch": "2", "triton": "3", "sources": "a"}
MORE = [replace(PLAIN, warps=warps) for warps in (1, 2, 8)]


def records(*configs: Config) -> list[Record]:
    return [
        {**gpu_search.named("hidden_values", SHAPE, torch.bfloat16, config), **result}
        for config in configs
        for result in (
            {"reason": "it did not come back", "seconds": None},
            {"reason": None, "seconds": 1e-3 * config.warps},
        )
    ]


def test_what_is_known_of_these_sources_is_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "new", HERE)
    for record in records(PLAIN, MORE[0])[:3]:
        kept.add(record)
    with kept.path.open("a") as file:
        file.write('{"kernel": "hidd')  # it was cut off
    again = Kept(tmp_path / "new", HERE)
    assert [record["reason"] for record in again.found.values()] == [None, "it did not come back"]
    assert len(again.of("hidden_values", torch.bfloat16, asdict(SHAPE))) == 2
    assert again.of("branch_gradients", torch.bfloat16, asdict(SHAPE)) == []
    assert not Kept(tmp_path / "new", {**HERE, "sources": "b"}).found
    again.add(records(MORE[1])[1])
    assert len(Kept(tmp_path / "new", HERE).found) == 3


def test_a_death_among_several_at_once_is_looked_for_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "finish", lambda _: None)
    called: list[int] = []

    def fails() -> None:
        called.append(2)
        raise RuntimeError("no such instruction")

    kept = Kept(tmp_path, HERE)
    kept.together([lambda: called.append(1), fails])
    assert sorted(called) == [1, 2]
    assert not Kept(tmp_path, HERE).alone
    kept.add({"together": "begun"})
    again = Kept(tmp_path, HERE)
    again.together([fails])
    assert len(called) == 2


def test_it_goes_on_where_its_time_was_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Config] = []

    def measured(*given: Any) -> Iterator[Record]:
        for config in given[4]:
            ran.append(config)
            yield from records(config)

    monkeypatch.setattr(gpu_search, "measured", measured)
    monkeypatch.setattr(gpu_search, "candidates", lambda *_, **__: [PLAIN, *MORE])
    monkeypatch.setattr(gpu_search, "check_device", lambda _: None)
    monkeypatch.setattr(gpu_search, "_surroundings", lambda: HERE)
    monkeypatch.setattr(configs, "chip_of", lambda _: "sm_90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    seconds = iter([0.0, 0.0, 61.0, *[0.0] * 9])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(gpu_search, "time", clock)
    options = [f"--out={tmp_path}", "--minutes=1", "--kernel=hidden_values"]
    options += ["--shape", "150", "40", "72"]
    assert gpu_search.main(options) == gpu_search.LEFT
    assert "1 of 1 candidates ran and were right, 3 are left" in capsys.readouterr().out
    assert gpu_search.main(options) == 0
    assert ran == [PLAIN, *MORE]
    said = capsys.readouterr().out
    assert "4 of 4 candidates ran and were right, 0 are left" in said
    assert "warps=1," in said.split("#")[0]
    assert gpu_search.main(options) == 0
    assert len(ran) == 4


def test_it_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_search.main(["--out", str(tmp_path)]) == 1
    assert "this machine has no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
