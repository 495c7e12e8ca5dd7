"""What a run concludes: which rows are marked, the closing sentences, the table for a document."""

import json
from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from gatedffn.bench.figures import conclusions, figures
from gatedffn.bench.limits import Limit
from gatedffn.bench.outcomes import Entry, Measured, Outcome, Timing
from gatedffn.bench.report import SCATTERED_WORDS, cells, written
from gatedffn.bench.workloads import Workload
from gatedffn.cli.app import app

NAMES = {"gatedffn": "gatedffn", "eager": "PyTorch eager"}


def measured(ours: Sequence[float], eager: Sequence[float], **facts: object) -> Measured:
    """A workload with rounds of these milliseconds."""
    workload = Workload(**{"tokens": 1, "d_model": 64, "d_hidden": 128, **facts})  # type: ignore[arg-type]
    outcomes = tuple(
        Outcome(
            entry=Entry(contestant=name, label=label, version="1"),
            timings=tuple(Timing(ms / 1e3, 3) for ms in rounds),
        )
        for (name, label), rounds in zip(NAMES.items(), (ours, eager), strict=True)
    )
    limits = tuple(Limit(flops=1e12, bytes=1e9, sources={}) for _ in ours)
    return Measured(workload=workload, outcomes=outcomes, limits=limits)


@pytest.mark.parametrize(
    ("ours", "eager", "marked"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.2, 2.4], False),
        ([1.0, 1.1, 1.6], [2.0, 2.2, 3.2], True),  # a round far from the others
        ([1.0, 1.0, 1.4], [1.4, 1.0, 1.4], True),  # 1.00 within the rounds, 1.40 by the times
    ],
)
def test_rounds_that_scatter_are_marked(
    ours: list[float], eager: list[float], marked: bool
) -> None:
    one = measured(ours, eager)
    found = figures(one, one.outcomes[0])
    assert found is not None
    assert found.scattered is marked
    (line,) = [line for line in cells(one) if line[0] == "gatedffn"]
    assert line[2].endswith("?") is marked


def test_a_sentence_for_each_kind_says_what_is_gained() -> None:
    done = [
        measured([1.0, 1.0], [1.3, 1.3]),
        measured([4.0, 4.0], [4.1, 4.1], tokens=256),
        measured([1.0, 9.0], [2.0, 18.0], tokens=16),
        measured([2.0, 2.0], [1.0, 1.0], training=True, dtype="bfloat16"),
    ]
    assert conclusions(done) == [
        "Beside PyTorch eager, forward in float32: at 1 token 1.3 times as fast, at 256 tokens no "
        "difference, at 16 tokens not told apart.",
        "Beside PyTorch eager, training in bfloat16: at 1 token slower, 2.0 times the time.",
    ]
    machine = {"processor": "a processor", "threads": 2, "torch": "2.13.0"}
    text = written(done, machine, "2026-11-28")
    assert text.startswith("a processor, 2 threads, PyTorch 2.13.0, 2026-11-28. ")
    assert "| forward, SwiGLU, 1 token, 64 x 128, float32 | 1.00 | 1.30 | 1.30 | 0.10 |" in text
    assert "| 5.00 ? | 10.0 ? | 2.00 |" in text
    assert text.rstrip().endswith(SCATTERED_WORDS)


def test_a_machine_that_becomes_busy_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    busy = iter([0.0, 0.4])
    monkeypatch.setattr("gatedffn.machine.busy", lambda: next(busy))
    monkeypatch.setattr("gatedffn.bench.run.measure", lambda *_: measured([1.0, 1.0], [1.3, 1.3]))
    given = ["--tokens=1", "--d-model=64", "--d-hidden=128", f"--out={tmp_path}", "--json"]
    result = CliRunner().invoke(app, ["bench", *given])
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert "others use 40% of this machine: the figures of this workload may be off" in told
    assert "forward in float32: at 1 token 1.3 times as fast." in told
    records = json.loads(result.stdout)["records"]
    assert [(r["busy"], r["busy_after"]) for r in records] == [(0.0, 0.4)] * 2
