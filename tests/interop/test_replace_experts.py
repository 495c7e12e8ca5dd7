"""Stacked experts of other libraries: computed here, from the same parameters, or left."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.architectures import results
from support.mixtures import mixture
from support.stacked import COUNT, HIDDEN, MUTANTS, VARIANTS, WIDTH, Biased, Stack
from support.zoo import inputs_of
from torch import Tensor, nn

import gatedffn as gf
from gatedffn.errors import SettingError
from gatedffn.interop.replacing.expert_block import ReplacedExperts

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
# fmt: off
TYPES = [
    "afmoe", "aria_text", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe",
    "flex_olmo", "flint", "glm4_moe", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "hunyuan_v1_moe", "inkling_text", "jamba", "kolibri1",
    "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_vl_moe_text",
]
OTHERS = {
    "deepseek_v4": "swiglu_clamp", "gpt_oss": "swiglu_oai", "minimax_m3_vl_text": "swiglu_oai",
    "nemotron_h": "relu2",
}
# fmt: on


def call(tokens: int = 9, slots: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """An input, an index and routing weights for the modules of `stacked.py`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(COUNT, (tokens, slots), generator=generator)
    weights = torch.rand(tokens, slots, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), index, weights.requires_grad_()


def made_by(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of all that has one."""
    x, _, weights = inputs
    y = module(*inputs)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    return [y, *torch.autograd.grad(y, [x, weights, *module.parameters()], grad)]


def close(mine: list[Tensor], theirs: list[Tensor], limit: float = 1e-12) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).norm()) <= limit * float(other.norm())


def new(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


@pytest.mark.parametrize("kind", TYPES)
def test_outputs_gradients_and_state_are_those_of_the_model(kind: str) -> None:
    plain = mixture(kind)
    model = copy.deepcopy(plain)
    report = gf.replace(model)
    found = [b for b in report.replaced if "experts" in b.notes]
    assert {b.variant for b in found} == {OTHERS.get(kind, "swiglu")}
    assert not [b for b in report.left if b.name.endswith(".experts")]
    assert model.state_dict().keys() == plain.state_dict().keys()
    inputs = inputs_of(plain)
    wanted, got = results(plain, inputs), results(model, inputs)
    assert wanted.keys() == got.keys()
    names = [n for n in wanted if any(n.startswith(f"{b.name}.") for b in found)]
    assert len(names) >= 2
    largest = max(float(t.norm()) for t in wanted.values())
    for name, tensor in wanted.items():
        limit = 1e-6 * (float(tensor.norm()) + 1e-2 * largest)  # in places they are in float32
        assert float((got[name] - tensor).norm()) <= limit, name
    report.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(model(**inputs)[0], plain(**inputs)[0])


@pytest.mark.parametrize("kind", VARIANTS, ids=lambda kind: kind.__name__)
def test_every_storage_order_and_weighing(kind: type[nn.Module]) -> None:
    for dtype, limit in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        plain, model = new(kind, dtype), new(kind, dtype)
        (block,) = gf.replace(model, strict=True).replaced
        assert (block.variant, block.order) == VARIANTS[kind]
        for inputs in (call(dtype=dtype), call(0, dtype=dtype), call(1, 1, dtype=dtype)):
            close(made_by(model, inputs), made_by(plain, inputs), limit)
        named = dict(zip(("x", "index", "weights"), call(dtype=dtype), strict=True))
        assert torch.equal(model(**named), model(*named.values()))


@pytest.mark.parametrize("kind", MUTANTS, ids=lambda kind: kind.__name__)
def test_what_computes_something_else_is_left(kind: type[nn.Module]) -> None:
    for dtype in (torch.float64, torch.float32):
        plain, model = new(kind, dtype), new(kind, dtype)
        report = gf.replace(model)
        assert not report.replaced
        assert len(report.left) == 1
        assert type(model) is kind
        assert getattr(model, "calls", [0]) == [0]
        assert not any(b.any() for b in model.buffers())
        model.eval(), plain.eval()
        assert torch.equal(model(*call(dtype=dtype)), plain(*call(dtype=dtype)))


def test_the_sizes_do_not_mislead() -> None:
    """As many hidden values as features, or half: every matrix fits in two ways."""
    for kind in (Stack, Biased):
        for width in (6, 12):
            plain = new(kind)
            for name, tensor in plain.named_parameters():
                sizes = [{8: width, 16: 2 * width}.get(size, size) for size in tensor.shape]
                vars(plain)["_parameters"][name] = nn.Parameter(torch.randn(sizes).double())
            model = copy.deepcopy(plain)
            gf.replace(model, strict=True)
            close(made_by(model, call()), made_by(plain, call()))


def test_what_changes_later_is_computed_by_its_own_forward() -> None:
    changes: list[Callable[[Any], object]] = [
        lambda m: setattr(m, "act", nn.Tanh()),
        lambda m: setattr(m, "limit", 0.5),
        lambda m: m.act.register_forward_hook(lambda *_: _[2] * 2.0),
    ]
    for change in changes:
        plain, model = new(Biased), new(Biased)
        gf.replace(model, strict=True)
        for each in (plain, model):
            change(each)
        close(made_by(model, call()), made_by(plain, call()))


def test_weights_may_come_later() -> None:
    plain = new(Biased)
    model = copy.deepcopy(plain).to("meta")
    gf.replace(model, strict=True)
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    close(made_by(model, call()), made_by(plain, call()))


def test_what_cannot_be_asked_is_left_with_its_reason() -> None:
    def left(model: nn.Module) -> str:
        (block,) = gf.replace(model).left
        assert block.reason is not None
        return block.reason

    hooked = new(Stack)
    hooked.register_forward_hook(lambda *_: None)
    assert "has a hook" in left(hooked)
    assert "quantised" in left(Stack().to(torch.float8_e4m3fn))
    mixed = Stack()
    mixed.second.data = mixed.second.data.double()
    assert "different dtypes" in left(mixed)
    extra = Stack()
    extra.scale = nn.Parameter(torch.ones(3))
    assert "a parameter of its own, scale" in left(extra)

    class Sorted(Stack):
        def forward(self, x: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
            return x

    assert "does not take an input, an index and routing weights" in left(Sorted())
    with pytest.raises(SettingError, match="does not take an input"):
        gf.replace(nn.Sequential(Sorted()), strict=True)


def test_copies_pickles_and_a_second_call() -> None:
    plain, model = new(Biased), nn.Sequential(new(Biased))
    report = gf.replace(model)
    assert "experts" in str(report)
    assert len(gf.replace(model).kept) == 1
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for each in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(each[0], ReplacedExperts)
        close(made_by(each[0], call()), made_by(plain, call()))
    assert not gf.replace(nn.Sequential(new(Stack)), exclude="0").replaced
    report.undo()
    assert type(model[0]) is Biased


def test_compiled_and_under_autocast() -> None:
    plain, model = new(Biased, torch.float32), new(Biased, torch.float32)
    gf.replace(model, strict=True)
    x, index, weights = call(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close([compiled(x, index, weights)], [plain(x, index, weights)], 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        close([model(x, index, weights)], [plain(x, index, weights)], 2e-2)


def test_rounding_as_the_model_rounds() -> None:
    plain, model = new(Stack, torch.bfloat16), new(Stack, torch.bfloat16)
    gf.replace(model, strict=True, rounding="model")
    inputs = call(dtype=torch.bfloat16)
    assert torch.equal(model(*inputs), plain(*inputs))


@pytest.mark.parametrize("kind", VARIANTS, ids=lambda kind: kind.__name__)
def test_explain_tells_what_was_replaced(kind: type[nn.Module]) -> None:
    model = nn.Sequential(new(kind, torch.float32))
    gf.replace(model, strict=True)
    (told,) = gf.explain(model, tokens=3, slots=2)
    assert told.path == "operator"
    assert told.layer.endswith(f", {COUNT} experts of {WIDTH} -> {HIDDEN} -> {WIDTH}")
    assert told.touched is not None
    assert set(told.plans) == {"inference", "training, forward", "training, backward"}


def test_explain_tells_that_a_forward_is_the_models_own() -> None:
    model = nn.Sequential(new(Stack, torch.float32))
    gf.replace(model, strict=True)
    model[0].act = nn.GELU()
    (told,) = gf.explain(model)
    assert told.path == "own forward"
