"""With the same weights, the same outputs and gradients as the layers that others publish.

Every peer draws its own weights, so gate and up differ and a swap of the two fails.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.compare import assert_matches
from support.libraries import alone
from torch import Tensor, nn

from gatedffn import GLU, VARIANTS, FeedForward

D_MODEL, D_HIDDEN = 24, 40
Named = Mapping[str, Tensor]

# x-transformers scripts a function while it is imported.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A layer of somebody else, the variant it computes, and where its weights are.

    `renamed` takes its parameters (or their gradients) by name to those of `FeedForward`.
    """

    variant: str
    build: Callable[[], nn.Module]
    renamed: Callable[[Named], dict[str, Tensor]]


# Hugging Face


def hugging_face(folder: str, layer: str, config: str, **settings: Any) -> nn.Module:
    models = "transformers.models"
    configuration = getattr(importlib.import_module(f"{models}.{folder}"), config)(**settings)
    modeling = importlib.import_module(f"{models}.{folder}.modeling_{folder}")
    module: nn.Module = getattr(modeling, layer)(configuration)
    return module.eval()


def llama(bias: bool = False) -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": D_HIDDEN, "num_attention_heads": 4}
    return hugging_face(
        "llama", "LlamaMLP", "LlamaConfig", **sizes, hidden_act="silu", mlp_bias=bias
    )


def gemma() -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": D_HIDDEN}
    return hugging_face("gemma", "GemmaMLP", "GemmaConfig", **sizes, hidden_act="gelu_pytorch_tanh")


def phi3() -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": D_HIDDEN, "pad_token_id": 0}
    return hugging_face("phi3", "Phi3MLP", "Phi3Config", **sizes, hidden_act="silu")


def t5(feed_forward_proj: str) -> nn.Module:
    layer = "T5DenseGatedActDense" if "gated" in feed_forward_proj else "T5DenseActDense"
    sizes = {"d_model": D_MODEL, "d_ff": D_HIDDEN}
    return hugging_face("t5", layer, "T5Config", **sizes, feed_forward_proj=feed_forward_proj)


def same_names(named: Named) -> dict[str, Tensor]:
    return dict(named)


def from_t5_gated(named: Named) -> dict[str, Tensor]:
    ours = {"wi_0.weight": "gate_proj", "wi_1.weight": "up_proj", "wo.weight": "down_proj"}
    return {f"{ours[name]}.weight": tensor for name, tensor in named.items()}


def from_t5(named: Named) -> dict[str, Tensor]:
    ours = {"wi.weight": "up_proj.weight", "wo.weight": "down_proj.weight"}
    return {ours[name]: tensor for name, tensor in named.items()}


def from_packed(
    packed: str, down: str, first: str, second: str
) -> Callable[[Named], dict[str, Tensor]]:
    """The rows of one packed projection, half by half, and the other projection."""

    def renamed(named: Named) -> dict[str, Tensor]:
        ours = {}
        for name, tensor in named.items():
            module, kind = name.rsplit(".", 1)
            if module == packed:
                half = tensor.shape[0] // 2
                ours[f"{first}.{kind}"], ours[f"{second}.{kind}"] = tensor[:half], tensor[half:]
            else:
                assert module == down
                ours[f"down_proj.{kind}"] = tensor
        return ours

    return renamed


# x-transformers


def x_transformers(**settings: bool) -> nn.Module:
    peer: Any = importlib.import_module("x_transformers.x_transformers")
    layer: nn.Module = peer.FeedForward(D_MODEL, mult=D_HIDDEN / D_MODEL, **settings)
    return layer.eval()


def from_x_transformers(named: Named) -> dict[str, Tensor]:
    ours = {"ff.0.0": "up_proj", "ff.2": "down_proj"}
    return {f"{ours[n.rsplit('.', 1)[0]]}.{n.rsplit('.', 1)[1]}": t for n, t in named.items()}


# timm


def timm_mlp() -> Any:
    """timm's `layers/mlp.py` without its `__init__`, which would import torchvision."""
    return alone("timm", "layers", "mlp")


def timm(layer: str, **settings: Any) -> nn.Module:
    # GluMlp counts gate and up together.
    width = 2 * D_HIDDEN if layer == "GluMlp" else D_HIDDEN
    module: nn.Module = getattr(timm_mlp(), layer)(D_MODEL, width, **settings)
    return module.eval()


def from_timm_swiglu(named: Named) -> dict[str, Tensor]:
    ours = {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}
    return {f"{ours[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in named.items()}


def from_timm_mlp(named: Named) -> dict[str, Tensor]:
    ours = {"fc1": "up_proj", "fc2": "down_proj"}
    return {f"{ours[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in named.items()}


GATE_UP, UP_GATE = ("gate_proj", "up_proj"), ("up_proj", "gate_proj")
PACKED_X = from_packed("ff.0.proj", "ff.2", *UP_GATE)

PEERS = {
    "llama": Peer("swiglu", llama, same_names),
    "llama-bias": Peer("swiglu", lambda: llama(bias=True), same_names),
    "gemma": Peer("geglu_tanh", gemma, same_names),
    "phi3": Peer("swiglu", phi3, from_packed("gate_up_proj", "down_proj", *GATE_UP)),
    "t5-gated": Peer("geglu_tanh", lambda: t5("gated-gelu"), from_t5_gated),
    "t5-gated-silu": Peer("swiglu", lambda: t5("gated-silu"), from_t5_gated),
    "t5-relu": Peer("relu", lambda: t5("relu"), from_t5),
    "x-glu": Peer("geglu", lambda: x_transformers(glu=True), PACKED_X),
    "x-glu-swish": Peer("swiglu", lambda: x_transformers(glu=True, swish=True), PACKED_X),
    "x-glu-relu2": Peer("relu2_glu", lambda: x_transformers(glu=True, relu_squared=True), PACKED_X),
    "x-glu-capped": Peer(
        "situ_glu", lambda: x_transformers(glu=True, swish=True, glu_softclamp=True), PACKED_X
    ),
    "x-gelu": Peer("gelu", x_transformers, from_x_transformers),
    "x-relu2": Peer("relu2", lambda: x_transformers(relu_squared=True), from_x_transformers),
    "timm-swiglu": Peer("swiglu", lambda: timm("SwiGLU"), from_timm_swiglu),
    "timm-glu": Peer("glu", lambda: timm("GluMlp"), from_packed("fc1", "fc2", *UP_GATE)),
    "timm-gate-first": Peer(
        "geglu",
        lambda: timm("GluMlp", act_layer=nn.GELU, gate_last=False),
        from_packed("fc1", "fc2", *GATE_UP),
    ),
    "timm-mlp": Peer("gelu", lambda: timm("Mlp"), from_timm_mlp),
}
peers = pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
GATED = {name: peer for name, peer in PEERS.items() if VARIANTS[peer.variant].gated}
gated_peers = pytest.mark.parametrize("peer", GATED.values(), ids=list(GATED))


def results(module: nn.Module, x: Tensor, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The output, the gradient of the input, and those of the parameters by their names."""
    x = x.clone().requires_grad_()
    output = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(output, (x, *parameters), weights)
    yield "output", output.detach()
    yield "x", found[0]
    yield from zip(names, found[1:], strict=True)


def of_peer(peer: Peer, module: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    named = dict(results(module, x, weights))
    own = {name: named.pop(name) for name in ("output", "x")}
    return own | peer.renamed(named)


def judge(peer: Peer, theirs: nn.Module, state: Named) -> None:
    ours = FeedForward(D_MODEL, D_HIDDEN, variant=peer.variant, bias="up_proj.bias" in state)
    ours.load_state_dict(state)  # strict: every weight is used and every weight is there
    x, weights = torch.randn(3, 5, D_MODEL), torch.randn(3, 5, D_MODEL)
    actual = dict(results(ours, x, weights))
    eager = of_peer(peer, theirs, x, weights)
    truth = of_peer(peer, copy.deepcopy(theirs).double(), x.double(), weights.double())
    assert actual.keys() == eager.keys()
    for name in eager:
        assert_matches(actual[name], truth[name], eager[name], name)


@peers
def test_same_outputs_and_gradients(peer: Peer) -> None:
    theirs = peer.build()
    judge(peer, theirs, peer.renamed(theirs.state_dict()))


@gated_peers
def test_swapped_branches_would_be_noticed(peer: Peer) -> None:
    theirs = peer.build()
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
    state = peer.renamed(theirs.state_dict())
    swapped = {f"{other[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in state.items()}
    with pytest.raises(AssertionError, match="error"):
        judge(peer, theirs, swapped)


def test_a_llama_state_dict_loads_as_it_is() -> None:
    ours, theirs = FeedForward(D_MODEL, D_HIDDEN, variant="swiglu"), llama()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_glu_of_pytorch(dim: int) -> None:
    x, weights = torch.randn(4, 6, 8), torch.randn(4, 6, 8).narrow(dim, 0, 1)
    theirs, ours = nn.GLU(dim), GLU(dim=dim)
    shape = theirs(x).shape
    weights = weights.expand(shape)

    def both(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        output = module(leaf)
        return [output, *torch.autograd.grad(output, leaf, weights.to(dtype))]

    truth, eager = both(theirs, torch.float64), both(theirs, torch.float32)
    for actual, true, yardstick in zip(both(ours, torch.float32), truth, eager, strict=True):
        assert_matches(actual, true, yardstick)
