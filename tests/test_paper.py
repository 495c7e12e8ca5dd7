"""The published formulas: right by themselves, and what the library computes."""

import ast
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.compare import assert_matches
from torch import Tensor

from gatedffn import functional, paper

# Shazeer 2020, equations 1 to 6: the name there, and the row that computes it.
UNITS = {
    "GLU": "glu",
    "Bilinear": "bilinear",
    "ReGLU": "reglu",
    "GEGLU": "geglu",
    "SwiGLU": "swiglu",
}
UNGATED = {"FFN_ReLU": "relu", "FFN_GELU": "gelu", "FFN_Swish": "swish"}
SIGNATURES = {
    "FFN": ["x", "W1", "W2", "b1", "b2"],
    **{name: ["x", "W1", "W2"] for name in UNGATED},
    **{name: ["x", "W", "V", "b", "c"] for name in ("GLU", "Bilinear", "ReGLU", "GEGLU")},
    "SwiGLU": ["x", "W", "V", "b", "c", "beta"],
    **{f"FFN_{name}": ["x", "W", "V", "W2"] for name in UNITS},
}


def numbers(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


X, W, V, W2 = numbers(7, 12), numbers(12, 20) / 3, numbers(12, 20) / 3, numbers(20, 9) / 4
B, C = numbers(20), numbers(20)


def judge(ours: Callable[..., Tensor], published: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Both in float32, against the published formula in float64."""
    single = [tensor.float() for tensor in tensors]
    truth = published(*(tensor.double() for tensor in single))
    assert_matches(ours(*single), truth, published(*single))


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures_as_published(name: str) -> None:
    assert list(inspect.signature(getattr(paper, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(name, {}) for name in UNITS if name != "SwiGLU"]
    + [("SwiGLU", {"beta": 1.0}), ("SwiGLU", {"beta": 1.7})],
)
def test_unit(name: str, parameters: dict[str, float]) -> None:
    published = partial(getattr(paper, name), **parameters)

    def ours(x: Tensor, w: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Tensor:
        values: dict[str, Any] = {**parameters}
        return functional.gated_linear(x, w.T, v.T, b, c, variant=UNITS[name], **values)

    judge(ours, published, X, W, V, B, C)


def test_beta_is_used() -> None:
    assert not torch.equal(paper.SwiGLU(X, W, V, B, C, 1.0), paper.SwiGLU(X, W, V, B, C, 1.7))


@pytest.mark.parametrize(("name", "row"), UNITS.items(), ids=list(UNITS))
def test_gated_layer(name: str, row: str) -> None:
    judge(
        lambda x, w, v, w2: functional.feed_forward(x, w.T, v.T, w2.T, variant=row),
        getattr(paper, f"FFN_{name}"),
        *(X, W, V, W2),
    )


@pytest.mark.parametrize(("name", "row"), UNGATED.items(), ids=list(UNGATED))
def test_ungated_layer(name: str, row: str) -> None:
    judge(
        lambda x, w, w2: functional.feed_forward(x, None, w.T, w2.T, variant=row),
        getattr(paper, name),
        *(X, W, W2),
    )


def test_the_layer_of_the_transformer() -> None:
    judge(
        lambda x, w1, w2, b1, b2: functional.feed_forward(
            x, None, w1.T, w2.T, None, b1, b2, variant="relu"
        ),
        paper.FFN,
        *(X, W, W2, B, numbers(9)),
    )


def test_by_hand_on_one_number() -> None:
    one, two, three = (torch.tensor([[v]], dtype=torch.float64) for v in (1.0, 2.0, 3.0))
    b, c, w2 = (torch.tensor([v], dtype=torch.float64) for v in (0.5, -1.0, 0.25))
    gate, up = 2.5, 2.0  # 1 * 2 + 0.5 and 1 * 3 - 1
    sigmoid = 1.0 / (1.0 + math.exp(-gate))
    cdf = 0.5 * (1.0 + math.erf(gate / math.sqrt(2.0)))
    expected = {
        "GLU": sigmoid * up,
        "Bilinear": gate * up,
        "ReGLU": gate * up,
        "GEGLU": gate * cdf * up,
    }
    for name, value in expected.items():
        truth = torch.tensor([[value]], dtype=torch.float64)
        actual = getattr(paper, name)(one, two, three, b, c)
        assert_matches(actual.float(), truth, truth.float())
    swiglu = torch.tensor([[gate / (1.0 + math.exp(-2.0 * gate)) * up]], dtype=torch.float64)
    assert_matches(paper.SwiGLU(one, two, three, b, c, 2.0).float(), swiglu, swiglu.float())
    ffn = torch.tensor([[gate * 0.25 + 0.5]], dtype=torch.float64)
    assert_matches(paper.FFN(one, two, w2[None], b, b).float(), ffn, ffn.float())


def test_negative_gates_are_closed_by_relu() -> None:
    assert torch.equal(paper.ReGLU(-X.abs(), W.abs(), V, -B.abs(), C), 0.0 * (-X.abs() @ V + C))


def test_the_page_uses_plain_pytorch_only() -> None:
    tree = ast.parse(inspect.getsource(paper))
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    assert sources | names == {"torch"}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_the_page_reads_like_the_paper(name: str) -> None:
    function = getattr(paper, name)
    assert re.search(r"`[^`]+`", inspect.getdoc(function) or ""), "the formula as printed"
    body = ast.parse(inspect.getsource(function)).body[0]
    assert isinstance(body, ast.FunctionDef)
    assert len(body.body) == 2  # the formula and its computation, nothing else
