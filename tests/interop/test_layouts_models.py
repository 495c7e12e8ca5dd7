"""The rows against the code that they describe: a model's layer and ours, with its own weights.

Every weight is drawn, so gate and up differ, and a wrong order, orientation or name shows.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.peers import hugging_face, timm_mlp
from torch import Tensor, nn

import gatedffn as gf
from gatedffn.storage.model import Role

D_MODEL, D_HIDDEN, EXPERTS = 24, 40, 3
SIZES: dict[str, Any] = {"hidden_size": D_MODEL, "intermediate_size": D_HIDDEN}
HEADS: dict[str, Any] = {"num_attention_heads": 4}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

# The layer, the input, and the expert where there are some.
Run = Callable[[nn.Module, Tensor, int], Tensor]


def plain(module: nn.Module, x: Tensor, _: int) -> Tensor:
    output: Tensor = module(x)
    return output


def routed(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    output: Tensor = module(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))
    return output


def batched(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    return plain(module, x[None], expert)[0]


def without_norm(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    module.layer_norm = nn.Identity()
    return plain(module, x, expert)


def all_experts(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    output: Tensor = module(x.repeat(EXPERTS, 1))
    return output.view(EXPERTS, *x.shape)[expert]


def dbrx(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    parts = [
        getattr(module, n).view(EXPERTS, D_HIDDEN, D_MODEL)[expert] for n in ("w1", "v1", "w2")
    ]
    output: Tensor = module(x, *parts)
    return output


@dataclass(frozen=True, slots=True)
class Peer:
    layout: str
    variant: str
    build: Callable[[], nn.Module]
    run: Run = plain
    experts: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def hf(folder: str, layer: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: hugging_face(folder, layer, config, **settings)


def kosmos2_without_norm() -> nn.Module:
    sizes = {"embed_dim": D_MODEL, "ffn_dim": D_HIDDEN}
    module = hf("kosmos2", "Kosmos2TextFFN", "Kosmos2TextConfig", **sizes)()
    module.ffn_layernorm = nn.Identity()
    return module


def sized(folder: str, layer: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A layer whose first argument is its width."""

    def build() -> nn.Module:
        base = f"transformers.models.{folder}"
        configuration = getattr(importlib.import_module(base), config)(**settings)
        modeling = importlib.import_module(f"{base}.modeling_{folder}")
        module: nn.Module = getattr(modeling, layer)(D_HIDDEN, configuration)
        return module

    return build


def moonshine() -> nn.Module:
    from transformers.models.moonshine.configuration_moonshine import MoonshineConfig

    modeling = importlib.import_module("transformers.models.moonshine.modeling_moonshine")
    module: nn.Module = modeling.MoonshineDecoderMLP(MoonshineConfig(**SIZES), "silu")
    return module


def dbrx_experts() -> nn.Module:
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig

    modeling = importlib.import_module("transformers.models.dbrx.modeling_dbrx")
    sizes: Any = {"hidden_size": D_MODEL, "ffn_hidden_size": D_HIDDEN, "moe_num_experts": EXPERTS}
    module: nn.Module = modeling.DbrxExpertGLU(DbrxFFNConfig(**sizes))
    return module


def timm(layer: str, width: int) -> Callable[[], nn.Module]:
    return lambda: getattr(timm_mlp(), layer)(D_MODEL, width)


def x_transformers() -> nn.Module:
    peer: Any = importlib.import_module("x_transformers.x_transformers")
    module: nn.Module = peer.FeedForward(D_MODEL, mult=D_HIDDEN / D_MODEL, glu=True)
    return module


MOE: dict[str, Any] = {**SIZES, **HEADS, "num_local_experts": EXPERTS}
FEW: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "moe_intermediate_size": D_HIDDEN,
    "n_routed_experts": EXPERTS,
}

PEERS = {
    "llama": Peer("llama", "swiglu", hf("llama", "LlamaMLP", "LlamaConfig", **SIZES, **HEADS)),
    "llama-bias": Peer(
        "llama", "swiglu", hf("llama", "LlamaMLP", "LlamaConfig", **SIZES, **HEADS, mlp_bias=True)
    ),
    "gemma": Peer("gemma", "geglu_tanh", hf("gemma", "GemmaMLP", "GemmaConfig", **SIZES)),
    "recurrent-gemma": Peer(
        "recurrent-gemma",
        "geglu_tanh",
        hf(
            "recurrent_gemma",
            "RecurrentGemmaMlp",
            "RecurrentGemmaConfig",
            hidden_size=D_MODEL,
            intermediate_size=2 * D_HIDDEN,
        ),
    ),
    "t5": Peer(
        "t5",
        "geglu_tanh",
        hf(
            "t5",
            "T5DenseGatedActDense",
            "T5Config",
            d_model=D_MODEL,
            d_ff=D_HIDDEN,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "t5-ungated": Peer(
        "t5-ungated",
        "relu",
        hf("t5", "T5DenseActDense", "T5Config", d_model=D_MODEL, d_ff=D_HIDDEN),
    ),
    "cpm-ant": Peer(
        "cpm-ant",
        "geglu",
        hf("cpmant", "CpmAntFeedForward", "CpmAntConfig", hidden_size=D_MODEL, dim_ff=D_HIDDEN),
    ),
    "phi3": Peer("phi3", "swiglu", hf("phi3", "Phi3MLP", "Phi3Config", **SIZES, pad_token_id=0)),
    "glm4": Peer("phi3", "swiglu", hf("glm4", "Glm4MLP", "Glm4Config", **SIZES, pad_token_id=0)),
    "phi4-audio": Peer(
        "phi4-audio",
        "swiglu",
        hf("phi4_multimodal", "Phi4MultimodalAudioMLP", "Phi4MultimodalAudioConfig", **SIZES),
        without_norm,
    ),
    "modernbert": Peer(
        "modernbert", "geglu", hf("modernbert", "ModernBertMLP", "ModernBertConfig", **SIZES)
    ),
    "granite-shared": Peer(
        "granite-shared",
        "swiglu",
        hf(
            "granitemoeshared",
            "GraniteMoeSharedMLP",
            "GraniteMoeSharedConfig",
            hidden_size=D_MODEL,
            shared_intermediate_size=D_HIDDEN,
        ),
    ),
    "clvp": Peer("clvp", "geglu", hf("clvp", "ClvpEncoderMLP", "ClvpEncoderConfig", **SIZES)),
    "moonshine": Peer("moonshine", "swiglu", moonshine),
    "moshi": Peer(
        "moshi",
        "swiglu",
        hf(
            "moshi",
            "MoshiGatingMLP",
            "MoshiConfig",
            hidden_size=D_MODEL,
            ffn_dim=2 * D_HIDDEN,
            num_attention_heads=4,
        ),
        batched,
    ),
    "gpt2": Peer("gpt2", "gelu_tanh", sized("gpt2", "GPT2MLP", "GPT2Config", n_embd=D_MODEL)),
    "gptj": Peer("gptj", "gelu_tanh", sized("gptj", "GPTJMLP", "GPTJConfig", n_embd=D_MODEL)),
    "neox": Peer("neox", "gelu", hf("gpt_neox", "GPTNeoXMLP", "GPTNeoXConfig", **SIZES, **HEADS)),
    "nemotron": Peer("up-down", "relu2", hf("nemotron", "NemotronMLP", "NemotronConfig", **SIZES)),
    "apertus": Peer("apertus", "xielu", hf("apertus", "ApertusMLP", "ApertusConfig", **SIZES)),
    "kosmos2": Peer("kosmos2", "gelu", kosmos2_without_norm),
    "distilbert": Peer(
        "distilbert",
        "gelu",
        hf("distilbert", "FFN", "DistilBertConfig", dim=D_MODEL, hidden_dim=D_HIDDEN, n_heads=4),
    ),
    "qwen3-vl-vision": Peer(
        "qwen3-vl-vision",
        "gelu_tanh",
        hf("qwen3_vl", "Qwen3VLVisionMLP", "Qwen3VLVisionConfig", **SIZES),
    ),
    "timm-swiglu": Peer("timm-swiglu", "swiglu", timm("SwiGLU", D_HIDDEN)),
    "timm-swiglu-packed": Peer("timm-swiglu-packed", "swiglu", timm("SwiGLUPacked", 2 * D_HIDDEN)),
    "timm-glu": Peer("timm-glu", "glu", timm("GluMlp", 2 * D_HIDDEN)),
    "x-transformers": Peer("x-transformers", "geglu", x_transformers),
    "mixtral": Peer(
        "experts-packed",
        "swiglu",
        hf("mixtral", "MixtralExperts", "MixtralConfig", **MOE),
        routed,
        experts=True,
    ),
    "gpt-oss": Peer(
        "gpt-oss",
        "swiglu_oai",
        hf("gpt_oss", "GptOssExperts", "GptOssConfig", **MOE),
        routed,
        experts=True,
    ),
    "privacy-filter": Peer(
        "privacy-filter",
        "swiglu_oai",
        hf(
            "openai_privacy_filter",
            "OpenAIPrivacyFilterExperts",
            "OpenAIPrivacyFilterConfig",
            **MOE,
        ),
        routed,
        experts=True,
    ),
    "deepseek-v4": Peer(
        "deepseek-v4",
        "swiglu_clamp",
        hf("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config", **FEW),
        routed,
        experts=True,
    ),
    "minimax-m3": Peer(
        "minimax-m3",
        "swiglu_oai",
        hf("minimax_m3_vl", "MiniMaxM3VLExperts", "MiniMaxM3VLTextConfig", **MOE),
        routed,
        experts=True,
    ),
    "nemotron-h": Peer(
        "nemotron-h",
        "relu2",
        hf("nemotron_h", "NemotronHExperts", "NemotronHConfig", **FEW),
        routed,
        experts=True,
    ),
    "llama4": Peer(
        "llama4",
        "swiglu",
        hf("llama4", "Llama4TextExperts", "Llama4TextConfig", **MOE),
        all_experts,
        experts=True,
    ),
    "dbrx": Peer(
        "dbrx",
        "swiglu",
        dbrx_experts,
        dbrx,
        experts=True,
    ),
}


def drawn(peer: Peer) -> nn.Module:
    module = peer.build().float().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def ours(peer: Peer, state: dict[str, Tensor], layout: gf.layouts.Layout, expert: int) -> nn.Module:
    weights = gf.layouts.unpack(
        state,
        layout,
        expert=expert if peer.experts else None,
        experts=EXPERTS if peer.experts else None,
    )
    weights = {name: w for name, w in weights.items() if not name.startswith("xielu_")}
    assert weights["up_proj.weight"].shape == (D_HIDDEN, D_MODEL)
    bias = "up_proj.bias" in weights
    layer = gf.FeedForward(D_MODEL, D_HIDDEN, variant=peer.variant, bias=bias)
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
def test_the_row_says_what_the_code_does(peer: Peer) -> None:
    theirs = drawn(peer)
    layout = gf.layouts.LAYOUTS[peer.layout]
    for expert in range(EXPERTS if peer.experts else 1):
        layer = ours(peer, theirs.state_dict(), layout, expert)
        x = torch.randn(5, D_MODEL)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), peer.run(theirs, x, expert), atol=1e-4, rtol=1e-4)


GATED = {name: p for name, p in PEERS.items() if gf.layouts.LAYOUTS[p.layout].gated}


@pytest.mark.parametrize("peer", GATED.values(), ids=list(GATED))
def test_a_swapped_row_would_be_noticed(peer: Peer) -> None:
    theirs = drawn(peer)
    row = gf.layouts.LAYOUTS[peer.layout]
    other: dict[Role, Role] = {"gate": "up", "up": "gate", "down": "down"}
    swapped = dataclasses.replace(
        row,
        stored=tuple(
            dataclasses.replace(s, roles=tuple(other[role] for role in s.roles)) for s in row.stored
        ),
    )
    layer = ours(peer, theirs.state_dict(), swapped, 0)
    x = torch.randn(5, D_MODEL)
    with torch.no_grad():
        assert not torch.allclose(layer(x), peer.run(theirs, x, 0), atol=1e-2, rtol=1e-2)
