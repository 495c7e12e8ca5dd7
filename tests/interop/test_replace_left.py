"""What `replace` leaves and why; and that it would notice a wrong role, order or activation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.architectures import ARCHITECTURES, OLD, TEXT, Architecture
from torch import Tensor, nn

import gatedffn as gf
from gatedffn.errors import SettingError
from gatedffn.interop.replacing.hypotheses import Formula, matching
from gatedffn.interop.replacing.structure import NotUnderstood
from gatedffn.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
D, H = 8, 24


class Block(nn.Module):
    """A gated block whose element-wise part is given."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self._function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self._function(self.a(x), self.b(x)))
        return result


class Plain(nn.Module):
    """A block without a gate whose element-wise part is given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, H), nn.Linear(H, D)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self._function(self.one(x)))
        return result


def the_reason(module: nn.Module) -> str:
    report = gf.replace(module)
    assert not report.replaced
    assert len(report.left) == 1, str(report)
    reason = report.left[0].reason
    assert reason is not None
    assert reason in str(report)
    with pytest.raises(SettingError, match="strict=True, and these blocks cannot be replaced:"):
        gf.replace(module, strict=True)
    return reason


# What is told apart.


@pytest.mark.parametrize("name", [n for n, row in VARIANTS.items() if row.gated])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_gated_variant_is_told(name: str, swapped: bool, dtype: torch.dtype) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return gf.functional.gating(b, a, name) if swapped else gf.functional.gating(a, b, name)

    block = Block(function).to(dtype)
    found = gf.replace(block, strict=True).replaced[0]
    # xSwiGLU and xGEGLU are the variants that they expand until they have learned.
    assert found.variant == {"xswiglu": "swiglu", "xgeglu": "geglu"}.get(name, name)
    roles = {"gate": "b", "up": "a"} if swapped else {"gate": "a", "up": "b"}
    if name in ("bilinear", "drelu"):  # the roles are alike
        roles = {"gate": "a", "up": "b"}
    assert found.projections == {**roles, "down": "c"}


PLAIN = [n for n, row in VARIANTS.items() if not row.gated and row.learned is None]


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_variant_is_told(name: str) -> None:
    block = Plain(lambda u: gf.functional.activation(u, name))
    assert gf.replace(block, strict=True).replaced[0].variant == name


@pytest.mark.parametrize("order", ["gate_up", "up_gate", "interleaved"])
def test_every_order_is_told(order: Any) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            made = gf.functional.glu(self.both(x), variant="geglu", order=order)
            result: Tensor = self.down(made)
            return result

    found = gf.replace(Packed(), strict=True).replaced[0]
    assert (found.variant, found.order) == ("geglu", order)


@pytest.mark.parametrize("variant", ["geglu", "geglu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_that_insists_on_its_dtype_hides_nothing(variant: str, dtype: torch.dtype) -> None:
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__(lambda g, u: gf.functional.gating(g, u, variant))
            self.norm = nn.LayerNorm(H)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.c(self.norm(self._function(self.a(x), self.b(x))))
            return result

    block = Normed().to(dtype)
    assert gf.replace(block, strict=True).replaced[0].variant == variant


@pytest.mark.parametrize("variant", ["geglu", "geglu_tanh"])
def test_a_cast_hides_nothing(variant: str) -> None:
    block = Block(lambda g, u: gf.functional.gating(g, u, variant).bfloat16()).bfloat16()
    assert gf.replace(block, strict=True).replaced[0].variant == variant


def test_zeros_hide_nothing() -> None:
    block = Block(lambda a, b: F.gelu(b) * a)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    found = gf.replace(block, strict=True).replaced[0]
    assert (found.variant, found.projections) == ("geglu", {"gate": "b", "up": "a", "down": "c"})


def test_a_number_of_the_block_is_found() -> None:
    block = Block(lambda g, u: F.silu(g.clamp(max=5.0)) * u.clamp(-5.0, 5.0), swiglu_limit=5.0)
    found = gf.replace(block, strict=True).replaced[0]
    assert (found.variant, found.parameters) == ("swiglu_clamp", {"beta": 1.0, "limit": 5.0})


def test_what_an_activation_learned_is_followed() -> None:
    block: Any = nn.Sequential(nn.Linear(D, H), nn.PReLU(), nn.Linear(H, D))
    assert gf.replace(block, strict=True).replaced[0].variant == "prelu"
    with torch.no_grad():
        block[1].weight.fill_(0.7)
    x = torch.randn(5, D)
    other = nn.Sequential(*block)
    torch.testing.assert_close(block(x), other(x))
    gradient = torch.autograd.grad(block(x).sum(), block[1].weight)[0]
    wanted = torch.autograd.grad(other(x).sum(), block[1].weight)[0]
    torch.testing.assert_close(gradient, wanted)


def test_a_parameter_per_unit_is_followed() -> None:
    block: Any = nn.Sequential(nn.Linear(D, H), nn.PReLU(H), nn.Linear(H, D))
    with torch.no_grad():
        block[1].weight.uniform_(-1.0, 1.0)
    x = torch.randn(5, D)  # two dimensions, where the channels of PReLU come last
    y = block(x)
    report = gf.replace(block)
    torch.testing.assert_close(block(x), y)
    assert len(report.replaced) + len(report.left) == 1


# What is left.


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda g, u: F.softsign(g) * u, id="softsign"),
        pytest.param(lambda g, u: F.gelu(g.clamp(-10.0, 10.0)) * u, id="clamp"),
        pytest.param(lambda g, u: F.silu(g).clamp(max=7.0) * u.clamp(-7.0, 7.0), id="clamp-after"),
        pytest.param(lambda g, u: F.silu(g) * u + 1e-4, id="offset"),
        pytest.param(lambda g, u: F.silu(g * 1.001) * u, id="scale"),
        pytest.param(lambda g, u: F.silu(g) * u.clamp(-500.0, 500.0), id="far-clamp"),
        pytest.param(lambda g, u: F.silu(g) * u.roll(1, -1), id="roll"),
        pytest.param(lambda g, u: F.silu(g - g.mean(-1, keepdim=True)) * u, id="mean"),
        pytest.param(lambda g, u: F.silu(g) * u.detach(), id="detach"),
        pytest.param(lambda g, u: torch.where(u > 0, F.silu(g) * u, 0.0), id="sparse"),
        pytest.param(lambda g, u: F.silu(g) * u * (1 + 1e-6), id="nearly"),
    ],
)
def test_a_formula_that_is_nearly_one_is_left(function: Callable[..., Tensor]) -> None:
    assert the_reason(Block(function))


def test_no_activation_is_none() -> None:
    block = Plain(lambda u: u)
    vars(block)["scale"] = 1.0  # with which a leaky ReLU would be the identity
    assert "no variant of the table" in the_reason(block)


def test_another_result_on_random_input_is_noticed() -> None:
    class Short(Plain):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if x.shape[1] > 8 else 2.0 * y

    assert the_reason(Short(F.gelu)) == "on random input it gives another result or gradient"


def test_two_formulas_that_are_too_near_are_not_told() -> None:
    one, other = Formula(VARIANTS["gelu"], {}), Formula(VARIANTS["gelu_tanh"], {})
    x = torch.randn(100, dtype=torch.float64)
    assert matching([one, other], lambda f: x if f is one else x + 1e-9, x, [x]) is one
    assert matching([one, other], lambda _: x, x, [x]) is one
    with pytest.raises(NotUnderstood, match="gelu and gelu_tanh cannot be told apart here"):
        matching([one, other], lambda f: x if f is one else x * (1 + 4e-15), x, [x * 0.1])


def test_a_gradient_of_its_own_is_noticed() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, g: Tensor) -> Tensor:
            return F.relu(g)

        @staticmethod
        def backward(_: Any, grad: Tensor) -> Tensor:
            return grad

    reason = the_reason(Plain(lambda u: Straight.apply(u)))  # type: ignore[no-untyped-call]
    assert reason == "its gradients are not those of its formula"


@pytest.mark.skipif(OLD, reason="that release imports torchvision for Gemma3n")
def test_gemma3n_is_left_where_it_is_sparse() -> None:
    settings = {
        **TEXT,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
        "head_dim": 8,
        "vocab_size_per_layer_input": 40,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention", "full_attention"],
        "laurel_rank": 4,
    }
    model = Architecture("gemma3n_text", "geglu_tanh", settings).build()
    report = gf.replace(model)
    assert [b.name for b in report.replaced] == ["layers.1.mlp"]
    left = {b.name: b.reason for b in report.left}
    assert left["layers.0.mlp"] == (
        "no variant of the table computes what happens between its projections (act_fn is GELUTanh)"
    )


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "own forward": lambda m: vars(m).__setitem__("forward", m.forward),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["", "a", "act"])
def test_a_hook_is_not_passed_by(kind: str, where: str) -> None:
    block = Block(lambda g, u: F.silu(g) * u)
    block.add_module("act", nn.SiLU())
    HOOKS[kind](block.get_submodule(where))
    assert "hook" in the_reason(block)


def test_quantised_weights_are_left() -> None:
    class Linear8bit(nn.Linear):
        def __init__(self, d_in: int, d_out: int) -> None:
            super().__init__(d_in, d_out)
            del self._parameters["weight"]
            weight = torch.zeros(d_out, d_in, dtype=torch.int8)
            self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    block = Block(lambda g, u: F.silu(g) * u)
    block.b = Linear8bit(D, H)
    assert the_reason(block) == "b has quantised weights, a hook or a forward of its own"


def test_quantised_modules_are_left() -> None:
    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = D, H
            self.register_buffer("qweight", torch.zeros(D, H, dtype=torch.int32))

    block = Block(lambda g, u: F.silu(g) * u)
    block.b = QuantLinear()  # type: ignore[assignment]
    assert "QuantLinear, not a plain projection: it is quantised" in the_reason(block)


def test_a_projection_that_does_more_is_left() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    block = Block(lambda g, u: F.silu(g) * u)
    block.a = Scaled(D, H)
    assert "what it computes from its weight could not be told" in the_reason(block)


def test_a_parameter_of_its_own_is_left() -> None:
    block = Block(lambda g, u: F.silu(g) * u, scale=nn.Parameter(torch.ones(H)))
    assert the_reason(block) == "it has a parameter of its own, scale"


def test_a_state_of_its_own_is_left() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__(lambda g, u: F.silu(g) * u)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1  # type: ignore[assignment, operator]
            return super().forward(x)

    block = Counting()
    assert the_reason(block) == "its forward changes calls"


def test_a_name_that_would_be_hidden_is_left() -> None:
    block = Block(lambda g, u: F.silu(g) * u, backend="fast")
    assert "it has backend of its own" in the_reason(block)


def test_strict_changes_nothing_when_it_raises() -> None:
    good, bad = Block(lambda g, u: F.silu(g) * u), Block(lambda g, u: F.softsign(g) * u)
    model = nn.ModuleDict({"good": good, "bad": bad})
    with pytest.raises(SettingError, match=r"bad \(Block\): no variant of the table computes"):
        gf.replace(model, strict=True)
    assert type(good) is Block
    assert "_gatedffn" not in vars(good)


def test_strict_wants_a_block() -> None:
    with pytest.raises(SettingError, match="ReLU holds no feed-forward block that was found"):
        gf.replace(nn.ReLU(), strict=True)


# What changes afterwards.


def test_another_activation_afterwards_is_followed() -> None:
    model = ARCHITECTURES["llama"].build()
    mlp = model.layers[0].mlp
    gf.replace(model)
    mlp.act_fn = nn.GELU()
    x = torch.randn(3, 32)
    wanted = mlp.down_proj(F.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), wanted)
    assert mlp.why_modules() == "act_fn is another module than it was, or has a hook"
    assert gf.explain(mlp)[0].path == "own forward"


@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_a_hook_afterwards_is_called(where: str) -> None:
    model = ARCHITECTURES["llama"].build()
    mlp = model.layers[0].mlp
    gf.replace(model)
    calls: list[object] = []
    getattr(mlp, where).register_forward_hook(lambda *a: calls.append(a))
    mlp(torch.randn(3, 32))
    assert len(calls) == 1


def test_a_hook_on_all_modules_afterwards_sees_every_part() -> None:
    model = ARCHITECTURES["llama"].build()
    mlp = model.layers[0].mlp
    gf.replace(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        mlp(torch.randn(3, 32))
    finally:
        handle.remove()
    assert set(seen) == {mlp.gate_proj, mlp.act_fn, mlp.up_proj, mlp.down_proj, mlp}
    assert mlp.why_modules() is None


def test_an_input_by_name_and_more_than_it() -> None:
    class Keyword(Block):
        def forward(self, states: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(states) * scale

    block = Keyword(lambda g, u: F.silu(g) * u)
    x = torch.randn(3, D)
    y = block(x)
    gf.replace(block, strict=True)
    torch.testing.assert_close(block(states=x), y)
    torch.testing.assert_close(block(x, 2.0), 2.0 * y)
    torch.testing.assert_close(block(x, scale=2.0), 2.0 * y)


def test_a_wrong_width_is_named() -> None:
    block = Block(lambda g, u: F.silu(g) * u)
    gf.replace(block)
    with pytest.raises(gf.GatedFFNError, match=r"its last size must be d_model, 8"):
        block(torch.randn(3, D + 1))


def test_no_tokens() -> None:
    block = Block(lambda g, u: F.silu(g) * u)
    gf.replace(block)
    assert block(torch.randn(0, D)).shape == (0, D)


def test_what_was_found_of_a_class_ends_with_its_forward() -> None:
    class Patched(Block):
        pass

    def empty() -> nn.Module:
        return Patched(lambda g, u: F.silu(g) * u).to("meta")

    Patched.forward = lambda self, x: self.c(F.silu(self.a(x)) * self.b(x))  # type: ignore[method-assign]
    assert gf.replace(empty()).replaced
    Patched.forward = lambda self, x: self.c(F.softsign(self.a(x)) * self.b(x))  # type: ignore[method-assign]
    assert "no variant of the table" in the_reason(empty())


def test_a_parameter_of_integers_is_left() -> None:
    block = Block(lambda g, u: F.silu(g) * u)
    whole = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    block.register_parameter("scales", whole)
    assert the_reason(block) == "it has a parameter of its own, scales"
