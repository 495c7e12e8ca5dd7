"""Steps of a run on a GPU without one: stand-ins that fail as told, and the real ones, tiny.

These run in processes of their own, which a run starts. The real ones get the stub in place of
`torch.cuda`, and contestants in the step's process, for starting theirs is most of what they take.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - once, not in each process

from bench import fake_gpu
from gatedffn import machine
from gatedffn.bench import (
    contestants,
    decoder,
    devices,
    experts,
    gating,
    gpu_check,
    gpu_search,
    inputs,
    memory,
    protocol,
    report,
    run,
    worker,
    workloads,
)
from gatedffn.bench.contestants import kind_of
from gatedffn.bench.gpu_steps import STEPS, UNFINISHED, Step
from gatedffn.bench.limits import _make_ready as limits_ready
from gatedffn.bench.messages import Message
from gatedffn.bench.process import NoAnswer
from gatedffn.bench.records import add
from gatedffn.bench.workloads import Workload

SHARE = 200.0
GPU = {"name": "none", "memory_bytes": 4 << 30, "driver": None, "cuda": None, "triton": "3"}
MACHINE = {"python": "3", "torch": "2", "gatedffn": "0", "commit": None, "gpu": GPU}
FAULTS = ("raises", "out of memory", "killed", "does not compile", "hangs")


def stand_in(name: str, fault: str = "", seconds: float = SHARE) -> Step:
    """A step that leaves a record, unless it fails before or after that."""
    return Step(name, seconds, "bench.rehearsal:stand", (name, fault))


def stand(folder: Path, seconds: float, name: str, fault: str) -> int:
    del seconds
    if fault == "raises":
        raise RuntimeError("no luck")
    if fault == "hangs":
        with subprocess.Popen(["sleep", "600"]) as child:
            (folder / "child").write_text(str(child.pid))
            child.wait()
    reason = "CompilationError: no such instruction" if fault == "does not compile" else None
    record = {"kind": "check", "row": {"name": name}, "ratio": 0.5, "reason": reason}
    add(folder, [{**record, "machine": MACHINE}])
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return UNFINISHED if fault == "its time is up" else 0


# The real steps.


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny(Workload):
    """Named as the workload that it stands for."""

    of: str = ""

    @property
    def name(self) -> str:
        return self.of


def _tiny(workload: Workload) -> Tiny:
    decoder = workload.part == "decoder"
    sizes = {
        "tokens": 1 if workload.tokens == 1 else 70,
        "d_model": (128 if decoder else 32) if workload.d_model else 0,
        "d_hidden": 96,
        "experts": min(workload.experts, 8),
        "slots": min(workload.slots, 2),
        "layers": min(workload.layers, 2),
        "past": min(workload.past, 4),
    }
    return Tiny(**{**asdict(workload), **sizes}, of=workload.name)


class Here:
    """A contestant, or what else takes turns, in this process."""

    def __init__(self, arguments: Sequence[str], errors: Path, threads: int) -> None:
        module, *names = arguments
        self.ready: Callable[[Message], Any] = limits_ready
        if module == memory.MEMORY:
            self.ready = lambda message: (None, asdict(memory.step_memory(names[0], message["w"])))
        elif names:
            self.ready = lambda message: worker._make_ready(kind_of(names[0]), message)
        self.answering: Any = None

    def send(self, message: Message) -> None:
        self.message = message

    def receive(self, seconds: float) -> Message:
        try:
            if self.answering is not None:
                answer: Message = self.answering(self.message)
                return answer
            workload = self.message["workload"]
            workload.pop("of", None)
            self.answering, answer = self.ready({**self.message, "w": Workload(**workload)})
        except Exception as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error
        return answer

    def ask(self, message: Message, seconds: float) -> Message:
        self.send(message)
        return self.receive(seconds)

    def close(self) -> None: ...


def tiny_steps(fault: str = "") -> tuple[Step, ...]:
    """All steps of a run; with a fault this library runs out of memory in each."""
    return tuple(
        replace(step, place="bench.rehearsal:tiny", arguments=(step.name, fault)) for step in STEPS
    )


def tiny(folder: Path, seconds: float, name: str, fault: str) -> int:
    put: Callable[[object, str, object], None] = setattr
    torch.set_num_threads(1)
    fake_gpu.install(put)
    fake_gpu.bring_modules()
    assert devices.cuda()._other_memory.numel()  # made here: not all who write it are in inference
    put(torch.cuda, "is_available", lambda: True)
    put(machine, "busy", lambda: 0.0)
    put(contestants, "compiled", lambda module: module)
    put(gating, "_compiled", lambda function: function)
    for module in (run, memory):
        put(module, "Process", Here)
    put(run, "PAUSE", 0.0)
    put(workloads, "VOCABULARY", 50)
    for of_words in (decoder, inputs):
        put(of_words, "VOCABULARY", 50)
    put(protocol, "GPU_FULL", protocol.Protocol(rounds=2, turn=0.001, fewest=1, most=2))
    put(report, "draw", lambda *_: [])
    put(gpu_search, "search", lambda _: folder.name.endswith("-3"))  # its third try ends it
    tables = {
        suite: tuple(_tiny(workload) for workload in of)
        for suite, of in workloads.SUITES["cuda"].items()
    }
    put(workloads, "SUITES", {"cuda": tables})
    some = gpu_check.WORKLOADS[:8]
    put(gpu_check.check, "__defaults__", (tuple(replace(w, **_small(w)) for w in some),))
    if fault:
        for kind in (contestants.Ours, gating.Ours, experts.Ours, decoder.Ours):
            put(kind, "__init__", _out_of_memory)
        put(gpu_search, "search", _out_of_memory)
    (step,) = (step for step in STEPS if step.name == name)
    return step.call(folder, seconds)


def _small(workload: Workload) -> dict[str, Any]:
    return {
        "tokens": min(workload.tokens, 70),
        "d_hidden": 96,
        "d_model": min(workload.d_model, 32),
    }


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")
