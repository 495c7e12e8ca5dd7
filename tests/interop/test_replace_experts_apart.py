"""Experts that get their part of the rows, that are alone, or whose weights lie otherwise."""

import copy
from typing import Any

import pytest
import torch
from support.architectures import results
from support.mixtures import mixture
from support.stacked import COUNT, HIDDEN, WIDTH, Biased, NoGate, Stack
from support.zoo import inputs_of
from torch import Tensor, nn

import gatedffn as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours


class Parts(nn.Module):
    """As in Llama 4: (in, out), the rows of all experts one after the other, sizes as numbers."""

    phi: nn.Module = nn.SiLU()

    def __init__(self) -> None:
        super().__init__()
        self.count, self.width = COUNT, WIDTH
        self.first = nn.Parameter(torch.randn(COUNT, WIDTH, 2 * HIDDEN))
        self.second = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH))
        self.act = self.phi

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = self.up(rows.view(self.count, -1, self.width)).chunk(2, -1)
        made: Tensor = (self.act(gate) * up) @ self.second
        return made.view(-1, self.width)

    def up(self, parts: Tensor) -> Tensor:
        return parts @ self.first


class OfAnother(Parts):
    def up(self, parts: Tensor) -> Tensor:
        return parts.flip(0) @ self.first


class Opened(Parts):
    """Where a row is 0 its output is too, and its gradient is not."""

    phi = nn.Sigmoid()


class Shifted(Parts):
    def up(self, parts: Tensor) -> Tensor:
        return parts @ self.first + 0.5


def new(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def rows(count: int = 3 * COUNT) -> Tensor:
    """Some of them 0, as where a token was sent to another expert."""
    made = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    made[::3] = 0.0
    return made.requires_grad_()


def made_by(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def test_experts_that_get_their_part_of_the_rows() -> None:
    plain, model = new(Parts), new(Parts)
    (block,) = gf.replace(model, strict=True).replaced
    assert (block.variant, block.order) == ("swiglu", "gate_up")
    for count in (3 * COUNT, COUNT, 0):
        for mine, its in zip(made_by(model, rows(count)), made_by(plain, rows(count)), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    (told,) = gf.explain(model.float(), tokens=3, slots=1)
    assert (told.path, len(told.plans)) == ("operator", 3)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model(rows(COUNT + 1))  # its own forward says why


@pytest.mark.parametrize("kind", [OfAnother, Opened, Shifted])
def test_what_computes_something_else_is_left(kind: type[nn.Module]) -> None:
    (block,) = gf.replace(new(kind)).left
    assert block.reason is not None
    assert "does not take" not in block.reason


def test_those_that_are_not_chosen_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    experts = gf.interop.replacing.expert_block.experts  # type: ignore[attr-defined]

    def seen(*args: Any, **options: Any) -> Tensor:
        given.append(args[4])
        made: Tensor = experts(*args, **options)
        return made

    model = new(Parts)
    gf.replace(model)
    monkeypatch.setattr("gatedffn.interop.replacing.expert_block.experts", seen)
    model(rows(6 * COUNT))
    numbers = torch.arange(COUNT).repeat_interleave(6)
    numbers[::3] = COUNT
    assert torch.equal(given[0], numbers[:, None])


def test_llama_4() -> None:
    plain = mixture("llama4_text", interleave_moe_layer_step=1, num_experts_per_tok=1)
    model = copy.deepcopy(plain)
    report = gf.replace(model, strict=True)
    assert [b.name for b in report.replaced if "experts" in b.notes] == [
        "layers.0.feed_forward.experts"
    ]
    inputs = inputs_of(plain)
    wanted, got = results(plain, inputs), results(model, inputs)
    assert wanted.keys() == got.keys()
    largest = max(float(t.norm()) for t in wanted.values())
    for name, tensor in wanted.items():
        limit = 1e-6 * (float(tensor.norm()) + 1e-2 * largest)  # its norms are in float32
        assert float((got[name] - tensor).norm()) <= limit, name


@pytest.mark.parametrize("kind", [Stack, NoGate, Biased])
def test_a_single_expert(kind: type[Stack]) -> None:
    plain = new(kind)
    assert isinstance(plain, Stack)
    plain.count = 1
    for parameter in plain.parameters():
        parameter.data = parameter.data[:1].clone()
    model = copy.deepcopy(plain)
    gf.replace(model, strict=True)
    x = rows()
    index, weights = torch.tensor([[0, 1]]).expand(len(x), 2), torch.rand(len(x), 2).double()
    torch.testing.assert_close(model(x, index, weights), plain(x, index, weights))


@pytest.mark.parametrize("shapes", [((1, 1, 16), (1, 9, 16)), ((1, 9, 16), (1, 7, 16))], ids=str)
def test_embeddings_are_no_single_expert(shapes: tuple[tuple[int, ...], ...]) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = (nn.Parameter(torch.zeros(shape)) for shape in shapes)

    report = gf.replace(Patches())
    assert not report.left


REPORTED = {
    "jetmoe": ("layers.0.mlp", "in modules of their own, input_linear and output_linear"),
    "longcat_flash": ("layers.0.mlp.experts", "numbers of experts: 6 gate_up_proj, 4 down_proj"),
}


@pytest.mark.parametrize("kind", REPORTED)
def test_what_lies_otherwise_is_reported(kind: str) -> None:
    longcat: dict[str, Any] = {"zero_expert_num": 2, "num_hidden_layers": 2}
    (block,) = gf.replace(mixture(kind, **(longcat if kind == "longcat_flash" else {}))).left
    name, reason = REPORTED[kind]
    assert block.name == name
    assert reason in str(block.reason)


def test_flattened_experts_are_reported() -> None:
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "ffn_hidden_size": HIDDEN,
        "moe_num_experts": COUNT,
    }
    (block,) = gf.replace(DbrxExperts(DbrxFFNConfig(**sizes))).left  # type: ignore[no-untyped-call]
    assert block.name == "mlp"
    assert block.reason == "its experts are flattened, w1 and v1 and w2 each 32 x 12"
