"""A whole model in the bench: its contestants agree, and what is wrong in one is found."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from bench import fake_gpu
from gatedffn.bench import decoder, inputs
from gatedffn.bench.check import cut, make_judge, make_slices
from gatedffn.bench.contestants import (
    DECODER_CONTESTANTS,
    OURS,
    Contestant,
    find,
    for_workload,
    kind_of,
)
from gatedffn.bench.decoder import Eager, make_decoder
from gatedffn.bench.inputs import inputs_of
from gatedffn.bench.workloads import GPU_DECODER, Workload, choose

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)

TRAINING = Workload(
    tokens=40,
    d_model=128,
    d_hidden=96,
    part="decoder",
    layers=2,
    device="cuda",
    dtype="bfloat16",
    training=True,
)
NEXT = replace(TRAINING, tokens=1, past=6, training=False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch.setattr)
    for module in (inputs, decoder):
        monkeypatch.setattr(module, "VOCABULARY", 50)


def ratio(kind: type[Contestant], workload: Workload) -> float:
    contestant = kind(workload, inputs_of(workload), 1)
    with contestant.mode():
        for _ in range(3):
            contestant.prepare()
            contestant.step()
    slices = make_slices(workload)
    found: dict[str, Tensor] = cut(contestant.results(), slices)
    assert found.keys() == {"output", *(("gate", "up", "down") if workload.training else ())}
    return make_judge(workload, inputs_of(workload), slices).verdict(found).ratio


@pytest.mark.parametrize("workload", [TRAINING, NEXT], ids=["training", "next"])
@pytest.mark.parametrize("name", ["gatedffn", "eager"])
def test_right_ones_pass(name: str, workload: Workload) -> None:
    assert ratio(kind_of(DECODER_CONTESTANTS[name]), workload) <= 1.0


class Without(Eager):
    """The last layer's feed-forward gives nothing."""

    def wrap(self, model: nn.Module) -> nn.Module:
        model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *given: 0 * given[2])
        return model


@pytest.mark.parametrize("workload", [TRAINING, NEXT], ids=["training", "next"])
def test_a_wrong_one_is_found(workload: Workload) -> None:
    assert ratio(Without, workload) > 5.0


def test_the_suite() -> None:
    suite = choose([], "swiglu", quick=False, device="cuda", suite="decoder")
    assert suite == GPU_DECODER
    assert [workload.training for workload in suite] == [True, False]
    assert 1.0e9 < suite[0].weights < 1.1e9  # and 65 million of the embeddings
    assert suite[0].flops == 6 * 2048 * suite[0].weights
    made = make_decoder(TRAINING, torch.device("cpu"))
    looked_up = made.get_parameter("model.embed_tokens.weight").numel()
    gains = 128 * (2 * TRAINING.layers + 1)
    counted = sum(parameter.numel() for parameter in made.parameters())
    vocabularies = (32_000 - 50) * 128
    assert TRAINING.weights == counted - looked_up - gains + vocabularies
    assert for_workload(find((OURS, "liger"), "cuda"), TRAINING) == {
        OURS: DECODER_CONTESTANTS[OURS]
    }


def test_a_whole_name_is_of_one_workload() -> None:
    (one,) = choose(["8192x4096x14336-bfloat16"], "swiglu", quick=False, device="cuda")
    assert not one.training
    assert len(choose(["8192x4096x14336"], "swiglu", quick=False, device="cuda")) == 2
