"""A measurement with contestants that fail in every way; the others must come through."""

import itertools
import json
import os
from pathlib import Path

import pytest

from gatedffn.bench import figures
from gatedffn.bench.contestants import CONTESTANTS
from gatedffn.bench.limits import Limit, Limits
from gatedffn.bench.outcomes import Entry, Measured, Outcome, Timing
from gatedffn.bench.protocol import Protocol
from gatedffn.bench.records import FILE, add, time_records
from gatedffn.bench.report import HEADERS, cells, color, draw, summary_cells
from gatedffn.bench.run import measure, steps, turns
from gatedffn.bench.workloads import Workload
from gatedffn.errors import BuildError

WORKLOAD = Workload(tokens=200, d_model=16, d_hidden=48)
PROTOCOL = Protocol(rounds=2, turn=0.002, fewest=1, most=3)
FAULTS = ("Swapped", "Unwritten", "Crashing", "Failing", "Absent")
STRANGERS = {name.lower(): f"faults:{name}" for name in FAULTS}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, list[str]]:
    here = str(Path(__file__).parent)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here)
        patch.setenv("GATEDFFN_TUNE", "off")
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)
        contestants = {name: CONTESTANTS[name] for name in ("gatedffn", "eager")} | STRANGERS
        folder = tmp_path_factory.mktemp("run")
        measured = measure(WORKLOAD, contestants, PROTOCOL, folder, said.append)
    return measured, said


def test_a_run_with_faults(run: tuple[Measured, list[str]], tmp_path: Path) -> None:
    measured, said = run
    outcomes = {outcome.entry.contestant: outcome for outcome in measured.outcomes}
    reasons = {name: outcome.reason or "" for name, outcome in outcomes.items()}
    assert not any(reasons[name] for name in ("gatedffn", "eager"))
    assert reasons["swapped"].startswith("wrong: the error of its output is ")
    assert reasons["unwritten"] == "wrong: its results hold infinities or NaNs"
    assert reasons["crashing"] == "its process ended with 3"
    assert reasons["failing"] == "RuntimeError: out of luck"
    assert reasons["absent"] == "not installed: no_such_package"
    for outcome in measured.outcomes:
        assert (outcome.seconds is None) == bool(outcome.reason)
        assert (figures.figures(measured, outcome) is None) == bool(outcome.reason)
        if not outcome.reason:
            assert len(outcome.timings) == PROTOCOL.rounds
    assert len(measured.limits) == PROTOCOL.rounds
    assert len(said) == steps(len(outcomes), PROTOCOL)

    table = cells(measured)
    assert {len(line) for line in table} == {len(HEADERS)}
    assert len([line for line in table if line[1] == "-"]) == 5
    assert any("(best peer)" in line[0] for line in table)

    surroundings = {"run": "now", "machine": {}, "busy": 0.0}
    records = time_records(measured, PROTOCOL, surroundings)
    add(tmp_path, records[:1])
    path = add(tmp_path, records[1:])
    assert path.name == FILE
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["contestant"] for line in lines] == list(outcomes)
    fields = {"kind", "row", "contestant", "label", "version", "reason", "check", "tolerance"}
    fields |= {"figures", "rounds", "repetitions", "limit", "protocol", "run", "machine", "busy"}
    fields.add("declined")
    assert [line.keys() ^ fields for line in lines if line.keys() != fields] == []
    assert lines[0]["row"]["name"] == "200x16x48-float32"
    assert lines[0]["figures"].keys() >= {"to_eager", "to_best_peer", "of_limit", "spread"}
    assert lines[2]["figures"] is None

    paths = draw([measured, measured, measured], tmp_path / "bench")
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert all(path.stat().st_size > 5_000 for path in paths)


def test_turns_rotate() -> None:
    order = turns(["a", "b", "c"], 4)
    assert order == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def made_up() -> Measured:
    """Two rounds, the second on a machine that has become twice as slow."""

    def outcome(name: str, *rounds: float) -> Outcome:
        entry = Entry(contestant=name, label=name, version="1")
        return Outcome(entry=entry, timings=tuple(Timing(seconds, 1) for seconds in rounds))

    return Measured(
        workload=Workload(tokens=1, d_model=10, d_hidden=10),
        outcomes=(
            outcome("gatedffn", 1.0, 2.0),
            outcome("eager", 4.0, 8.0),
            outcome("jax", 3.0, 6.0),
        ),
        limits=tuple(Limit(flops=f, bytes=1e9, sources={"loop": f}) for f in (1200.0, 600.0)),
    )


def test_ratios_are_taken_within_rounds() -> None:
    measured = made_up()
    ours = figures.figures(measured, measured.outcomes[0])
    assert ours is not None
    assert ours.to_eager == 4.0
    assert ours.to_best_peer == 3.0
    assert ours.of_limit == 0.5
    assert ours.milliseconds == 1500.0
    assert ours.spread == (1000.0, 2000.0)
    assert figures.limit_bound(measured) == "arithmetic"
    assert figures.limit_record(measured)["rounds"] == [500.0, 1000.0]


def test_summaries_are_geometric_means_with_the_worst() -> None:
    def measured(name: str, ours: float, *, failed: bool = False) -> Measured:
        timings = {"gatedffn": ours, "gatedffn-compile": 1.0, "eager": 4.0, "jax": 2.0}
        return Measured(
            workload=Workload(tokens=len(name), d_model=10, d_hidden=10),
            outcomes=tuple(
                Outcome(
                    entry=Entry(contestant=each, label=each, version="1"),
                    timings=(Timing(seconds, 1),),
                    reason="does not train" if failed and each == "jax" else None,
                )
                for each, seconds in timings.items()
            ),
            limits=(Limit(flops=1.0, bytes=1.0, sources={}),),
        )

    done = [measured("a", 1.0), measured("bb", 4.0), measured("ccc", 0.25, failed=True)]
    found = {(s.contestant, s.against): s for s in figures.summaries(done)}
    own = ("gatedffn", "gatedffn-compile")
    assert set(found) == set(itertools.product(own, ("eager", "jax")))
    eager = found["gatedffn", "eager"]
    assert eager.workloads == 3
    assert eager.geometric_mean == pytest.approx((4.0 * 1.0 * 16.0) ** (1 / 3))
    assert (eager.worst, eager.worst_workload) == (1.0, "2x10x10-float32")
    jax = found["gatedffn", "jax"]
    assert (jax.workloads, jax.worst) == (2, 0.5)
    assert jax.geometric_mean == pytest.approx(1.0)
    assert summary_cells([jax]) == [
        ("gatedffn", "jax", "2", "1.00", "0.50", "2x10x10-float32"),
    ]


def test_what_has_no_weights_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatedffn.bench.limits.SECONDS", 0.001)
    monkeypatch.setattr("gatedffn.bench.limits.SQUARE", 64)
    gating = Workload(tokens=1, d_model=0, d_hidden=4, part="gating")
    limit = Limits(gating, 1).measure()
    assert limit.bound(gating) == "reading"
    assert 0.0 < limit.seconds(gating) < 1e-6


def test_reading_is_a_limit() -> None:
    limit = Limit(flops=1e12, bytes=1200.0, sources={})
    workload = Workload(tokens=1, d_model=10, d_hidden=10)
    assert limit.bound(workload) == "reading"
    assert limit.seconds(workload) == 1.0


@pytest.mark.parametrize("compiler", [True, False])
def test_limits_with_and_without_a_compiler(
    compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(source: Path) -> None:
        raise BuildError(f"nothing compiles {source}")

    monkeypatch.setattr("gatedffn.bench.limits.SECONDS", 0.001)
    monkeypatch.setattr("gatedffn.bench.limits.SQUARE", 64)
    if not compiler:
        monkeypatch.setattr("gatedffn.bench.limits.load", no_compiler)
    limit = Limits(Workload(tokens=4, d_model=64, d_hidden=64, dtype="bfloat16"), 1).measure()
    assert limit.flops > 0
    assert limit.bytes > 0
    assert {"PyTorch's product", "PyTorch's sum"} <= limit.sources.keys()
    if not compiler:
        assert len(limit.sources) == 2


def test_colours_tell_contestants_apart() -> None:
    assert len({color(name) for name in CONTESTANTS}) == len(CONTESTANTS)
