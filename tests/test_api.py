"""The public face: the names and signatures that users write against, and their examples."""

import doctest
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gatedffn as gf
from gatedffn import errors

NAMES = {
    "GLU",
    "VARIANTS",
    "Experts",
    "FeedForward",
    "GatedConv1d",
    "GatedConvStack",
    "GatedFFNError",
    "MixtureFeedForward",
    "Swish",
    "Variant",
    "explain",
    "functional",
    "get_variant",
    "hidden_size",
    "layouts",
    "paper",
    "parallelize",
    "replace",
    "variant",
}

# Design section 2. A change here breaks code, notebooks and checks of users.
SIGNATURES: dict[str, str] = {
    "get_variant": "(name)",
    "variant": (
        "(name, *, phi, psi='identity', parameters=None, d_phi=None, d_psi=None, label=None, "
        'formula=None, source="one\'s own")'
    ),
    "explain": "(module, x=None, *, tokens=1, slots=None)",
    "replace": (
        "(model, *, strict=False, rounding='float32', include=None, exclude=None, backend='auto', "
        "save='gate_up')"
    ),
    "parallelize": (
        "(model, mesh, *, sequence_parallel=False, whole_experts=False, use_local_output=True)"
    ),
    "hidden_size": ("(d_model, *, variant='swiglu', multiple_of=8, multiplier=1.0, explain=False)"),
    "functional.activation": "(x, variant='relu', **parameters)",
    "functional.swish": "(x, beta=1.0)",
    "functional.gating": "(gate, up, variant='swiglu', **parameters)",
    "functional.glu": "(x, dim=-1, *, variant='glu', order='up_gate', **parameters)",
    "functional.gated_linear": (
        "(x, gate_weight, up_weight, gate_bias=None, up_bias=None, *, variant='swiglu', "
        "save='gate_up', tile=None, backend='auto', **parameters)"
    ),
    "functional.feed_forward": (
        "(x, gate_weight, up_weight, down_weight, gate_bias=None, up_bias=None, down_bias=None, "
        "*, variant='swiglu', save='gate_up', tile=None, backend='auto', **parameters)"
    ),
    "functional.experts": (
        "(x, gate_weight, up_weight, down_weight, index, weights, gate_bias=None, up_bias=None, "
        "down_bias=None, *, variant='swiglu', order=None, weigh='output', save='gate_up', "
        "backend='auto', **parameters)"
    ),
    "layouts.get_layout": "(name)",
    "layouts.unpack": (
        "(tensors, layout, *, layer=None, expert=None, tp=1, experts=None, d_hidden=None)"
    ),
    "layouts.pack": "(weights, layout, *, tp=1, path='')",
    "layouts.load_feed_forward": (
        "(path, layout=None, layer=0, *, expert=None, variant=None, tp=None, at=None, "
        "experts=None, d_hidden=None, any_width=False)"
    ),
    "Swish": "(beta=1.0, *, learnable=False, num_parameters=1, dim=-1, device=None, dtype=None)",
    "GLU": (
        "(variant='glu', *, dim=-1, order='up_gate', learnable=None, device=None, dtype=None, "
        "**parameters)"
    ),
    "FeedForward": (
        "(d_model, d_hidden=None, *, variant='swiglu', d_out=None, bias=False, dropout=0.0, "
        "device=None, dtype=None, learnable=None, save='gate_up', tile=None, backend='auto', "
        "**parameters)"
    ),
    "Experts": (
        "(d_model, d_hidden, num_experts, *, variant='swiglu', bias=False, device=None, "
        "dtype=None, learnable=None, weigh='output', save='gate_up', backend='auto', "
        "**parameters)"
    ),
    "MixtureFeedForward": (
        "(d_model, d_hidden, num_experts, *, top_k, variant='swiglu', score='softmax', "
        "score_after_top_k=False, normalize=True, scale=1.0, groups=1, top_groups=1, "
        "group_best=None, correction_bias=False, router_bias=False, shared_hidden=None, "
        "shared_gate=False, bias=False, device=None, dtype=None, learnable=None, "
        "weigh='output', save='gate_up', backend='auto', **parameters)"
    ),
    "GatedConv1d": (
        "(in_channels, out_channels=None, kernel_size=4, *, variant='glu', bias=True, "
        "device=None, dtype=None, learnable=None, **parameters)"
    ),
    "GatedConvStack": (
        "(in_channels, blocks, *, variant='glu', bias=True, device=None, dtype=None, "
        "learnable=None, **parameters)"
    ),
}

ROOT = Path(gf.__file__).parent
WITH_EXAMPLES = [
    ".".join(("gatedffn", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def named(name: str) -> Any:
    value: Any = gf
    for part in name.split("."):
        value = getattr(value, part)
    return value


def bare_signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def documented() -> list[str]:
    own = inspect.getmembers(
        gf.functional,
        lambda value: inspect.isfunction(value) and value.__module__ == gf.functional.__name__,
    )
    functions = [f"functional.{name}" for name, _ in own if not name.startswith("_")]
    functions += [
        f"layouts.{name}"
        for name in gf.layouts.__all__
        if inspect.isfunction(named(f"layouts.{name}"))
    ]
    top = [name for name in NAMES if inspect.isfunction(named(name))]
    layers = [
        name
        for name in NAMES
        if inspect.isclass(named(name)) and issubclass(named(name), torch.nn.Module)
    ]
    return sorted(functions + top + layers)


def test_the_public_names() -> None:
    assert set(gf.__all__) == NAMES
    assert all(hasattr(gf, name) for name in NAMES)
    assert gf.__version__


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_a_signature_is_as_published(name: str) -> None:
    assert bare_signature(named(name)) == SIGNATURES[name]


def test_every_public_function_and_layer_has_a_frozen_signature() -> None:
    internal = {f"functional.{name}" for name in ("split_packed", "layer")}
    assert set(documented()) - internal == set(SIGNATURES)


@pytest.mark.parametrize("name", documented())
def test_the_docstring_has_an_example(name: str) -> None:
    text = inspect.getdoc(named(name)) or ""
    assert text.splitlines()[0].rstrip().endswith((".", ":", "`"))
    assert doctest.DocTestParser().get_examples(text), f"{name} shows no example"


@pytest.mark.parametrize("name", sorted(set(documented()) - {"functional.swish"}))
def test_the_docstring_says_what_it_raises(name: str) -> None:
    assert "Raises:" in (inspect.getdoc(named(name)) or "") or name == "functional.split_packed"


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_run(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried
    assert not failed


def test_every_error_is_ours_and_a_built_in_one() -> None:
    classes = [
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if value is not gf.GatedFFNError
    ]
    assert classes
    for error in classes:
        assert issubclass(error, gf.GatedFFNError)
        assert issubclass(error, (ValueError, OSError, ImportError, RuntimeError))
        assert error.__doc__
