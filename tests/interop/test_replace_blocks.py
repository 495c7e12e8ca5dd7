"""`replace` on the feed-forward layers of other libraries, alone and inside a model."""

import copy
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.architectures import spread
from support.libraries import alone, litgpt
from torch import Tensor, nn

import gatedffn as gf

D, H = 24, 40
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries are not ours


def timm(layer: str, width: int = H, **settings: Any) -> nn.Module:
    module: nn.Module = getattr(alone("timm", "layers", "mlp"), layer)(D, width, **settings)
    return module


def x_transformers(**settings: Any) -> nn.Module:
    library: Any = importlib.import_module("x_transformers.x_transformers")
    module: nn.Module = library.FeedForward(D, mult=H / D, **settings)
    return module


def diffusers(activation: str) -> nn.Module:
    library: Any = importlib.import_module("diffusers.models.attention")
    module: nn.Module = library.FeedForward(D, mult=2, activation_fn=activation, dropout=0.1)
    return module


def diffusers_gate(name: str) -> nn.Module:
    library: Any = importlib.import_module("diffusers.models.activations")
    module: nn.Module = getattr(library, name)(D, H)
    return module


def xformers(**settings: Any) -> nn.Module:
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it looks for its CUDA extensions
    library: Any = importlib.import_module("xformers.ops")
    module: nn.Module = library.SwiGLU(D, H, **settings)
    return module


def torchtune() -> nn.Module:
    module: nn.Module = alone("torchtune", "modules", "feed_forward").FeedForward(
        gate_proj=nn.Linear(D, H, bias=False),
        down_proj=nn.Linear(H, D, bias=False),
        up_proj=nn.Linear(D, H, bias=False),
    )
    return module


def lit(name: str, **settings: Any) -> nn.Module:
    library = litgpt()
    config = library.Config(n_embd=D, n_head=4, intermediate_size=H, **settings)
    module: nn.Module = getattr(library, name)(config)
    return module


def encoder_layer(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 4, H, dropout=0.0, batch_first=True, **settings)


@dataclass(frozen=True, slots=True)
class Found:
    """A layer, and what the report should say of it."""

    build: Callable[[], nn.Module]
    variant: str
    projections: dict[str, str]
    order: str | None = None


def packed(both: str, down: str) -> dict[str, str]:
    return {"gate and up": both, "down": down}


FC = {"up": "fc1", "down": "fc2"}
NET = {"up": "net.0.proj", "down": "net.2"}
LAYERS = {
    "timm-swiglu": Found(
        lambda: timm("SwiGLU"), "swiglu", {"gate": "fc1_g", "up": "fc1_x", "down": "fc2"}
    ),
    "timm-swiglu-norm": Found(
        lambda: timm("SwiGLU", norm_layer=nn.LayerNorm),
        "swiglu",
        {"gate": "fc1_g", "up": "fc1_x", "down": "fc2"},
    ),
    "timm-packed": Found(
        lambda: timm("SwiGLUPacked", 2 * H), "swiglu", packed("fc1", "fc2"), "gate_up"
    ),
    "timm-glu": Found(lambda: timm("GluMlp", 2 * H), "glu", packed("fc1", "fc2"), "up_gate"),
    "timm-glu-drop": Found(
        lambda: timm("GluMlp", 2 * H, drop=0.3), "glu", packed("fc1", "fc2"), "up_gate"
    ),
    "timm-geglu": Found(
        lambda: timm("GluMlp", 2 * H, act_layer=nn.GELU, gate_last=False),
        "geglu",
        packed("fc1", "fc2"),
        "gate_up",
    ),
    "timm-mlp": Found(lambda: timm("Mlp", drop=0.3), "gelu", FC),
    "timm-mlp-norm": Found(lambda: timm("Mlp", norm_layer=nn.LayerNorm), "gelu", FC),
    "x-gelu": Found(x_transformers, "gelu", {"up": "0.0", "down": "2"}),
    "x-relu2": Found(
        lambda: x_transformers(relu_squared=True), "relu2", {"up": "0.0", "down": "2"}
    ),
    "x-glu": Found(lambda: x_transformers(glu=True), "geglu", packed("0.proj", "2"), "up_gate"),
    "x-swish": Found(
        lambda: x_transformers(glu=True, swish=True), "swiglu", packed("0.proj", "2"), "up_gate"
    ),
    "x-capped": Found(
        lambda: x_transformers(glu=True, swish=True, glu_softclamp=True),
        "situ_glu",
        packed("0.proj", "2"),
        "up_gate",
    ),
    "x-norm": Found(
        lambda: x_transformers(post_act_ln=True, dropout=0.2), "gelu", {"up": "0.0", "down": "3"}
    ),
    "diffusers-geglu": Found(
        lambda: diffusers("geglu"), "geglu", packed("net.0.proj", "net.2"), "up_gate"
    ),
    "diffusers-swiglu": Found(
        lambda: diffusers("swiglu"), "swiglu", packed("net.0.proj", "net.2"), "up_gate"
    ),
    "diffusers-gelu": Found(lambda: diffusers("gelu"), "gelu", NET),
    "diffusers-tanh": Found(lambda: diffusers("gelu-approximate"), "gelu_tanh", NET),
    "diffusers-quick": Found(lambda: diffusers("geglu-approximate"), "quick_gelu", NET),
    "diffusers-GEGLU": Found(
        lambda: diffusers_gate("GEGLU"), "geglu", {"gate and up": "proj"}, "up_gate"
    ),
    "diffusers-SwiGLU": Found(
        lambda: diffusers_gate("SwiGLU"), "swiglu", {"gate and up": "proj"}, "up_gate"
    ),
    "xformers": Found(xformers, "swiglu", packed("w12", "w3"), "gate_up"),
    "xformers-unpacked": Found(
        lambda: xformers(_pack_weights=False), "swiglu", {"gate": "w1", "up": "w2", "down": "w3"}
    ),
    "torchtune": Found(torchtune, "swiglu", {"gate": "w1", "up": "w3", "down": "w2"}),
    "litgpt": Found(
        lambda: lit("LLaMAMLP", bias=False),
        "swiglu",
        {"gate": "fc_1", "up": "fc_2", "down": "proj"},
    ),
    "litgpt-gemma": Found(
        lambda: lit("GemmaMLP", gelu_approximate="tanh"),
        "geglu_tanh",
        {"gate": "fc_1", "up": "fc_2", "down": "proj"},
    ),
    "litgpt-neox": Found(lambda: lit("GptNeoxMLP"), "gelu", {"up": "fc", "down": "proj"}),
    "torch-encoder": Found(encoder_layer, "relu", {"up": "linear1", "down": "linear2"}),
    "torch-encoder-gelu": Found(
        lambda: encoder_layer(activation="gelu", norm_first=True),
        "gelu",
        {"up": "linear1", "down": "linear2"},
    ),
}
layers = pytest.mark.parametrize("found", LAYERS.values(), ids=list(LAYERS))


def both(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, with the same random numbers each time."""
    torch.manual_seed(11)
    x = x.clone().requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(y.square().sum(), [x, *named.values()])
    return dict(zip(["y", "x", *named], [y.detach(), *grads], strict=True))


@layers
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_of_another_library(found: Found, training: bool, dtype: torch.dtype) -> None:
    layer = found.build()
    spread(layer)
    layer.to(dtype).train(training)
    other = copy.deepcopy(layer)
    report = gf.replace(layer, strict=True)
    assert len(report.replaced) == 1
    block = report.replaced[0]
    assert (block.variant, block.projections) == (found.variant, found.projections)
    assert block.order == found.order
    x = torch.randn(2, 5, D, dtype=dtype)
    mine, theirs = both(layer, x), both(other, x)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)
    assert list(layer.state_dict()) == list(other.state_dict())
    report.undo()
    assert not any(isinstance(m, gf.FeedForward) for m in layer.modules())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: x_transformers(glu=True, glu_mult_bias=True),
            "it has a parameter of its own, 0.mult_bias",
        ),
        (lambda: x_transformers(custom_activation=nn.Softsign()), "0.1 is Softsign"),
    ],
)
def test_a_layer_that_does_more_is_left(build: Callable[[], nn.Module], reason: str) -> None:
    report = gf.replace(build())
    assert not report.replaced
    assert reason in str(report)


def test_a_model_of_another_library() -> None:
    library: Any = importlib.import_module("x_transformers")
    model = library.TransformerWrapper(
        num_tokens=40,
        max_seq_len=16,
        attn_layers=library.Decoder(dim=D, depth=2, heads=2, ff_glu=True, ff_swish=True),
    ).eval()
    ids = torch.randint(0, 40, (2, 9))
    before = model(ids)
    report = gf.replace(model, strict=True)
    assert [b.variant for b in report.replaced] == ["swiglu", "swiglu"]
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
