"""Mixtures: as the blocks of transformers, as the formulas written out, and what training asks."""

import copy
import pickle
from importlib import import_module
from typing import Any

import pytest
import torch
from support.architectures import HIDDEN, OLD, TEXT
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import gatedffn as gf
from gatedffn.errors import GatedFFNError, SettingError, ShapeError
from gatedffn.layouts import pack, unpack
from gatedffn.mixture import Routing
from gatedffn.ops import measure

WIDE, EXPERTS, TOP_K = 24, 8, 3
new = pytest.mark.skipif(OLD, reason="the names are those of transformers 5")


@pytest.fixture(autouse=True)
def by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measurements: "auto" takes the first way."""
    monkeypatch.setattr(measure, "tuning", lambda: False)


def drawn(module: nn.Module) -> nn.Module:
    """Every weight and buffer drawn, so that gates open and groups differ."""
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        with torch.no_grad():
            tensor.normal_(std=0.3 if tensor.dim() > 1 else 0.1)
    return module


# The blocks of transformers

MOE = {
    **TEXT,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    "num_experts_per_tok": TOP_K,
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), WIDE),
    "shared_expert_intermediate_size": 2 * WIDE,
    "n_shared_experts": 2,
    "hidden_act": "silu",
}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
LIMITED = {"groups": 4, "top_groups": 2, "scale": 2.5, "shared_hidden": 2 * WIDE}
SIGMOID: dict[str, Any] = {"score": "sigmoid", "correction_bias": True, **LIMITED}

# The model, its block, what its configuration says, our options.
BLOCKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", {}, {}),
    "qwen3": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", {"norm_topk_prob": True}, {}),
    "olmoe": ("olmoe", "OlmoeSparseMoeBlock", {"norm_topk_prob": False}, {"normalize": False}),
    "qwen2": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        {"norm_topk_prob": False},
        {"normalize": False, "shared_hidden": 2 * WIDE, "shared_gate": True},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        {"topk_method": "group_limited_greedy", **GROUPS},
        {"normalize": False, "group_best": 1, **LIMITED},
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE", {"norm_topk_prob": True, **GROUPS}, SIGMOID),
    "deepseek_v3_plain": (
        "deepseek_v3",
        "DeepseekV3MoE",
        {"norm_topk_prob": False, **GROUPS, "n_group": 1, "topk_group": 1},
        {**SIGMOID, "normalize": False, "groups": 1, "top_groups": 1},
    ),
    "glm4": ("glm4_moe", "Glm4MoeMoE", {"norm_topk_prob": True, **GROUPS}, SIGMOID),
}


def block(model: str, kind: str, settings: dict[str, Any]) -> nn.Module:
    """A block of transformers in float32, which several of them round to inside."""
    transformers: Any = import_module("transformers")
    of_model = transformers.AutoConfig.for_model(model).__class__
    config = of_model(**{**MOE, **settings})
    config._experts_implementation = "eager"
    model = model.removesuffix("_text")
    kinds: Any = import_module(f"transformers.models.{model}.modeling_{model}")
    made: nn.Module = getattr(kinds, kind)(config)
    return drawn(made)


def by_slots(index: Tensor, weights: Tensor) -> Tensor:
    """The weight of each expert for each token, 0 where it was not chosen."""
    none = weights.new_zeros(len(index), EXPERTS)
    return none.scatter(1, index.long(), weights)


def assert_same_as(layer: gf.MixtureFeedForward, theirs: nn.Module, router: nn.Module) -> None:
    """The weights of every expert, the output, and the gradients of the input and of the router."""
    ours: list[Tensor] = []
    them: list[Tensor] = []
    torch.manual_seed(1)
    x = torch.randn(2, 20, HIDDEN)
    grad = torch.randn_like(x)
    mine: Any = x.clone().requires_grad_()
    y, routing = layer(mine, return_routing=True)
    ours += [y, *torch.autograd.grad(y, (mine, layer.gate.weight), grad)]
    its: Any = x.clone().requires_grad_()
    y = theirs(its)
    y = y[0] if isinstance(y, tuple) else y
    y = y.view_as(x)
    weight: Any = router.weight
    them += [y, *torch.autograd.grad(y, (its, weight), grad)]
    for one, other in zip(ours, them, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    found = router(x.flatten(0, 1))
    if len(found) == 3:
        chosen = by_slots(routing.index.flatten(0, 1), routing.weights.flatten(0, 1))
        torch.testing.assert_close(chosen, by_slots(found[2], found[1]), atol=1e-6, rtol=1e-5)


@new
@pytest.mark.parametrize("name", list(BLOCKS))
def test_a_block_of_transformers_loads_strictly_and_computes_the_same(name: str) -> None:
    model, kind, settings, options = BLOCKS[name]
    theirs: Any = block(model, kind, settings)
    layer = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K, **options)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_as(layer, theirs, theirs.gate)


@new
def test_the_block_of_gpt_oss_by_its_layout() -> None:
    theirs: Any = block("gpt_oss", "GptOssMLP", {})
    options: Any = {"score_after_top_k": True, "normalize": False, "router_bias": True}
    layer = gf.MixtureFeedForward(
        HIDDEN, WIDE, EXPERTS, top_k=TOP_K, variant="swiglu_oai", bias=True, **options
    )
    experts = pack(unpack(theirs.experts.state_dict(), "gpt-oss"), "experts-packed", path="experts")
    router = {f"gate.{name}": tensor for name, tensor in theirs.router.state_dict().items()}
    layer.load_state_dict({**router, **experts}, strict=True)
    assert_same_as(layer, theirs, theirs.router)


@new
def test_the_block_of_llama_4_weighs_what_experts_are_given() -> None:
    theirs: Any = block("llama4_text", "Llama4TextMoe", {"intermediate_size_mlp": WIDE})
    options: Any = {"score": "sigmoid", "normalize": False, "weigh": "input"}
    layer = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K, shared_hidden=WIDE, **options)
    state = pack(unpack(theirs.experts.state_dict(), "llama4"), "experts-packed", path="experts")
    state["gate.weight"] = theirs.router.weight.detach()
    for name, tensor in theirs.shared_expert.state_dict().items():
        state[f"shared_experts.{name}"] = tensor
    layer.load_state_dict(state, strict=True)
    assert_same_as(layer, theirs, theirs.router)


def test_a_file_of_mixtral_becomes_a_mixture() -> None:
    own = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K)
    file = pack(unpack(own.experts.state_dict(), "experts-packed"), "mixtral", path="experts")
    assert file["experts.5.w3.weight"].shape == (WIDE, HIDDEN)
    gate_up = own.experts.get_parameter("gate_up_proj")
    assert torch.equal(file["experts.5.w3.weight"], gate_up[5, WIDE:])
    named = {name.removeprefix("experts."): tensor for name, tensor in file.items()}
    again = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K)
    state = pack(unpack(named, "mixtral"), "experts-packed", path="experts")
    again.load_state_dict({"gate.weight": own.gate.weight.detach(), **state}, strict=True)
    x = torch.randn(5, HIDDEN)
    assert torch.equal(again(x), own(x))


# The formulas, token by token


def written_out(layer: gf.MixtureFeedForward, x: Tensor) -> tuple[dict[int, float], Tensor]:
    """One token through a mixture, in float64: the weights by expert, and the output."""
    rule, gate, experts = layer.gate.rule, layer.gate, layer.experts
    logits = gate.weight @ x
    if gate.bias is not None:
        logits = logits + gate.bias
    exp = logits.exp()
    scores = exp / exp.sum() if rule.score == "softmax" else 1 / (1 + (-logits).exp())
    choice = (logits if rule.score_after_top_k else scores).tolist()
    if gate.e_score_correction_bias is not None:
        choice = [a + b for a, b in zip(choice, gate.e_score_correction_bias.tolist(), strict=True)]
    size = rule.num_experts // rule.groups

    def worth(group: int) -> float:
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        return float(sum(best[: rule.group_best]))

    allowed = sorted(range(rule.groups), key=worth, reverse=True)[: rule.top_groups]
    candidates = [e for e in range(rule.num_experts) if e // size in allowed]
    chosen = sorted(candidates, key=lambda e: choice[e], reverse=True)[: rule.top_k]
    weights = {e: float(scores[e]) for e in chosen}
    if rule.score_after_top_k and rule.score == "softmax":
        whole = float(sum(exp[e] for e in chosen))
        weights = {e: float(exp[e]) / whole for e in chosen}
    if rule.normalize:
        whole = sum(weights.values())
        weights = {e: weight / whole for e, weight in weights.items()}
    weights = {e: weight * rule.scale for e, weight in weights.items()}
    y = torch.zeros_like(x)
    for e, weight in weights.items():
        gate_up = experts.get_parameter("gate_up_proj")[e] @ x
        hidden = nn.functional.silu(gate_up[:WIDE]) * gate_up[WIDE:]
        y = y + weight * (experts.down_proj[e] @ hidden)
    return weights, y


RULES: list[dict[str, Any]] = [
    {"score": score, "score_after_top_k": after, "normalize": normalize, **more}
    for score in ("softmax", "sigmoid")
    for after in (False, True)
    for normalize in (False, True)
    for more in (
        {},
        {"groups": 4, "top_groups": 2, "scale": 0.5},
        {"groups": 2, "top_groups": 1, "group_best": 3, "correction_bias": True},
        {"correction_bias": True, "router_bias": True, "scale": -2.0},
    )
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_formula(rule: dict[str, Any]) -> None:
    layer = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K, **rule).double()
    drawn(layer)
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        y, routing = layer(x, return_routing=True)
        for token, index, weights, got in zip(x, routing.index, routing.weights, y, strict=True):
            wanted, of_token = written_out(layer, token)
            found = dict(zip(index.tolist(), weights.tolist(), strict=True))
            assert found == pytest.approx(wanted, rel=1e-12)
            torch.testing.assert_close(got, of_token, rtol=1e-11, atol=1e-11)


def test_the_correction_chooses_and_does_nothing_else() -> None:
    layer = gf.MixtureFeedForward(
        HIDDEN, WIDE, EXPERTS, top_k=1, score="sigmoid", correction_bias=True, normalize=False
    )
    bias: Any = layer.gate.e_score_correction_bias
    bias[5] = 2.0
    x = torch.randn(6, HIDDEN)
    routing = layer.gate(x)
    assert (routing.index == 5).all()
    assert torch.equal(routing.weights[:, 0], routing.scores[:, 5])
    assert not bias.requires_grad


# Losses and loads


@new
@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_is_that_of_transformers(masked: bool) -> None:
    kinds: Any = import_module("transformers.models.mixtral.modeling_mixtral")
    layers = [gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K) for _ in range(3)]
    x = torch.randn(2, 10, HIDDEN)
    mask = (torch.rand(2, 10) < 0.7).long() if masked else None
    routings = [layer.gate(x) for layer in layers]
    logits = tuple(routing.logits.flatten(0, 1) for routing in routings)
    wanted = kinds.load_balancing_loss_func(logits, EXPERTS, TOP_K, mask)
    joined = Routing(*map(torch.stack, zip(*routings, strict=True)))
    found = joined.balance_loss(mask)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    weights = [layer.gate.weight for layer in layers]
    for one, other in zip(
        torch.autograd.grad(found, weights, retain_graph=True),
        torch.autograd.grad(wanted, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_loads_and_losses_by_hand() -> None:
    scores = torch.tensor([[0.7, 0.1, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
    index = torch.tensor([[0, 2], [0, 1], [2, 0]])
    routing = Routing(index, scores.gather(1, index), scores, scores.log())
    assert routing.load().tolist() == [3, 1, 2]
    f, p = (3 / 3, 1 / 3, 2 / 3), (1.5 / 3, 0.6 / 3, 0.9 / 3)
    assert float(routing.balance_loss()) == pytest.approx(
        3 * sum(a * b for a, b in zip(f, p, strict=True))
    )
    assert float(routing.z_loss()) == pytest.approx(0.0, abs=1e-12)  # each sums to 1
    mask = torch.tensor([True, False, True])
    assert routing.load(mask).tolist() == [2, 0, 2]
    f, p = (1.0, 0.0, 1.0), (0.45, 0.15, 0.4)
    assert float(routing.balance_loss(mask)) == pytest.approx(3 * (f[0] * p[0] + f[2] * p[2]))
    scaled = routing._replace(scores=scores * torch.tensor([[5.0], [0.1], [1.0]]))  # sigmoids
    torch.testing.assert_close(scaled.balance_loss(), routing.balance_loss())
    nothing = torch.zeros(3, dtype=torch.bool)
    assert float(routing.balance_loss(nothing)) == 0.0
    with pytest.raises(ShapeError, match=r"mask is \(2,\): it must broadcast .* \(3,\)"):
        routing.load(torch.ones(2))


def test_what_is_masked_does_not_count_even_where_it_is_no_number() -> None:
    layer = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K)
    x = torch.randn(2, 5, HIDDEN)
    x[:, 3:] = torch.nan
    mask = torch.tensor([1, 1, 1, 0, 0])
    padded, plain = layer.gate(x), layer.gate(x[:, :3])
    assert torch.equal(padded.load(mask), plain.load())
    torch.testing.assert_close(padded.balance_loss(mask), plain.balance_loss())
    torch.testing.assert_close(padded.z_loss(mask), plain.z_loss())


def test_equal_loads_give_top_k() -> None:
    layer = gf.MixtureFeedForward(4, 8, 4, top_k=2)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4) + torch.eye(4).roll(1, 0))
    routing = layer.gate(100 * torch.eye(4))
    assert routing.load().tolist() == [2, 2, 2, 2]
    assert float(routing.balance_loss().detach()) == pytest.approx(2.0)


def test_the_bias_is_moved_towards_equal_loads() -> None:
    torch.manual_seed(0)
    layer = gf.MixtureFeedForward(
        HIDDEN, WIDE, EXPERTS, top_k=2, score="sigmoid", correction_bias=True
    )
    x = torch.randn(400, HIDDEN) + 1.0
    before = layer.gate(x).load()
    layer.gate.update_bias(before, rate=0.25)
    bias: Any = layer.gate.e_score_correction_bias
    assert torch.equal(bias, 0.25 * torch.sign(100.0 - before))
    for _ in range(300):
        layer.gate.update_bias(layer.gate(x).load(), rate=0.005)
    after = layer.gate(x).load()
    assert before.max() > 150
    assert after.max() < 115
    with pytest.raises(ShapeError, match=r"load is \(7,\): it must be \(8,\)"):
        layer.gate.update_bias(torch.zeros(7))
    with pytest.raises(SettingError, match="set correction_bias=True"):
        gf.MixtureFeedForward(4, 8, 4, top_k=2).gate.update_bias(torch.zeros(4))


# What a layer has to bear

FULL: dict[str, Any] = {
    **{"score": "sigmoid", "correction_bias": True, "groups": 4, "top_groups": 2},
    **{"shared_hidden": WIDE, "shared_gate": True, "router_bias": True, "bias": True},
}


def full(**settings: Any) -> gf.MixtureFeedForward:
    layer = gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, top_k=TOP_K, **{**FULL, **settings})
    drawn(layer)
    return layer


def test_it_compiles_in_one_graph_with_its_loss() -> None:
    layer = full()
    bias: Any = layer.gate.e_score_correction_bias

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, routing = layer(x, return_routing=True)
        return y, routing.balance_loss(torch.ones(x.shape[:-1])), routing.load()

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for seed in range(3):  # other routings, one graph
        torch.manual_seed(seed)
        x = torch.randn(2, 7, HIDDEN)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            found = compiled(x)
        for one, other in zip(found, step(x), strict=True):
            torch.testing.assert_close(one, other)
        torch.autograd.backward(found[0].sum())
        bias += 0.01


def test_autocast_leaves_the_router_in_float32() -> None:
    layer = full()
    x = torch.randn(9, HIDDEN)
    plain = layer.gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x, return_routing=True)
    assert y.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(routing, plain, strict=True))
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert layer.gate.weight.grad is not None


def test_half_precision_keeps_the_router_exact() -> None:
    layer = full().bfloat16()
    bias: Any = layer.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, full().gate.get_buffer("e_score_correction_bias"))
    double: Any = layer.double()
    assert double.gate.e_score_correction_bias.dtype == torch.float64
    layer = full().bfloat16()
    x = torch.randn(9, HIDDEN).bfloat16()
    y, routing = layer(x, return_routing=True)
    assert y.dtype == torch.bfloat16
    assert routing.weights.dtype == routing.scores.dtype == torch.float32
    wide = copy.deepcopy(layer).float().gate(x.float())
    assert torch.equal(routing.index, wide.index)
    meta: Any = full(device="meta").bfloat16()
    assert meta.gate.e_score_correction_bias.dtype == torch.float32


def test_it_tells_its_shapes_on_the_meta_device() -> None:
    x = torch.empty(2, 5, HIDDEN, device="meta")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, routing = full(device="meta")(x, return_routing=True)
        assert (y.shape, routing.index.shape) == (x.shape, (2, 5, TOP_K))


def test_checkpointing_gives_the_same_gradients() -> None:
    layer = full()
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)

    def gradients(y: Tensor, routing: Routing) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.sum() + routing.balance_loss(), (x, *layer.parameters()))

    plain = gradients(*layer(x, True))
    again = gradients(*checkpoint(layer, x, True, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_it_traces_inside_a_model() -> None:
    model = nn.Sequential(nn.Identity(), full())
    graph = fx.symbolic_trace(model)
    x = torch.randn(3, HIDDEN)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), model(x))


def test_gradients_are_right() -> None:
    layer = full(normalize=True, scale=1.5).double()
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    names = list(dict(layer.named_parameters()))

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = dict(zip(names, weights, strict=True))
        made: Any = torch.func.functional_call(layer, state, (x, True))
        y, routing = made
        return y, routing.balance_loss(), routing.z_loss()

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("shape", [(HIDDEN,), (0, HIDDEN), (2, 0, HIDDEN)])
def test_single_tokens_and_none(shape: tuple[int, ...]) -> None:
    y, routing = full()(torch.randn(shape), return_routing=True)
    assert y.shape == shape
    assert routing.index.shape == (*shape[:-1], TOP_K)
    assert int(routing.load().sum()) == TOP_K * (y.numel() // HIDDEN)
    assert routing.balance_loss().isfinite()
    assert routing.z_loss().isfinite()


def test_a_variant_without_a_gate_and_learned_parameters() -> None:
    layer = gf.MixtureFeedForward(
        HIDDEN, WIDE, EXPERTS, top_k=2, variant="swish", learnable=True, shared_hidden=WIDE, beta=2
    )
    assert layer.variant == "swish"
    layer(torch.randn(4, HIDDEN)).sum().backward()
    learned = {name: p.grad for name, p in layer.named_parameters() if name.endswith("beta")}
    assert list(learned) == ["experts.beta", "shared_experts.beta"]
    assert all(grad is not None and float(grad) for grad in learned.values())
    drawn(layer)
    layer.reset_parameters()
    assert all(float(p.detach()) == 2.0 for n, p in layer.named_parameters() if n.endswith("beta"))
    assert float(layer.gate.weight.detach().abs().max()) <= HIDDEN**-0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 9}, "top_k is 9: the number of experts in the chosen groups, 8, is the most"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": 5, "groups": 4, "top_groups": 2}, "top_k is 5: .* 4, is the most"),
        ({"groups": 3}, "groups is 3: it must divide num_experts, 8"),
        ({"groups": 2, "top_groups": 3}, "top_groups is 3: groups, 2, is the most"),
        ({"groups": 8, "top_groups": 4}, "group_best is 2: .* in a group, 1, is the most"),
        ({"group_best": 9}, "group_best is 9 and there is one group: leave it out, or set groups"),
        ({"groups": 2, "group_best": 5}, "group_best is 5: .* in a group, 4, is the most"),
        ({"groups": 4, "top_groups": 4}, "top_groups is 4: it leaves no group out"),
        ({"score": "tanh"}, "score is 'tanh': it must be one of softmax, sigmoid"),
        ({"scale": float("nan")}, "scale is nan: it must be a finite number"),
        ({"scale": "2"}, "scale is '2'"),
        ({"shared_gate": True}, "shared_gate is set and shared_hidden is None"),
        ({"shared_hidden": 0}, "d_hidden is 0"),
        ({"variant": "swigly"}, "swiglu"),
        ({"limit": 3.0}, "has no parameter limit"),
        ({"weigh": "both"}, "weigh is 'both'"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_early(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(GatedFFNError, match=words):
        gf.MixtureFeedForward(HIDDEN, WIDE, EXPERTS, **{"top_k": 2, **settings})


def test_an_input_of_another_width_or_dtype_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x is \(3, 31\): its last size must be d_model, 32"):
        full()(torch.randn(3, 31))
    with pytest.raises(ShapeError, match=r"x is torch\.int64"):
        full()(torch.ones(3, HIDDEN, dtype=torch.int64))
