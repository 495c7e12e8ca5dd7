"""`experts_implementation="gatedffn"`: what transformers asks of it, and what is refused."""

import copy
import subprocess
import sys
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.stacked import WIDTH, NormAfter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gatedffn as gf
from gatedffn.errors import SettingError
from gatedffn.interop import registry
from gatedffn.interop.replacing.expert_block import ROLES, by_roles
from gatedffn.interop.replacing.standing import _KNOWN

pytest.importorskip("transformers.integrations.moe", reason="transformers 5 has the registry")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
NAME = "gatedffn"
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size",), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 24),
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}
IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))


@cache
def built(kind: str) -> Any:
    transformers: Any = import_module("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=NAME)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if n.endswith(".experts")]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(IDS).logits
    return made


def same(one: Tensor, other: Tensor, limit: float = 1e-5) -> None:
    assert one.dtype == other.dtype
    assert float((one - other).norm()) <= limit * float(other.norm())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_it_is_set_generates_and_trains(kind: str) -> None:
    model = copy.deepcopy(built(kind))
    made, keys = {}, model.state_dict().keys()
    for name in (NAME, "eager", NAME):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(IDS).logits.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        made[name] = logits(model), tokens, grads
    same(made[NAME][0], made["eager"][0])
    assert torch.equal(made[NAME][1], made["eager"][1])
    assert made[NAME][2].keys() == made["eager"][2].keys()
    for parameter, grad in made["eager"][2].items():
        same(made[NAME][2][parameter], grad, 1e-4)
    assert model.state_dict().keys() == keys
    assert all(hasattr(m, ROLES) for m in experts_of(model))


def test_it_is_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the model's own forward, which would give the same."""
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return by_roles(*args)

    monkeypatch.setattr(registry, "by_roles", counted)
    logits(built("mixtral"))
    assert len(calls) == 2


@pytest.mark.parametrize("ran", [False, True])
def test_explain_tells_of_its_experts(ran: bool) -> None:
    model = copy.deepcopy(built("mixtral"))
    for module in experts_of(model):
        vars(module).pop(ROLES, None)
    if ran:
        logits(model)
    found = gf.explain(model, tokens=3, slots=1)
    assert [each.name for each in found] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for each in found:
        assert (each.path, each.layer) == ("operator", "SwiGLU, 4 experts of 32 -> 24 -> 32")
        assert each.touched is not None
        assert (each.touched.tokens, each.touched.slots) == (3, 1)
        assert set(each.plans) == {"inference", "training, forward", "training, backward"}
    given = experts_of(model)[0]
    given.forward = lambda *_: None
    assert gf.explain(given)[0].path == "own forward"
    model.set_experts_implementation("eager")
    with pytest.raises(SettingError, match="holds no FeedForward"):
        gf.explain(model)


def test_saved_and_loaded_with_it(tmp_path: Any) -> None:
    plain = built("mixtral")
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path, experts_implementation=NAME).eval()
    same(logits(loaded), logits(plain))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(loaded))


def test_compiled_before_anything_ran() -> None:
    module = copy.deepcopy(experts_of(built("mixtral"))[0])
    vars(module).pop(ROLES, None)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index, weights = torch.arange(10).view(5, 2) % 4, torch.rand(5, 2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    made = compiled(x, index, weights)
    assert not hasattr(module, ROLES)
    same(made, module(x, index, weights))


def test_autocast_half_precision_and_inference_mode() -> None:
    model = copy.deepcopy(built("mixtral"))
    for module in experts_of(model):
        vars(module).pop(ROLES, None)
    made = {}
    for name in (NAME, "eager"):
        model.set_experts_implementation(name)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            made[name] = logits(model)
    same(made[NAME].clone(), made["eager"].clone(), 5e-2)
    half = copy.deepcopy(built("mixtral")).bfloat16()
    assert logits(half).dtype == torch.bfloat16
    same(logits(half).float(), logits(built("mixtral")), 1e-1)


@pytest.mark.parametrize("around", ["checkpoint", "grad", "jvp", "vmap"])
def test_the_first_call_may_be_anywhere(around: str) -> None:
    """What it is found out by has no part in what the caller does."""
    module = copy.deepcopy(experts_of(built("mixtral"))[0])
    vars(module).pop(ROLES, None)
    _KNOWN.clear()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index, weights = torch.arange(10).view(5, 2) % 4, torch.full((5, 2), 0.5)
    leaf = x.clone().requires_grad_()

    def call(x: Tensor) -> Tensor:
        made: Tensor = module(x, index, weights)
        return made

    def loss(x: Tensor) -> Tensor:
        return call(x).sum()

    if around == "checkpoint":
        made, *_ = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    elif around == "grad":
        made = torch.func.grad(loss)(x)
    elif around == "jvp":
        made = torch.func.jvp(loss, (x,), (x,))[1]
    else:
        made = torch.func.vmap(call)(x[None])[0]
    gradient, *_ = torch.autograd.grad(loss(leaf), leaf)
    expected = {"jvp": (gradient * x).sum(), "vmap": call(x)}.get(around, gradient)
    same(made, expected)


def test_another_activation_is_found_out_anew() -> None:
    model = copy.deepcopy(built("mixtral"))
    logits(model)
    for module in experts_of(model):
        module.act_fn = nn.ReLU()
    mine = logits(model)
    model.set_experts_implementation("eager")
    same(mine, logits(model))
    model.set_experts_implementation(NAME)
    for module in experts_of(model):
        module.act_fn = nn.Softsign()
    with pytest.raises(
        SettingError, match="cannot compute MixtralExperts: no variant of the table"
    ):
        logits(model)


def test_what_is_not_understood_raises() -> None:
    wrap = import_module("transformers.integrations.moe").use_experts_implementation

    class Normed(NormAfter):
        def __init__(self, config: Any) -> None:
            super().__init__()

    module = wrap(Normed)(SimpleNamespace(_experts_implementation=NAME))
    inputs = torch.zeros(3, WIDTH), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    with pytest.raises(SettingError, match=r"cannot compute Normed: no variant.*; use another one"):
        module(*inputs)
    module.config._experts_implementation = "eager"
    assert module(*inputs).shape == (3, WIDTH)


def test_other_arguments_raise() -> None:
    module = experts_of(built("mixtral"))[0]
    x, index, weights = torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    assert module(x, top_k_weights=weights, top_k_index=index).shape == x.shape
    for given in ((x[None], index, weights), (x, index, weights, None)):
        with pytest.raises(SettingError, match="takes hidden_states, top_k_index, top_k_weights"):
            module(*given)


def test_lora_on_the_stacked_parameters() -> None:
    """Before the first call, and on replaced experts: PEFT computes the parameter meanwhile."""
    peft: Any = import_module("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    made = {}
    for way in ("eager", NAME, "replace"):
        model = copy.deepcopy(built("mixtral"))
        for module in experts_of(model):
            vars(module).pop(ROLES, None)
        model.set_experts_implementation("eager" if way == "replace" else way)
        if way == "replace":
            assert [b.name for b in gf.replace(model, strict=True).replaced]
        before = logits(model) if way == "eager" else None
        torch.manual_seed(1)
        config = peft.LoraConfig(
            target_modules=[], target_parameters=names, r=2, init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).eval()
        if before is not None:
            assert float((logits(model) - before).norm()) > 1e-2 * float(before.norm())
        model(IDS).logits.square().sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora" in n]
        made[way] = [logits(model), *(g for g in grads if g is not None)]
    for way in (NAME, "replace"):
        assert len(made[way]) == len(made["eager"]) > 4
        for one, other in zip(made[way], made["eager"], strict=True):
            same(one, other, 1e-4)


def test_it_registers_whichever_is_imported_first() -> None:
    code = (
        "import sys\n"
        "import gatedffn.interop\n"
        "assert not any(name.split('.')[0] == 'transformers' for name in sys.modules)\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "assert 'gatedffn' in ALL_EXPERTS_FUNCTIONS\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    known = import_module(registry.MODULE).ALL_EXPERTS_FUNCTIONS
    assert known[NAME] is registry.experts_forward
    registry.register()
    assert known[NAME] is registry.experts_forward
