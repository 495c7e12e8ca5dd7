"""The search that the table of the fused GPU kernels is to come from, which runs when asked to.

    python -m gatedffn.bench.gpu_search --out DIR

It runs every candidate on this machine's GPU in some shapes of each class of the table, checks what
it writes against PyTorch's own operations, and measures it: CUDA events, the cache flushed before
each repetition, the median. What it finds is added to DIR/gpu_search.jsonl, one JSON line for each
candidate and shape, at once: called again it goes on with those that are not there. The best are
printed as the table of configs.py has them.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn import machine
from gatedffn.bench.devices import check_device, cuda
from gatedffn.bench.gpu_kept import Kept, key_of
from gatedffn.bench.limits import Repeated
from gatedffn.bench.records import Record
from gatedffn.errors import GatedFFNError
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward.gpu import configs
from gatedffn.ops.feed_forward.gpu.configs import Config, Kernel, Operands

WARM, TIMED = 3, 15  # repetitions
GROUP = 16  # candidates that are compiled at once
LEFT = 3  # how the command ends whose time was up
SHARED = 227 << 10  # bytes that a program can have at most
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# tokens, d_model, d_hidden: the one that matters most, and one of each other class of the table.
SHAPES = ((8192, 4096, 14336), (4096, 2048, 768), (64, 4096, 14336), (256, 4096, 14336))

Timer = Callable[[Callable[[], object]], float]
Together = Callable[[Sequence[Callable[[], object]]], object]


def one_by_one(calls: Sequence[Callable[[], object]]) -> None:
    """Nothing is called before its turn."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is measured on."""

    tokens: int
    d_model: int
    d_hidden: int


def candidates(kernel: Kernel, kind: gpu.Kind, descriptors: bool) -> list[Config]:
    """The configurations of the table for all chips, and what lies around them."""
    found = {fit.config: None for fit in configs.TABLE if (fit.kernel, fit.kind) == (kernel, kind)}
    found |= dict.fromkeys(_grid(kernel, kind))
    return [c for c in found if descriptors or c.operands == "pointers"]


def _grid(kernel: Kernel, kind: gpu.Kind) -> Iterator[Config]:
    if kind == "float32":
        for tokens, units, warps in itertools.product((64, 128), (32, 64), (4, 8)):
            yield Config(tokens=tokens, units=units, deep=16, warps=warps, stages=3)
        return
    deep = 64 if kind == "half" else 32
    best: Operands = "joined" if kernel == "hidden_values" else "descriptors"
    sums = 2 if kernel == "hidden_values" else 1  # of a tile
    for tokens, width, warps, stages, flatten in itertools.product(
        (64, 128, 256), (128, 256), (4, 8), (3, 4), (False, True)
    ):
        # Half of the registers for the sums at most, and no warps without work.
        held = tokens * width / (32 * warps)
        bytes_in_flight = stages * (tokens + width) * deep * (2 if kind == "half" else 4)
        if not 32 <= held <= 128 or bytes_in_flight > SHARED:
            continue
        yield Config(
            tokens=tokens,
            units=width // sums,
            deep=deep,
            warps=warps,
            stages=stages,
            group=16 if width == 256 else 8,
            for_each=2 if 2 * bytes_in_flight <= SHARED and warps == 4 else 1,
            subtiles=(width // 128) if kernel == "hidden_values" else width // 32,
            operands=best,
            flatten=flatten,
        )
    if kernel == "hidden_values":
        for stages, group in itertools.product((3, 4), (8, 16)):
            yield Config(
                tokens=128,
                units=128,
                deep=deep,
                warps=4,
                stages=stages,
                group=group,
                operands="descriptors",
                specialize=True,
            )


class HiddenValues:
    """The forward kernel of SwiGLU in a shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        normal = _normal(dtype, device)
        self.x = normal(shape.tokens, shape.d_model)
        self.weights = normal(2, shape.d_hidden, shape.d_model) / shape.d_model**0.5
        self.out = self.x.new_empty(shape.tokens, shape.d_hidden)

    def run(self, config: Config) -> None:
        from gatedffn.ops.feed_forward.gpu import fused

        gate, up = self.weights
        fused.hidden_values(
            self.x, gate, None, up, None, "swiglu", {"beta": 1.0}, self.out, config=config
        )

    def expected(self, rows: slice) -> list[Tensor]:
        gate, up = (self.x[rows].double() @ w.double().t() for w in self.weights)
        return [F.silu(gate) * up]

    def results(self) -> list[Tensor]:
        return [self.out]


class BranchGradients:
    """The backward kernel of SwiGLU in a shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        normal = _normal(dtype, device)
        self.grad = normal(shape.tokens, shape.d_model)
        self.down = normal(shape.d_model, shape.d_hidden) / shape.d_hidden**0.5
        self.gate, self.up = normal(2, shape.tokens, shape.d_hidden)
        self.made = torch.empty(3, shape.tokens, shape.d_hidden, dtype=dtype, device=device)

    def run(self, config: Config) -> None:
        from gatedffn.ops.feed_forward.gpu import fused_backward

        fused_backward.branch_gradients(
            self.grad,
            self.down,
            self.gate,
            self.up,
            "swiglu",
            {"beta": 1.0},
            self.made[0],
            self.made[1],
            self.made[2],
            config=config,
        )

    def expected(self, rows: slice) -> list[Tensor]:
        d_hidden = self.grad[rows].double() @ self.down.double()
        gate, up = (t[rows].double().requires_grad_() for t in (self.gate, self.up))
        hidden = F.silu(gate) * up
        return [*torch.autograd.grad(hidden, (gate, up), d_hidden), hidden.detach()]

    def results(self) -> list[Tensor]:
        return list(self.made)


CALLS: dict[Kernel, type[HiddenValues] | type[BranchGradients]] = {
    "hidden_values": HiddenValues,
    "branch_gradients": BranchGradients,
}


def _normal(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return normal


def wrong(
    call: HiddenValues | BranchGradients, expected: list[Tensor], rows: list[slice]
) -> str | None:
    """What is wrong with the results of a call: a NaN that was left, or an error beyond rounding.

    Errors are over the largest value, and held to some units of the dtype, with room for sums of
    float32 in another order.
    """
    for result, true in zip(call.results(), expected, strict=True):
        if result.isnan().any():
            return "it left values unwritten"
        made = torch.cat([result[part] for part in rows]).double()
        error = ((made - true).abs().max() / true.abs().max()).item()
        unit = torch.finfo(result.dtype).eps
        bound = max(unit, 1e-3) if gpu.kind_of(result.dtype) == "tf32" else unit + 1e-6
        if not error <= 2 * bound:
            return f"its error is {error:.2g} of the largest value"
    return None


def measured(
    kernel: Kernel,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    among: list[Config],
    timer: Timer,
    together: Together = one_by_one,
) -> Iterator[Record]:
    """Runs, checks and times the candidates in a shape: for each its time, or why it has none.

    `together` calls some of them for the first time, so that they are compiled. Each candidate
    comes twice: before it runs, as one that did not come back, and afterwards.
    """
    call = CALLS[kernel](shape, dtype, device)
    # The first and the last tokens: what is between them would take float64 too long.
    rows = [slice(0, 128), slice(max(128, shape.tokens - 128), shape.tokens)]
    parts = [call.expected(part) for part in rows]
    expected = [torch.cat(each) for each in zip(*parts, strict=True)]
    for number, config in enumerate(among):
        if number % GROUP == 0:
            some = among[number : number + GROUP]
            together([partial(call.run, each) for each in some])
        record = named(kernel, shape, dtype, config)
        yield {**record, "reason": "it did not come back", "seconds": None}
        for result in call.results():
            result.fill_(torch.nan)
        try:
            call.run(config)
            reason = wrong(call, expected, rows)
            seconds = timer(partial(call.run, config)) if reason is None else None
        except Exception as error:  # whatever the compiler or the chip has against a candidate
            reason, seconds = f"{type(error).__name__}: {str(error)[:200]}", None
        yield {**record, "reason": reason, "seconds": seconds}


def named(kernel: Kernel, shape: Shape, dtype: torch.dtype, config: Config) -> Record:
    """What a record is of."""
    name = str(dtype).removeprefix("torch.")
    return {"kernel": kernel, "dtype": name, "shape": asdict(shape), "config": asdict(config)}


def by_events(call: Callable[[], object]) -> float:
    """The median of some repetitions on the GPU, each with a cache that holds nothing of it."""
    steps = Repeated(call)
    cuda().times(steps, 0.0, fewest=WARM, most=WARM)
    return float(statistics.median(cuda().times(steps, 0.0, fewest=TIMED, most=TIMED)))


def fit_of(record: Record, chip: configs.Chip, kind: gpu.Kind) -> str:
    """The line of the table that the best candidate of a shape is worth."""
    tokens, units = record["shape"]["tokens"], record["shape"]["d_hidden"]
    limit = next(
        (most for most in (configs.FEW_TOKENS, configs.SOME_TOKENS) if tokens <= most), None
    )
    width = configs.NARROW if limit is None and units <= configs.NARROW else None
    fit = configs.Fit(record["kernel"], chip, kind, limit, width, Config(**record["config"]))
    return f"{fit},  # {1e6 * record['seconds']:.1f} us"


def _surroundings() -> Record:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": machine.sources(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def search(options: argparse.Namespace) -> bool:
    """Measures every kernel in every shape, and prints what is best.

    Candidates that are in the record are not measured again.

    Returns:
        Whether it came to the end before its time was up.

    Raises:
        SettingError: there is no GPU.
    """
    check_device("cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, chip = DTYPES[options.dtype], configs.chip_of(device)
    kind, kept = gpu.kind_of(dtype), Kept(options.out, _surroundings())
    end, all_done = time.monotonic() + 60 * options.minutes, True
    for shape in (Shape(*each) for each in options.shape or SHAPES):
        for kernel in options.kernel or get_args(Kernel):
            among = [
                config
                for config in candidates(kernel, kind, descriptors=chip in ("sm_90", "sm_100"))
                if key_of(named(kernel, shape, dtype, config)) not in kept.found
            ]
            left = len(among)
            if among and time.monotonic() < end:
                for record in measured(
                    kernel, shape, dtype, device, among, by_events, kept.together
                ):
                    known = key_of(record) in kept.found  # as one that did not come back
                    kept.add(record)
                    left -= known
                    if known and time.monotonic() > end:
                        break
            found = kept.of(kernel, dtype, asdict(shape))
            timed = [record for record in found if record["seconds"] is not None]
            if timed:
                best = min(timed, key=lambda record: record["seconds"])
                sys.stdout.write(fit_of(best, chip, kind) + "\n")
            words = f"{len(timed)} of {len(found)} candidates ran and were right, {left} are left"
            sys.stdout.write(f"# {kernel} in {shape}: {words}\n")
            sys.stdout.flush()
            all_done &= not left
    return all_done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gatedffn.bench.gpu_search")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--kernel", action="append", choices=get_args(Kernel), help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--shape",
        action="append",
        nargs=3,
        type=int,
        metavar=("TOKENS", "D_MODEL", "D_HIDDEN"),
        help="may be repeated; default: one for each class of the table",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="then it ends, and goes on when called again"
    )
    try:
        return 0 if search(parser.parse_args(arguments)) else LEFT
    except GatedFFNError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
