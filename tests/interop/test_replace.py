"""`replace` on small models of every architecture that it names: nothing changes but the path.

The models are made from configurations; every weight is drawn, so gate and up differ, and the
order of a packed matrix and the roles of two are told by the report and by the outputs.
"""

import copy
from pathlib import Path

import pytest
import torch
from support.architectures import ARCHITECTURES, Architecture, results
from torch import Tensor, nn

import gatedffn as gf
from gatedffn.errors import SettingError
from gatedffn.ops import measure

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the models are not ours
architectures = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES)
)
# Constants of eight digits: not the function of float64.
ROUNDED = {"bloom"}


def offs(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """How far each result is off, relative to its norm.

    A gradient that is 0 but for rounding, as of a key's bias, is held to the largest of all.
    """
    assert actual.keys() == wanted.keys()
    largest = max(float(t.norm()) for n, t in wanted.items() if n != "output")
    found = {}
    for name, theirs in wanted.items():
        scale = float(theirs.norm()) + (0.0 if name == "output" else 1e-2 * largest)
        found[name] = float((actual[name].double() - theirs.double()).norm()) / scale
    return found


def assert_close(actual: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> None:
    for name, off in offs(actual, wanted).items():
        assert off < limit, f"{name} is off by {off:.1e}"


def feed_forwards(model: nn.Module) -> list[gf.FeedForward]:
    return [m for m in model.modules() if isinstance(m, gf.FeedForward)]


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


@architectures
def test_outputs_and_gradients_stay(architecture: Architecture) -> None:
    model, inputs = architecture.build(), architecture.inputs()
    eager = results(model, inputs)
    truth = results(copy.deepcopy(model).double(), in_float64(inputs))
    report = gf.replace(model, strict=True)
    assert [(b.variant, b.order) for b in report.replaced] == [
        (architecture.variant, architecture.order)
    ] * architecture.blocks
    assert len(feed_forwards(model)) == architecture.blocks
    of_eager = offs(eager, truth)
    for name, off in offs(results(model, inputs), truth).items():
        assert off <= 4.0 * of_eager[name] + 1e-6, f"{name} is off by {off:.1e}"


@architectures
def test_in_float64_they_are_equal(architecture: Architecture) -> None:
    model, inputs = architecture.build().double(), in_float64(architecture.inputs())
    before = results(model, inputs)
    report = gf.replace(model)
    if architecture.model in ROUNDED:
        assert not report.replaced
        return
    assert len(report.replaced) == architecture.blocks
    assert_close(results(model, inputs), before, 1e-10)


@architectures
def test_undo_restores_the_very_modules(architecture: Architecture) -> None:
    model, inputs = architecture.build(), architecture.inputs()
    modules = [(m, type(m), set(vars(m))) for m in model.modules()]
    parameters, keys = list(model.parameters()), list(model.state_dict())
    before = results(model, inputs)
    report = gf.replace(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    report.undo()
    assert [(m, type(m), set(vars(m))) for m in model.modules()] == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    after = results(model, inputs)
    assert all(torch.equal(after[name], theirs) for name, theirs in before.items())
    assert not feed_forwards(model)


@architectures
def test_a_state_dict_goes_both_ways(architecture: Architecture) -> None:
    model, other = architecture.build(), architecture.build()
    gf.replace(model)
    inputs = architecture.inputs()
    other.load_state_dict(model.state_dict(), strict=True)
    assert_close(results(model, inputs), results(other, inputs), 1e-3)
    fresh = architecture.build()
    model.load_state_dict(fresh.state_dict(), strict=True)
    assert_close(results(model, inputs), results(fresh, inputs), 1e-3)


@pytest.mark.parametrize("name", ["llama", "phi3", "t5-v1.1", "gpt2", "opt", "nemotron", "bert"])
def test_save_pretrained_writes_the_original_keys(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    gf.replace(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not feed_forwards(loaded)
    assert list(loaded.state_dict()) == list(architecture.build().state_dict())
    assert_close(results(loaded.eval(), inputs), results(model, inputs), 1e-3)


def test_the_weights_are_read_by_the_operator() -> None:
    unread = {}
    for name, architecture in ARCHITECTURES.items():
        model = architecture.build()
        gf.replace(model)
        reason = feed_forwards(model)[0].why_modules()
        if reason is not None:
            unread[name] = reason
    assert unread == {"falcon-h1": "it has multipliers"}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert", "bloom"])
def test_the_operator_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    gf.replace(model)
    calls = []
    layer = gf.functional.layer

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        return layer(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(gf.functional, "layer", counted)
    model(**inputs)
    assert len(calls) == architecture.blocks


def test_the_report() -> None:
    model = ARCHITECTURES["phi3"].build()
    report = gf.replace(model)
    assert str(report) == (
        "2 of 2 feed-forward blocks replaced\n"
        "  layers.0.mlp  Phi3MLP  swiglu (beta=1): gate and up gate_up_proj, down down_proj "
        "(gate_up)\n"
        "  layers.1.mlp  Phi3MLP  swiglu (beta=1): gate and up gate_up_proj, down down_proj "
        "(gate_up)"
    )
    row = report.as_dict()["replaced"][0]
    assert row["name"] == "layers.0.mlp"
    assert row["variant"] == "swiglu"
    assert row["order"] == "gate_up"
    assert repr(report) == "Report(replaced=2, left=0, kept=0)"
    assert '"left": []' in report.to_json()
    assert str(gf.replace(nn.ReLU())) == "no feed-forward block was found"


def test_many_alike_are_told_once_and_what_they_gain_is_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(4)), "last": block()})
    model["last"].double()
    report = gf.replace(model)
    assert "  layers.0 ... last, 5 alike  Sequential  gelu: up 0, down 2" in str(report)
    runs: list[int] = []

    def side_by_side(ways: dict[str, object], _: object) -> tuple[dict[str, float], bool]:
        runs.append(len(ways))
        own, here = (way() for way in ways.values())  # type: ignore[operator]
        torch.testing.assert_close(own, here)
        return {"other": 0.002, "here": 0.001 if len(runs) % 2 else 0.002}, True

    monkeypatch.setattr(measure, "side_by_side", side_by_side)
    said = report.gain(tokens=(1, 256)).splitlines()
    assert runs == [2, 2, 2, 2]
    assert said[0].startswith("layers.0 ... layers.3, 4 alike, 1 token: the model's own code 2.000")
    assert said[-1] == (
        "Beside the model's own code: at 1 token 2.0 times as fast, at 256 tokens no difference."
    )
    assert str(report).endswith(said[-1])
    with pytest.raises(SettingError, match="tokens is 0"):
        report.gain(tokens=(0,))
    with pytest.raises(SettingError, match="nothing was replaced"):
        gf.replace(nn.ReLU()).gain()
    report.undo()
    with pytest.raises(SettingError, match=r"layers.0 \(Sequential\) is not replaced any more"):
        report.gain()


def test_a_second_call_changes_nothing() -> None:
    model = ARCHITECTURES["llama"].build()
    first = gf.replace(model)
    states = [vars(m)["_gatedffn"] for m in feed_forwards(model)]
    second = gf.replace(model, strict=True, rounding="model")
    assert [len(second.replaced), len(second.left), len(second.kept)] == [0, 0, 2]
    assert all(vars(m)["_gatedffn"] is s for m, s in zip(feed_forwards(model), states, strict=True))
    assert "was computed here before" in str(second)
    second.undo()
    assert len(feed_forwards(model)) == 2
    first.undo()
    first.undo()
    assert feed_forwards(model) == []


def test_undo_keeps_what_was_learned() -> None:
    architecture = ARCHITECTURES["llama"]
    model, inputs = architecture.build(), architecture.inputs()
    report = gf.replace(model)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.eval()
    during = results(model, inputs)
    report.undo()
    assert_close(results(model, inputs), during, 1e-3)


def test_some_blocks_by_name() -> None:
    model = ARCHITECTURES["llama"].build()
    assert [b.name for b in gf.replace(model, include="layers.1.*").replaced] == ["layers.1.mlp"]
    report = gf.replace(model, exclude=["layers.1.*", "nothing"])
    assert [b.name for b in report.replaced] == ["layers.0.mlp"]
    model = ARCHITECTURES["llama"].build()
    report = gf.replace(model, include=lambda name, _: name.endswith("0.mlp"))
    assert [b.name for b in report.replaced] == ["layers.0.mlp"]


def test_nothing_is_disturbed() -> None:
    model = ARCHITECTURES["t5-v1.1"].build().train()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        report = gf.replace(model, strict=True)
    assert len(report.replaced) == 2
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_model_can_be_the_block() -> None:
    mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(approximate="tanh"), nn.Linear(24, 8))
    x = torch.randn(3, 8)
    y = mlp(x)
    report = gf.replace(mlp)
    assert isinstance(mlp, gf.FeedForward)
    assert isinstance(mlp, nn.Sequential)
    assert mlp.variant == "gelu_tanh"
    torch.testing.assert_close(mlp(x), y)
    report.undo()
    assert type(mlp) is nn.Sequential


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "bf16"}, "rounding is 'bf16': it must be one of float32, model"),
        ({"save": "all"}, "save is 'all'"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(gf.GatedFFNError, match=message):
        gf.replace(nn.ReLU(), **arguments)  # type: ignore[arg-type]


def test_settings_can_be_changed_afterwards() -> None:
    model = ARCHITECTURES["llama"].build()
    gf.replace(model)
    block = feed_forwards(model)[0]
    assert (block.save, block.tile, block.backend) == ("gate_up", None, "auto")
    block.tile = 0
    with pytest.raises(SettingError, match="it must be a positive number of tokens"):
        block(torch.randn(2, 32))


def test_what_is_no_module() -> None:
    with pytest.raises(SettingError, match=r"model is str: it must be a torch\.nn\.Module"):
        gf.replace("llama")  # type: ignore[arg-type]


def test_an_example_of_explain() -> None:
    model = ARCHITECTURES["opt"].build()
    gf.replace(model)
    found = gf.explain(model)
    assert [e.path for e in found] == ["operator", "operator"]
    assert found[0].name == "decoder.layers.0"
    assert found[0].layer == "ReLU, 32 -> 48 -> 32"
