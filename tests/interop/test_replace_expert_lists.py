"""A list of experts, as models of transformers 4 and of others hold them, is a list of blocks."""

import copy

import pytest
import torch
from support.architectures import OLD, results
from support.mixtures import mixture
from support.zoo import inputs_of
from torch import Tensor, nn

import gatedffn as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
WIDTH, COUNT = 12, 4
TYPES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "llama4_text"]


@pytest.mark.skipif(not OLD, reason="transformers 5 has stacks in their place")
@pytest.mark.parametrize("kind", TYPES)
def test_outputs_and_gradients_of_models_of_transformers_4(kind: str) -> None:
    plain = mixture(kind)
    model = copy.deepcopy(plain)
    report = gf.replace(model, strict=True)
    experts = [b for b in report.replaced if ".experts" in b.name]
    assert len(experts) == (1 if kind == "llama4_text" else COUNT)
    assert {b.variant for b in experts} == {"swiglu"}
    inputs = inputs_of(plain)
    wanted, got = results(plain, inputs), results(model, inputs)
    assert wanted.keys() == got.keys()
    names = [n for n in wanted if any(n.startswith(f"{b.name}.") for b in experts)]
    assert len(names) >= 2
    largest = max(float(t.norm()) for t in wanted.values())
    for name, tensor in wanted.items():
        limit = 1e-12 * (float(tensor.norm()) + 1e-2 * largest)
        assert float((got[name] - tensor).norm()) <= limit, name
    report.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_a_list_of_experts_is_a_list_of_blocks() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
            self.w2 = nn.Linear(8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
            return made

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, COUNT)
            self.experts = nn.ModuleList([Expert() for _ in range(COUNT)])

        def forward(self, x: Tensor) -> Tensor:
            weights, index = self.gate(x).softmax(-1).topk(2)
            made = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                tokens, slots = torch.where(index == number)
                made[tokens] += weights[tokens, slots, None] * expert(x[tokens])
            return made

    torch.manual_seed(0)
    plain = Block().double()
    model = copy.deepcopy(plain)
    report = gf.replace(model, strict=True)
    assert [b.name for b in report.replaced] == [f"experts.{i}" for i in range(COUNT)]
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
