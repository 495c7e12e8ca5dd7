"""A replaced model is still a model: copied, moved, compiled, exported, wrapped."""

import copy
import io
import pickle
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, results
from torch import Tensor, nn

import gatedffn as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models and exporters
D, H = 8, 24
# A gated one, a packed one, one with its matrices the other way round, one whose own forward does
# more, one with a learned activation, one without a projection down.
SOME = ["llama", "phi3", "gpt2", "opt", "apertus", "bert", "falcon-h1"]
some = pytest.mark.parametrize("name", SOME)


class Mlp(nn.Module):
    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, h), nn.Linear(h, d), nn.Linear(d, h)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w2(self.act(self.w1(x)) * self.w3(x))
        return result


class Twice(nn.Module):
    def __init__(self, d: int = D, h: int = H) -> None:
        super().__init__()
        self.one, self.two = Mlp(d, h), Mlp(d, h)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.two(x + self.one(x))
        return result


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def equal(model: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> None:
    mine, theirs = results(model, inputs), results(other, inputs)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)


@some
def test_a_copy_is_a_model_of_its_own(name: str) -> None:
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    report = gf.replace(model)
    other = copy.deepcopy(model)
    equal(model, other, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float(results(other, inputs)["output"].abs().max()) > 0
    report.undo()
    assert len(gf.replace(other).kept) == 2


@some
def test_pickle(name: str) -> None:
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    gf.replace(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    equal(model, torch.load(buffer, weights_only=False), inputs)


def test_pickle_in_another_process(tmp_path: Path) -> None:
    mlp = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
    gf.replace(mlp)
    x = torch.randn(3, D)
    (tmp_path / "mlp").write_bytes(pickle.dumps((mlp, x, mlp(x))))
    code = (
        "import pickle, sys, torch, pathlib\n"
        "mlp, x, y = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "import gatedffn as gf\n"
        "assert isinstance(mlp, gf.FeedForward)\n"
        "torch.testing.assert_close(mlp(x), y)\n"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code, str(tmp_path / "mlp")], check=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to(dtype: torch.dtype) -> None:
    model = Twice()
    other = copy.deepcopy(model)
    gf.replace(model)
    x = torch.randn(3, D, dtype=dtype)
    model.to(dtype)
    other.to(dtype)
    assert model.one.w1.weight.dtype is dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(model(x), other(x), **tolerance)  # type: ignore[arg-type]


def test_to_meta_and_back() -> None:
    model = Twice()
    gf.replace(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(3, D)
    y = model(x)
    model.to("meta")
    assert model(x.to("meta")).is_meta
    model.to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(model(x), y)


@some
def test_before_its_weights_are_there(name: str) -> None:
    """On the meta device the same is found out as with numbers."""
    model = ARCHITECTURES[name].build()
    empty = copy.deepcopy(model).to("meta")
    found, report = gf.replace(model), gf.replace(empty)
    if name == "apertus":
        words = "act_fn.beta is a buffer whose numbers are not here: load them first"
        assert [block.reason for block in report.left] == [words] * 2
        return
    assert report.replaced == found.replaced
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    for (name, of), (_, other) in zip(model.named_modules(), empty.named_modules(), strict=True):
        if isinstance(of, gf.FeedForward) and not of.why_own_forward():
            x = torch.randn(2, 3, of.d_model)
            with torch.no_grad():
                torch.testing.assert_close(of._by_modules(x), other._by_modules(x), msg=name)


def test_device_map(tmp_path: Path) -> None:
    accelerate: Any = import_module("accelerate")
    architecture = ARCHITECTURES["llama"]
    model, inputs = architecture.build(), architecture.inputs()
    model.save_pretrained(tmp_path)
    wanted = results(model, inputs)["output"]
    mapped = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert len(gf.replace(mapped).replaced) == 2
    torch.testing.assert_close(mapped(**inputs)[0], wanted)
    # Offloaded weights are put in place by hooks, which are called.
    gf.replace(model)
    offloaded = accelerate.disk_offload(model, str(tmp_path / "off"), execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs)[0], wanted)


def test_what_accelerate_offloads_is_put_in_place(tmp_path: Path) -> None:
    accelerate: Any = import_module("accelerate")
    plain = Twice()
    x = torch.randn(3, D)
    model = accelerate.disk_offload(copy.deepcopy(plain), str(tmp_path), execution_device="cpu")
    gf.replace(model, strict=True)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_compile(name: str, when: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    wanted = results(model, inputs)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    if when == "after":
        gf.replace(model, strict=True)
    else:
        compiled(**inputs)
        report = gf.replace(compiled, strict=True)
        assert len(report.replaced) == 2
    made = results(compiled, inputs)
    for key, tensor in wanted.items():
        torch.testing.assert_close(
            made["_orig_mod." * (key != "output") + key], tensor, rtol=1e-3, atol=1e-3
        )


def compiled_and_watched(model: nn.Module) -> tuple[Any, list[str]]:
    """A compiled model, and the code of every graph of it that runs."""
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            ran.append(graph.code)
            return graph(*args)

        return run

    return torch.compile(model, backend=backend, fullgraph=True), ran


def test_replacing_and_undoing_in_a_compiled_model_take_effect() -> None:
    model = Twice()
    compiled, ran = compiled_and_watched(model)
    x = torch.randn(3, D)
    y = compiled(x)
    report = gf.replace(compiled)
    torch.testing.assert_close(compiled(x), y)
    report.undo()
    torch.testing.assert_close(compiled(x), y)
    before, during, after = ran
    assert during != before
    assert after == before


def test_a_block_that_was_compiled_by_itself_is_left() -> None:
    model = Twice()
    model.one.compile(backend="eager")
    report = gf.replace(model)
    assert [b.name for b in report.replaced] == ["two"]
    assert report.left[0].reason == "it was compiled by itself: replace the model before"


def test_a_replaced_block_can_be_compiled_by_itself() -> None:
    model = Twice()
    x = torch.randn(3, D)
    y = model(x)
    report = gf.replace(model)
    model.one.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), y)
    report.undo()
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = Twice()
    x = torch.randn(3, D)
    y = model(x)
    gf.replace(model)
    program = torch.export.export(model, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert all(target.startswith("aten.") for target in targets), targets
    torch.testing.assert_close(program.module()(x), y)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "opt"])
def test_export_of_a_model(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    gf.replace(model)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.model(input_ids=ids, use_cache=False)[0]
            return result

    ids = inputs["input_ids"]
    program = torch.export.export(Logits(), (ids,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("gatedffn" in target for target in targets)
    torch.testing.assert_close(program.module()(ids), model(**inputs)[0], rtol=1e-4, atol=1e-4)


def test_onnx(tmp_path: Path) -> None:
    onnx: Any = import_module("onnx")
    model = Twice()
    x = torch.randn(3, D)
    gf.replace(model)
    path = tmp_path / "twice.onnx"
    torch.onnx.export(model, (x,), str(path), dynamo=True)
    made = onnx.load(str(path))
    assert {node.domain for node in made.graph.node} == {""}
    run: Any = import_module("onnx.reference").ReferenceEvaluator(made)
    output = run.run(None, {made.graph.input[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


def test_undo_beneath_a_wrapper_raises() -> None:
    model = Twice()
    report = gf.replace(model)
    vars(model.one)["forward"] = model.one.forward
    with pytest.raises(gf.GatedFFNError, match=r"one \(Mlp\) was changed after it was replaced"):
        report.undo()
    del vars(model.one)["forward"]
    report.undo()
    assert type(model.one) is Mlp


def test_a_block_in_two_places() -> None:
    model = nn.ModuleDict({"a": Mlp()})
    model["b"] = model["a"]
    report = gf.replace(model)
    assert len(report.replaced) == 1
    assert isinstance(model["b"], gf.FeedForward)


def test_tied_weights_and_the_optimiser_stay() -> None:
    model = Twice()
    model.two.w1.weight = model.one.w1.weight
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    other = copy.deepcopy(model)
    x = torch.randn(3, D)
    gf.replace(model)
    for m, o in ((model, optimiser), (other, torch.optim.SGD(other.parameters(), lr=0.1))):
        m(x).square().sum().backward()
        o.step()
    assert model.two.w1.weight is model.one.w1.weight
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), msg=name)


def test_transforms() -> None:
    model = Twice()
    x, v = torch.randn(3, D), torch.randn(3, D)
    wanted = torch.func.jvp(model, (x,), (v,))
    of_each = torch.vmap(torch.func.jacrev(model))(x)
    gf.replace(model)
    made = torch.func.jvp(model, (x,), (v,))
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(model))(x), of_each)
