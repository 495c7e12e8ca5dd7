"""The workloads, contestants and figures of a GPU, on a GPU that is none."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from bench import fake_gpu
from gatedffn.bench import figures, gating, gpu_peers, memory, run, worker
from gatedffn.bench import protocol as protocols
from gatedffn.bench.check import Judge, cut, make_judge, make_slices
from gatedffn.bench.contestants import (
    GATING_CONTESTANTS,
    GPU_CONTESTANTS,
    Contestant,
    Ours,
    find,
    for_workload,
    kind_of,
)
from gatedffn.bench.inputs import inputs_of, make_inputs
from gatedffn.bench.limits import GpuLimits, Limit
from gatedffn.bench.outcomes import Entry, Measured, Outcome, Timing
from gatedffn.bench.report import cells, color, headers, title
from gatedffn.bench.workloads import GPU_MAIN, GPU_QUICK, Workload, choose, get_device
from gatedffn.cli.app import app
from gatedffn.errors import SettingError
from gatedffn.layers import FeedForward
from gatedffn.variants import VARIANTS


def layer_workload(**more: Any) -> Workload:
    return Workload(tokens=70, d_model=32, d_hidden=96, device="cuda", **more)


def gating_workload(*, training: bool = False, **more: Any) -> Workload:
    """Of forward, or of backward alone."""
    return Workload(
        tokens=70,
        d_model=0,
        d_hidden=96,
        device="cuda",
        part="gating",
        training=training,
        backward=training,
        **more,
    )


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEDFFN_TUNE", "off")
    fake_gpu.install(monkeypatch.setattr)
    for name, module in fake_gpu.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def results(kind: type[Contestant], workload: Workload) -> dict[str, Tensor]:
    contestant = kind(workload, inputs_of(workload), torch.get_num_threads())
    with contestant.mode():
        for _ in range(3):
            contestant.prepare()
            contestant.step()
    return cut(contestant.results(), make_slices(workload))


def judge(workload: Workload) -> Judge:
    return make_judge(workload, inputs_of(workload), make_slices(workload))


# Workloads.


def test_the_rows_have_the_bars_first() -> None:
    names = [workload.name for workload in GPU_MAIN]
    assert names[:7] == [
        "gating-16384x14336-bfloat16",
        "gating-backward-16384x14336-bfloat16",
        "8192x4096x14336-bfloat16",
        "training-8192x4096x14336-bfloat16",
        "1x4096x14336-bfloat16-graph",
        "16x4096x14336-bfloat16-graph",
        "training-262144x4096x14336-bfloat16-tile8192",
    ]
    assert len(set(names)) == len(GPU_MAIN)
    assert {workload.device for workload in GPU_MAIN} == {"cuda"}
    assert {workload.dtype for workload in GPU_MAIN} == {"bfloat16", "float32"}
    assert [workload.tokens for workload in GPU_MAIN if workload.large] == [262144]
    assert choose([], "swiglu", quick=False, device="cuda") == GPU_MAIN
    assert choose([], "swiglu", quick=True, device="cuda") == GPU_QUICK
    assert choose(["float32"], "swiglu", quick=True, device="cuda") == GPU_MAIN[-1:]


def test_what_gating_moves() -> None:
    workload, backward = (
        gating_workload(dtype="bfloat16"),
        gating_workload(dtype="bfloat16", training=True),
    )
    assert workload.flops == 0
    assert workload.least_bytes == 3 * 70 * 96 * 2
    assert backward.least_bytes == 5 * 70 * 96 * 2
    assert gating_workload(training=True, variant="relu").least_bytes == 3 * 70 * 96 * 4
    limit = Limit(flops=1.0, bytes=workload.least_bytes, sources={})
    assert limit.bound(workload) == "reading"
    assert limit.seconds(workload) == 1.0
    assert title(backward) == "gating, backward, SwiGLU, 70 x 96, bfloat16"
    assert title(GPU_MAIN[4]).endswith("1 token, 4096 x 14336, bfloat16, as a CUDA graph")
    assert title(GPU_MAIN[6]).endswith("bfloat16, tile=8192")


def test_large_rows_take_fewer_rounds() -> None:
    protocol = protocols.GPU_FULL
    assert protocol.of(GPU_MAIN[0]) is protocol
    assert protocol.of(GPU_MAIN[6]).rounds == 2
    assert protocols.Protocol(rounds=1).of(GPU_MAIN[6]).rounds == 1


def test_unknown_devices_and_contestants() -> None:
    with pytest.raises(SettingError, match="device is 'tpu': it must be one of cpu, cuda"):
        get_device("tpu")
    with pytest.raises(SettingError, match="no contestant is called 'jax': choose from gatedffn,"):
        find(("jax",), "cuda")


# Contestants.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("kind", [gating.Eager, gating.Ours])
def test_gating_of_every_variant(kind: type[Contestant], variant: str, training: bool) -> None:
    workload = gating_workload(dtype="bfloat16", variant=variant, training=training)
    assert judge(workload).verdict(results(kind, workload)).ratio <= 1.0


@pytest.mark.parametrize("training", [False, True])
def test_a_peer_that_overwrites_its_inputs(training: bool) -> None:
    workload = gating_workload(training=training)
    assert judge(workload).verdict(results(gating.Liger, workload)).ratio <= 1.0


@pytest.mark.parametrize("training", [False, True])
def test_each_result_of_gating_is_judged(training: bool) -> None:
    workload = gating_workload(training=training)
    right = results(gating.Eager, workload)
    assert right.keys() == ({"d_gate", "d_up"} if training else {"hidden"})
    for name, tensor in right.items():
        for wrong in (tensor.roll(1, 0), tensor.flip(1), 1.05 * tensor, tensor * torch.nan):
            verdict = judge(workload).verdict({**right, name: wrong})
            assert verdict.name == name
            assert verdict.ratio > Contestant.tolerance(workload)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Ours, gpu_peers.Liger, gpu_peers.Quack])
def test_a_layer(kind: type[Contestant], training: bool) -> None:
    workload = layer_workload(dtype="bfloat16", training=training)
    assert judge(workload).verdict(results(kind, workload)).ratio <= 1.0


def test_quack_without_a_gate_and_with_the_halves_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = layer_workload(dtype="bfloat16", training=True, variant="relu")
    assert judge(workload).verdict(results(gpu_peers.Quack, workload)).ratio <= 1.0
    gated = layer_workload(dtype="bfloat16")
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda both, dim: stack(both[::-1], dim))
    assert judge(gated).verdict(results(gpu_peers.Quack, gated)).ratio > 1.0


@pytest.mark.parametrize("variant", ["swiglu", "relu"])
@pytest.mark.parametrize("training", [False, True])
def test_the_products_alone_are_the_work_of_the_layer(training: bool, variant: str) -> None:
    workload = layer_workload(training=training, variant=variant)
    products = gpu_peers.Products(workload, make_inputs(workload), 1)
    with FlopCounterMode(display=False) as counted:
        products.step()
    assert counted.get_total_flops() == workload.flops


def test_a_tiled_row_keeps_the_input_alone() -> None:
    workload = layer_workload(training=True, tile=16)
    layer = Ours(workload, make_inputs(workload), 1).plain
    assert isinstance(layer, FeedForward)
    assert layer.save == "input"
    assert layer.tile == 16
    assert judge(workload).verdict(results(Ours, workload)).ratio <= 1.0


def test_ours_says_by_which_way() -> None:
    workload = layer_workload()
    ours = Ours(workload, make_inputs(workload), 1)
    assert list(ours.ways()) == ["inference", "training, forward", "training, backward"]


def test_a_way_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("gatedffn.bench.contestants.explain", failing)
    ours = Ours(layer_workload(), make_inputs(layer_workload()), 1)
    assert ours.ways() == {"explain": "failed with: out of memory"}


@pytest.mark.parametrize("name", list(GPU_CONTESTANTS))
def test_every_contestant_says_what_it_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_of(GPU_CONTESTANTS[name])
    monkeypatch.setattr(gpu_peers.Liger, "needs", ("no_such_package",))
    monkeypatch.setattr(gpu_peers.Quack, "needs", ("no_such_package",))
    workload = layer_workload(dtype="bfloat16")
    absent = name in ("liger", "quack")
    assert kind.refusal(workload) == ("not installed: no_such_package" if absent else None)


def test_peers_decline_what_they_cannot() -> None:
    late = layer_workload(variant="xielu")
    assert gpu_peers.Liger.refusal(late) == "has no xielu, only swiglu and geglu_tanh"
    assert gating.Liger.refusal(late) == "has no xielu, only swiglu and geglu_tanh"
    assert (gpu_peers.Quack.refusal(late) or "").startswith("has no xielu, only relu, ")
    assert gpu_peers.Quack.refusal(layer_workload()) == "computes float32 in TF32"
    odd = Workload(tokens=4, d_model=36, d_hidden=96, dtype="bfloat16", device="cuda")
    assert gpu_peers.Quack.refusal(odd) == "its kernels need sizes that 8 divides"


def test_who_chooses_by_timing_is_built_alone() -> None:
    alone = {name for name, place in GPU_CONTESTANTS.items() if kind_of(place).alone(GPU_MAIN[2])}
    assert alone == {"gatedffn", "gatedffn-compile", "compile", "quack"}
    assert gpu_peers.Liger.alone(GPU_MAIN[6])  # too large to be built beside another


def test_who_takes_part_in_a_row() -> None:
    both = find(("quack", "eager"), "cuda")
    assert for_workload(both, GPU_MAIN[2]) == both
    assert for_workload(both, GPU_MAIN[0]) == {"eager": GATING_CONTESTANTS["eager"]}


@pytest.mark.parametrize("graph", [False, True])
def test_a_worker_gives_its_memory_back(
    graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, made = fake_gpu.Runtime(), list[Ours]()

    class Kept(Ours):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    fake_gpu.install(monkeypatch.setattr, runtime)
    workload = layer_workload(training=True, graph=graph)
    message = {"workload": asdict(workload), "threads": 1, "folder": str(tmp_path)}
    turn, answer = worker._make_ready(Kept, message)
    assert answer["finite"]
    assert "inference" in answer["ways"]
    (ours,) = made
    assert len(runtime.said) == 1
    assert ours.output is ours.x
    assert ours.x.grad is None
    assert len(turn({"seconds": 0.001, "fewest": 2, "most": 3})["times"]) >= 2
    assert runtime.said == ["emptied", "emptied"]
    assert ours.x.grad is None
    assert bool(runtime.graphs) == graph
    assert all(graph.replays >= 3 for graph in runtime.graphs)


# Figures.


def made_up() -> Measured:
    def outcome(name: str, seconds: float) -> Outcome:
        entry = Entry(contestant=name, label=name, version="1", yardstick=name == "products")
        return Outcome(entry=entry, timings=(Timing(seconds, 1),))

    rounds = {"gatedffn": 2.0, "eager": 6.0, "liger": 5.0, "products": 1.0}
    return Measured(
        workload=layer_workload(),
        outcomes=tuple(outcome(*each) for each in rounds.items()),
        limits=(Limit(flops=1e9, bytes=1e9, sources={}),),
    )


def test_the_products_are_no_peer() -> None:
    measured = made_up()
    peer = figures.best_peer(measured)
    assert peer is not None
    assert peer.entry.contestant == "liger"
    ours = figures.figures(measured, measured.outcomes[0])
    assert ours is not None
    assert (ours.to_eager, ours.to_best_peer, ours.to_products) == (3.0, 2.5, 0.5)
    table = cells(measured)
    assert headers(measured)[-1] == "x products"
    assert {len(line) for line in table} == {len(headers(measured))}
    assert {line[0]: line[-1] for line in table}["gatedffn"] == "0.50"


def test_colours_tell_contestants_apart() -> None:
    assert len({color(name) for name in GPU_CONTESTANTS}) == len(GPU_CONTESTANTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_limits(dtype: str) -> None:
    from gatedffn.bench.devices import cuda

    limit = GpuLimits(layer_workload(dtype=dtype), cuda()).measure()
    assert limit.sources == {"PyTorch's product": limit.flops, "PyTorch's copy": limit.bytes}
    assert min(limit.flops, limit.bytes) > 0


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from gatedffn.bench.devices import cuda

    monkeypatch.setattr(cuda(), "times", lambda *_, **__: [0.5, 0.25])
    limit = GpuLimits(layer_workload(), cuda()).measure()
    assert limit.bytes == 2 * 4096 / 0.25
    assert limit.flops == 2 * 64**3 / 0.25


def test_memory_of_a_step() -> None:
    found = memory.step_memory("gatedffn, save=input, tile=16", layer_workload())
    gradients = 4 * (70 * 32 + 3 * 32 * 96)
    assert found.extra == 10**6 - 100 - gradients
    assert found.saved == 0


# The command.

TINY = (
    gating_workload(training=True),
    layer_workload(dtype="bfloat16", training=True, graph=True, tile=16),
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes get that GPU too, and there are some small workloads."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    for module, name in ((run, "WORKER"), (run, "LIMITS"), (memory, "MEMORY")):
        monkeypatch.setattr(module, name, "fake_gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gatedffn.bench.workloads.QUICKS", {("cuda", "main"): TINY})
    protocol = protocols.Protocol(rounds=2, turn=0.002, fewest=1, most=3)
    monkeypatch.setattr("gatedffn.bench.protocol.GPU_QUICK", protocol)
    monkeypatch.setattr("gatedffn.machine.busy", lambda: 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["eager", "gatedffn, save=input, tile=16"]
    monkeypatch.setattr("gatedffn.bench.memory.modes", lambda _: modes)
    options = ["--device=cuda", "--quick", "--json", f"--out={tmp_path}"]
    who = "--contestants=gatedffn,liger,products"
    result = CliRunner().invoke(app, ["bench", *options, who])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    times: dict[str, dict[str, Any]] = {}
    for record in found["records"]:
        assert record["machine"]["gpu"]["name"] == "none"
        if record["kind"] == "time":
            assert record["reason"] is None
            assert record["figures"]["milliseconds"] > 0
            times.setdefault(record["row"]["name"], {})[record["contestant"]] = record
    assert list(times) == [workload.name for workload in TINY]
    gating, layer = times.values()
    assert list(gating) == ["gatedffn", "liger"]
    assert list(layer) == ["gatedffn", "liger", "products"]
    assert gating["liger"]["check"]["ratio"] <= 1.0
    assert layer["products"]["check"] is None
    assert layer["gatedffn"]["figures"]["to_products"] > 0
    assert "inference" in layer["gatedffn"]["ways"]
    counted = [record["mode"] for record in found["records"] if record["kind"] == "memory"]
    assert counted == ["eager", "gatedffn, save=input, tile=16"]
    assert all(Path(path).exists() for path in found["files"])


def test_a_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "--device=cuda", f"--out={tmp_path / 'out'}"])
    assert isinstance(result.exception, SettingError)
    assert "no CUDA device that PyTorch can use" in str(result.exception)
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["bench", "--device=tpu"])
    assert "it must be one of cpu, cuda" in str(result.exception)


@pytest.mark.usefixtures("here")
def test_the_processor_is_said_to_be_one_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gatedffn.cli.bench._Run.measure", stopped)
    hint = "--device cuda measures the GPU of this machine"
    result = CliRunner().invoke(app, ["bench", f"--out={tmp_path}"])
    assert result.exit_code == 130
    assert hint in result.output
    assert hint not in CliRunner().invoke(app, ["bench", "--device=cuda"]).output


@pytest.mark.usefixtures("here")
def test_a_row_that_cannot_be_measured_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(workload: Workload, *_: object) -> Measured:
        measured.append(workload.name)
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(run, "measure", measure)
    result = CliRunner().invoke(app, ["bench", "--device=cuda", "--quick", f"--out={tmp_path}"])
    assert result.exit_code == 1
    assert measured == [workload.name for workload in TINY]
    assert result.output.count("could not be measured: CUDA out of memory") == len(TINY)
    kept = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["row"]["name"], r["reason"]) for r in kept] == [
        ("fault", workload.name, "CUDA out of memory") for workload in TINY
    ]


@pytest.mark.usefixtures("here")
def test_the_patience_is_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def stopped(run: Any) -> None:
        seen.append(run.protocol.patience)
        raise KeyboardInterrupt

    monkeypatch.setattr("gatedffn.cli.bench._Run.measure", stopped)
    options = ["bench", "--device=cuda", f"--out={tmp_path}"]
    CliRunner().invoke(app, [*options, "--patience=30"])
    CliRunner().invoke(app, options)
    assert seen == [30.0, protocols.GPU_FULL.patience]
    assert CliRunner().invoke(app, [*options, "--patience=0"]).exit_code == 2


@pytest.mark.usefixtures("here")
def test_nothing_is_left_to_measure(tmp_path: Path) -> None:
    options = ["--device=cuda", "--workload=gating", "--contestants=quack", f"--out={tmp_path}"]
    result = CliRunner().invoke(app, ["bench", *options])
    assert "no workload measures quack" in str(result.exception)
