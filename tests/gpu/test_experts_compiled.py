"""The kernels of experts as they would run on GPUs that are not here: they fit, and are made of
what they should be.
"""

import re
from collections.abc import Iterator

import pytest
import torch
from support import ahead
from support.ahead import Launch, every_target, needs_compiler
from torch import Tensor

from gatedffn.ops.experts.gpu import grouped
from gatedffn.ops.spec import Spec, facts, matrices
from gatedffn.variants import VARIANTS

pytestmark = needs_compiler
NAMES = ("x", "index", "weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
PRODUCTS = {
    "hidden_kernel",
    "product_kernel",
    "branch_gradients_kernel",
    "weight_gradient_kernel",
}
OTHERS = {"blocks_kernel", "sum_kernel", "bias_gradient_kernel"}


@pytest.fixture(autouse=True)
def same_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def launched(
    target: int,
    tokens: int,
    experts: int,
    widths: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    by_columns: bool = False,
    wanted: tuple[str, ...] = (),
) -> dict[str, Launch]:
    """The kernels of a call with packed weights and biases, and of its backward if anything is
    wanted. Memory that is never touched takes no room.
    """
    slots, (d_model, d_hidden), row = 8, widths, VARIANTS["swiglu"]

    def weight(rows: int, columns: int) -> Tensor:
        if by_columns:
            return torch.empty(experts, columns, rows, dtype=dtype).transpose(1, 2)
        return torch.empty(experts, rows, columns, dtype=dtype)

    x = torch.empty(tokens, d_model, dtype=dtype)
    index, weights = torch.zeros(tokens, slots, dtype=torch.int64), torch.empty(tokens, slots)
    gate, down = weight(2 * d_hidden, d_model), weight(d_model, d_hidden)
    gate_bias, down_bias = (torch.empty(experts, w.shape[1], dtype=dtype) for w in (gate, down))
    tensors = (x, index, weights, gate, None, down, gate_bias, None, down_bias)
    saved = [torch.empty(tokens * slots, d_hidden, dtype=dtype) for _ in range(2)]

    def spec(stage: str, given: tuple[Tensor, ...] = ()) -> Spec:
        return Spec(
            row.name,
            stage,
            torch.device("cpu"),
            "gpu",
            matrices(facts(tensors)),
            (1.0,),
            ("interleaved", "output", "gate_up"),
            wanted if given else (),
            tuple(m for m in matrices(facts(given)) if m is not None),
        )

    with ahead.compiling(target) as launches:
        grouped.forward(spec("forward"))(tensors, row.defaults)
        if wanted:
            of = spec("backward", (x, *saved))
            grouped.backward(of)(torch.empty_like(x), saved, tensors, row.defaults)
    for launch in launches:
        launch.assert_fits()
        assert not re.search(r"\b(atom|red)\.", launch.ptx), str(launch)
    return {launch.binary.name: launch for launch in launches}


@every_target
def test_a_step_of_training_fits(target: int) -> None:
    wanted = ("x", "weights", "gate", "down", "gate_bias")
    made = launched(target, 4096, 32, (2048, 768), wanted=wanted)
    assert made.keys() == PRODUCTS | OTHERS
    product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[target]
    for name in PRODUCTS:
        ptx = made[name].ptx
        assert product in ptx, name
        assert "cp.async.cg" in ptx, name  # 16 bytes at a time, past the registers
    assert "ld.global.v4" in made["sum_kernel"].ptx


# Steps with few tokens for an expert; the widest tiles, of weights that are stored (in, out).
@pytest.mark.parametrize(
    ("tokens", "experts", "widths", "by_columns"),
    [(8, 128, (2048, 768), False), (4096, 8, (4096, 14336), True)],
    ids=["few", "wide"],
)
def test_other_cuts_fit_on_hopper(
    tokens: int, experts: int, widths: tuple[int, int], by_columns: bool
) -> None:
    made = launched(90, tokens, experts, widths, by_columns=by_columns)
    for name in PRODUCTS & made.keys():
        assert "cp.async.cg" in made[name].ptx, name
        assert re.search(r"wgmma\.mma_async" if by_columns else r"mma\.sync", made[name].ptx)
    assert made["hidden_kernel"].binary.target == 90


@pytest.mark.parametrize("kind", ["float32", "tf32"])
def test_float32_fits(kind: str) -> None:
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    made = launched(80, 512, 32, (2048, 768), torch.float32)
    for name in PRODUCTS & made.keys():
        assert ("mma.sync" in made[name].ptx) == (kind == "tf32")
