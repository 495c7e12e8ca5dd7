"""The search for configurations: what it tries, what it rejects, what it leaves on the disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gatedffn.bench import gpu_search
from gatedffn.bench.gpu_search import Shape, candidates, fit_of, measured
from gatedffn.ops.feed_forward.gpu import configs
from gatedffn.ops.feed_forward.gpu.configs import Config

SHAPE = Shape(150, 40, 72)
PLAIN = Config(tokens=16, units=16, deep=16, warps=4, stages=2)


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
    (record,) = measured(kernel, SHAPE, dtype, device, [PLAIN], once)
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
    (record,) = measured(kernel, SHAPE, torch.float32, device, [PLAIN], once)
    assert "its error is" in record["reason"]
    monkeypatch.setattr(call, "run", lambda *_: None)
    (record,) = measured(kernel, SHAPE, torch.float32, device, [PLAIN], once)
    assert record["reason"] == "it left values unwritten"
    assert record["seconds"] is None


def test_a_candidate_that_fails_is_recorded(device: torch.device) -> None:
    odd = Shape(16, 41, 72)  # rows that no descriptor takes
    config = Config(tokens=16, units=16, deep=16, warps=4, stages=2, operands="joined")
    (record,) = measured("hidden_values", odd, torch.float32, device, [config], once)
    assert record["reason"].startswith("BackendError: ")


def test_the_best_is_printed_as_a_row(device: torch.device) -> None:
    (record,) = measured("hidden_values", SHAPE, torch.float32, device, [PLAIN], once)
    written = fit_of(record, "sm_90", "float32")
    assert eval(written.split(",  #")[0], vars(configs)) == configs.Fit(
        "hidden_values", "sm_90", "float32", configs.SOME_TOKENS, None, PLAIN
    )


def test_records_are_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / gpu_search.FILE
    gpu_search.add(path, [{"a": 1}])
    gpu_search.add(path, [{"a": 2}, {"a": 3}])
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_it_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_search.main(["--out", str(tmp_path)]) == 1
    assert "this machine has no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
