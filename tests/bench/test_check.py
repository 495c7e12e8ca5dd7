"""The gate: right contestants pass, and each kind of wrong one is found."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatedffn.bench.check import Judge, cut, make_judge, make_slices
from gatedffn.bench.contestants import (
    CONTESTANTS,
    Contestant,
    Eager,
    Ours,
    OursCompiled,
    find,
    kind_of,
)
from gatedffn.bench.inputs import inputs_of, make_inputs
from gatedffn.bench.workloads import DTYPES, Dtype, Workload
from gatedffn.errors import SettingError
from gatedffn.variants import PAPER, VARIANTS

torch_uses_jit = pytest.mark.filterwarnings(
    r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"
)
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu}
USERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "glu": lambda gate, up: torch.sigmoid(gate) * up,
    "bilinear": lambda gate, up: gate * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "swiglu": lambda gate, up: F.silu(gate) * up,
}
"""The formulas of the paper as users write them."""


def results(kind: type[Contestant], workload: Workload) -> dict[str, Tensor]:
    contestant = kind(workload, inputs_of(workload), torch.get_num_threads())
    with contestant.mode():
        contestant.step()
        contestant.step()
    return cut(contestant.results(), make_slices(workload))


def judge(workload: Workload) -> Judge:
    return make_judge(workload, inputs_of(workload), make_slices(workload))


@pytest.mark.parametrize("kind", [Eager, Ours])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_right_ones_pass(kind: type[Contestant], variant: str) -> None:
    workload = Workload(tokens=70, d_model=32, d_hidden=96, training=True, variant=variant)
    assert judge(workload).verdict(results(kind, workload)).ratio <= 1.0


@torch_uses_jit
@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_ours_under_compile_passes(training: bool) -> None:
    workload = Workload(tokens=8, d_model=32, d_hidden=96, training=training)
    assert judge(workload).verdict(results(OursCompiled, workload)).ratio <= 1.0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", PAPER)
def test_eager_is_the_layer_that_a_user_writes(variant: str, training: bool) -> None:
    workload = Workload(tokens=5, d_model=8, d_hidden=12, training=training, variant=variant)
    inputs = make_inputs(workload)
    up = F.linear(inputs.x, inputs.up)
    gate = None if inputs.gate is None else F.linear(inputs.x, inputs.gate)
    hidden = UNGATED[variant](up) if gate is None else USERS[variant](gate, up)
    eager = Eager(workload, inputs, 1)
    with eager.mode():
        eager.step()
    assert torch.equal(eager.results()["output"], F.linear(hidden, inputs.down))


def test_inference_is_in_inference_mode() -> None:
    workload = Workload(tokens=5, d_model=8, d_hidden=12)
    eager = Eager(workload, make_inputs(workload), 1)
    with eager.mode():
        eager.step()
    assert eager.output.is_inference()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
def test_every_dtype(dtype: Dtype, training: bool) -> None:
    workload = Workload(tokens=70, d_model=32, d_hidden=96, training=training, dtype=dtype)
    assert judge(workload).verdict(results(Ours, workload)).ratio <= 1.0


def test_the_first_and_the_last_are_checked() -> None:
    slices = make_slices(Workload(tokens=1, d_model=8, d_hidden=1000))
    assert slices.tokens.tolist() == [0]
    assert {0, 999} <= set(slices.units.tolist())
    assert len(slices.units) <= 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["output", "x", "gate", "up", "down"])
def test_each_result_is_judged(dtype: Dtype, name: str) -> None:
    workload = Workload(tokens=70, d_model=32, d_hidden=96, training=True, dtype=dtype)
    right = results(Eager, workload)
    for wrong in (
        right[name].roll(1, 0),
        right[name].flip(1),
        1.05 * right[name],
        right[name].index_fill(0, torch.tensor([len(right[name]) - 1]), 0.0),
        right[name].index_fill(0, torch.tensor([0]), torch.nan),
    ):
        verdict = judge(workload).verdict({**right, name: wrong})
        assert verdict.name == name
        assert verdict.ratio > Eager.tolerance(workload)


def test_gelu_by_tanh_is_not_gelu() -> None:
    workload = Workload(tokens=70, d_model=64, d_hidden=96, variant="geglu")
    other = Workload(tokens=70, d_model=64, d_hidden=96, variant="geglu_tanh")
    assert judge(workload).verdict(results(Ours, other)).ratio > Eager.tolerance(workload)


def test_missing_and_misshapen_results_are_refused() -> None:
    workload = Workload(tokens=4, d_model=8, d_hidden=16, training=True)
    right = results(Eager, workload)
    with pytest.raises(ValueError, match=r"its results are \['output'\], not \['down', "):
        judge(workload).verdict({"output": right["output"]})
    with pytest.raises(ValueError, match=r"gate is \(8, 16\), not \(16, 8\)"):
        judge(workload).verdict({**right, "gate": right["gate"].T})


def test_a_forward_row_has_no_gradients() -> None:
    assert results(Ours, Workload(tokens=4, d_model=8, d_hidden=16)).keys() == {"output"}


def test_ours_under_compile_is_on_request() -> None:
    assert "gatedffn-compile" not in find(())
    assert set(CONTESTANTS) - set(find(())) == {"gatedffn-compile"}
    assert list(find(("gatedffn-compile",))) == ["gatedffn-compile"]


def test_unknown_contestants() -> None:
    with pytest.raises(SettingError, match="no contestant is called 'tensorflow': choose from gat"):
        find(("eager", "tensorflow"))


@pytest.mark.parametrize("name", list(CONTESTANTS))
def test_every_contestant_says_what_it_can(name: str) -> None:
    kind = kind_of(CONTESTANTS[name])
    reason = kind.refusal(Workload(tokens=1, d_model=8, d_hidden=16))
    assert (kind.version() is None) == (reason is not None)
    assert reason is None or reason.startswith("not installed: ")


def test_peers_decline_what_they_cannot() -> None:
    peers = import_module("gatedffn.bench.peers")
    training = Workload(tokens=1, d_model=8, d_hidden=16, training=True)
    assert peers.OpenVino.refusal(training) == "does not train"
    bfloat16 = Workload(tokens=1, d_model=8, d_hidden=16, dtype="bfloat16")
    assert peers.OnnxRuntime.refusal(bfloat16) == "computes float32 and float16, not bfloat16"
    late = Workload(tokens=1, d_model=8, d_hidden=16, variant="xielu")
    assert peers.Jax.refusal(late).startswith("xielu is not written for it here")
