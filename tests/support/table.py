"""The tables of configurations compiled ahead of time: what each of them takes of a chip, as data.

    PYTHONPATH=src:tests python -m support.table

compiles all of them, some minutes on a core, and writes tests/gpu/compiled.json anew. That is due
when a kernel, a table or Triton changes; a test compiles some of them and compares.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import triton
from torch import Tensor

from gatedffn.files import written_aside
from gatedffn.ops import gpu
from gatedffn.ops.feed_forward import Weights
from gatedffn.ops.feed_forward.gpu import configs, few, fused, fused_backward, tiles
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.variants import VARIANTS, Variant
from support import ahead
from support.ahead import TARGETS, Binary, Launch
from support.fused import drawn_parameters

PATH = Path(__file__).parents[1] / "gpu" / "compiled.json"
COMMAND = "PYTHONPATH=src:tests python -m support.table"
TOKENS, D_MODEL, D_HIDDEN = 8192, 4096, 14336
CHIPS: dict[int, configs.Chip] = {80: "sm_80", 90: "sm_90", 100: "sm_100"}
INSTRUCTIONS = {
    "mma.sync": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "copies of tiles": r"cp\.async\.bulk\.tensor\.\dd\.shared",
    "stores of tiles": r"cp\.async\.bulk\.tensor\.\dd\.global",
    "copies of 16 bytes": r"cp\.async\.cg",
    "loads": r"ld\.global",
    "loads of 16 bytes": r"ld\.global[\w.:]*v4\.b32",
}
"""Those that tell how a kernel multiplies and reads, and what they look like in PTX."""

Kernel = Literal["hidden_values", "branch_gradients", "few", "few, no gate"]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table on a chip; `aligned` says whether rows begin at multiples of 16 bytes."""

    kernel: Kernel
    target: int
    kind: gpu.Kind
    cut: Config | few.Cut
    aligned: bool = True
    tokens: int = TOKENS

    def named(self) -> Record:
        """What the record is of."""
        return {**asdict(self), "cut": asdict(self.cut)}


def rows() -> list[Row]:
    """All of them: those of the fused kernels on each chip, aligned or not, and those of few."""
    found: list[Row] = []
    for target, kernel, kind in (
        (target, kernel, kind)
        for target in TARGETS
        for kernel in get_args(configs.Kernel)
        for kind in get_args(gpu.Kind)
    ):
        for aligned, chip in ((True, CHIPS[target]), (False, "other")):
            for fit in configs.TABLE:
                if (fit.kernel, fit.chip, fit.kind) == (kernel, chip, kind):
                    cut = fit.config if aligned else configs.askew(fit.config, kind)
                    found.append(Row(kernel, target, kind, cut, aligned))
        if kernel == "hidden_values":
            for (tokens, gated), of_few in few.CUTS[CHIPS[target]].items():
                name: Kernel = "few" if gated else "few, no gate"
                found.append(Row(name, target, kind, of_few, tokens=tokens))
    return list(dict.fromkeys(found))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, gap: int = 0) -> Tensor:
    """With `gap` elements between the rows. Memory that is never touched takes no room."""
    *rows, columns = shape
    return torch.empty(*rows, columns + gap, dtype=dtype)[..., :columns]


@contextmanager
def multiplying(kind: gpu.Kind) -> Iterator[torch.dtype]:
    """PyTorch set to multiply float32 as a kind says; the kind's dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield torch.bfloat16 if kind == "half" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(row: Row, patch: Any) -> Record:
    """What a kernel of SwiGLU takes with it; `patch` is pytest's, or sets attributes as it does."""
    patch.setattr(tiles, "_multiprocessors", lambda _: 132)
    patch.setattr(few, "chip", lambda _: CHIPS[row.target])
    with multiplying(row.kind) as dtype:
        launch = _launch(row, dtype)
    binary = launch.binary
    found = {name: bool(re.search(what, launch.ptx)) for name, what in INSTRUCTIONS.items()}
    return {
        **row.named(),
        **{"name": binary.name, "warps": binary.warps, "registers": binary.registers},
        **{"stack": binary.stack, "shared": binary.shared},
        "instructions": [name for name, there in found.items() if there],
        "waits": row.target == 90 and "wgmma" in launch.ptx and serialized(launch),
    }


def binary_of(record: Record) -> Binary:
    """A record as what the compiler made, without its code."""
    of = {name: record[name] for name in ("name", "target", "warps", "registers", "stack")}
    return Binary(**of, shared=record["shared"], ptx="", code=b"")


def _launch(row: Row, dtype: torch.dtype) -> Launch:
    swiglu, gap = VARIANTS["swiglu"], 0 if row.aligned else 1
    if not isinstance(row.cut, few.Cut):
        kernel = hidden if row.kernel == "hidden_values" else branch_gradients
        return kernel(row.target, swiglu, row.cut, dtype, gap=gap)
    gate, up = empty(2, D_HIDDEN, D_MODEL, dtype=dtype)
    weights = Weights(gate, up if row.kernel == "few" else None, None, None, None, None)
    name = "swiglu" if row.kernel == "few" else "swish"
    x, y = empty(row.tokens, D_MODEL, dtype=dtype), empty(row.tokens, D_HIDDEN, dtype=dtype)
    few._prepared.cache_clear()
    with ahead.compiling(row.target) as launches:
        few.feed_forward(x, weights, name, {"beta": 1.0}, y, row.cut)
    few._prepared.cache_clear()
    return launches[0]


def hidden(
    target: int,
    row: Variant,
    config: Config,
    dtype: torch.dtype,
    save: bool = True,
    gap: int = 0,
    written_gap: int = 0,
) -> Launch:
    """The launch of the hidden values; rows of operands, or of results, lie a gap apart."""
    weights = empty(2, D_HIDDEN, D_MODEL, dtype=dtype, gap=gap)
    bias = empty(D_HIDDEN, dtype=dtype)
    up = weights[1] if row.gated else None
    of_linear = bias if row.gated else None
    places = [empty(TOKENS, D_HIDDEN, dtype=dtype, gap=gap or written_gap) for _ in range(3)]
    with ahead.compiling(target) as launches:
        fused.hidden_values(
            empty(TOKENS, D_MODEL, dtype=dtype, gap=gap),
            weights[0],
            bias,
            up,
            of_linear,
            row.name,
            row.defaults,
            places[0],
            places[1] if save else None,
            places[2] if save and row.gated else None,
            config,
        )
    return launches[0]


def branch_gradients(
    target: int,
    row: Variant,
    config: Config,
    dtype: torch.dtype,
    learned: bool = False,
    gap: int = 0,
) -> Launch:
    """The launch of the gradients of the branches."""
    branches = [empty(TOKENS, D_HIDDEN, dtype=dtype, gap=gap) for _ in range(5)]
    parameters = drawn_parameters(row, D_HIDDEN, learned, torch.device("cpu"))
    with ahead.compiling(target) as launches:
        fused_backward.branch_gradients(
            empty(TOKENS, D_MODEL, dtype=dtype, gap=gap),
            empty(D_MODEL, D_HIDDEN, dtype=dtype, gap=gap),
            branches[0],
            branches[1] if row.gated else None,
            row.name,
            parameters,
            branches[2],
            branches[3] if row.gated else None,
            branches[4],
            [name for name, value in parameters.items() if isinstance(value, torch.Tensor)],
            config,
        )
    return launches[0]


def serialized(launch: Launch) -> bool:
    """Whether the assembler had to let products wait for each other, as it then remarks."""
    from triton.backends import nvidia

    assert nvidia.__file__ is not None
    tool = Path(nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(launch.ptx)
        command = [str(tool), "-v", "--gpu-name=sm_90a", str(source), "-o", f"{source}.bin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "serialized" in done.stderr


def read() -> Record:
    """The data: the version of Triton, and a record of each row."""
    found: Record = json.loads(PATH.read_text(encoding="utf-8"))
    return found


class _Always:
    def setattr(self, owner: object, name: str, value: object) -> None:
        setattr(owner, name, value)


def main() -> None:
    records = []
    for number, row in enumerate(every := rows(), 1):
        record = compiled(row, _Always())
        records.append(record)
        sys.stdout.write(f"{number} of {len(every)}: {binary_of(record)}\n")
        sys.stdout.flush()
    lines = ",\n".join(json.dumps(record) for record in records)
    with written_aside(PATH) as aside:
        aside.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
