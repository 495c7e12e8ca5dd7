"""Which files of a folder are read: those that transformers loads, and a line about the others."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gatedffn as gf
from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoints.convert import convert
from gatedffn.interop.checkpoints.opening import is_index, open_checkpoint

Named = dict[str, Tensor]
GATE = "model.layers.0.mlp.gate_proj.weight"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 11,
}


def number(tensor: Tensor) -> float:
    """The number that all elements of a tensor are."""
    (found,) = set(tensor.flatten().tolist())
    return float(found)


def written(path: Path, tensors: Named) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def add(folder: Path, name: str, tensors: Named) -> list[Path]:
    """Weights under a name, in two shards where it is an index; the paths of the shards."""
    if not is_index(name):
        written(folder / name, tensors)
        return []
    stem, _, rest = name.partition(".")
    shards = [folder / f"{stem}-{i}-of-2.{rest.partition('.')[0]}" for i in (1, 2)]
    names = list(tensors)
    parts = [names[::2], names[1::2]]
    for shard, part in zip(shards, parts, strict=True):
        written(shard, {n: tensors[n] for n in part})
    weights = {n: shard.name for shard, part in zip(shards, parts, strict=True) for n in part}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return shards


def model(value: float) -> Named:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    return {name: torch.full_like(tensor, value) for name, tensor in theirs.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import LlamaConfig

    found = tmp_path / "model"
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(found)
    return found


@pytest.mark.parametrize(
    ("read", "others"),
    [
        ("model.safetensors", ["model.safetensors.index.json"]),
        ("model.safetensors", ["pytorch_model.bin.index.json"]),
        ("model.safetensors", ["pytorch_model.bin", "model.fp16.safetensors"]),
        ("model.safetensors.index.json", ["pytorch_model.bin", "consolidated.safetensors"]),
        ("pytorch_model.bin", ["pytorch_model.bin.index.json", "adapter_model.safetensors"]),
        ("pytorch_model.bin", ["model.safetensors.index.fp16.json", "diffusion.safetensors"]),
        ("pytorch_model.bin.index.json", ["a.safetensors", "b.safetensors"]),
        ("mine.safetensors", ["model.safetensors"]),
        ("mine.safetensors.index.json", ["model.safetensors"]),
    ],
)
def test_what_transformers_loads_is_read(
    read: str, others: list[str], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaForCausalLM

    for name in ("optimizer.pt", "training_args.bin"):
        torch.save({"state": torch.zeros(1)}, folder / name)
    for name in others:
        add(folder, name, model(1.0))
    add(folder, read, model(2.0))
    if read.startswith("mine"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": read}))
    theirs: Any = LlamaForCausalLM.from_pretrained(folder)
    assert number(theirs.model.layers[0].mlp.gate_proj.weight) == 2.0
    with caplog.at_level(logging.WARNING, "gatedffn"):
        layer = gf.layouts.load_feed_forward(folder)
    assert number(layer.get_parameter("gate_proj.weight")) == 2.0
    done = convert(folder, tmp_path / "packed", to="phi3", verify=True)
    # Both say what else lies there, and that is no part of the result.
    (note,) = [n for n in done.notes if n.startswith(f"the weights are those of {read}; not read")]
    assert caplog.messages == [f"{folder}: {note}"]
    assert others[0] in note
    assert "optimizer" not in note
    assert not [name for name in others if (tmp_path / "packed" / name).exists()]
    # The way back is what transformers loads again.
    assert convert(tmp_path / "packed", tmp_path / "back", to="llama").notes == ()
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert number(again.model.layers[0].mlp.gate_proj.weight) == 2.0


@pytest.mark.parametrize("read", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_whose_files_are_gone_is_passed_over(read: str, folder: Path) -> None:
    add(folder, read, model(2.0))
    shards = add(folder, "model.safetensors.index.json", model(1.0))
    for shard in shards:
        shard.unlink()
    found = open_checkpoint(folder)
    assert (found.chosen, found.beside) == (read, ("model.safetensors.index.json",))
    (folder / read).unlink()
    with pytest.raises(CheckpointError, match=r"model-1-of-2.safetensors: there is no such file"):
        open_checkpoint(folder)


def test_an_index_some_of_whose_files_are_gone_is_told(folder: Path) -> None:
    add(folder, "pytorch_model.bin", model(1.0))
    add(folder, "model.safetensors.index.json", model(2.0))[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-2-of-2.safetensors: there is no such file"):
        open_checkpoint(folder)


def test_other_weights_are_read_by_their_name(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    add(folder, "model.safetensors", model(1.0))
    add(folder, "model.safetensors.index.fp16.json", model(2.0))
    index = folder / "model.safetensors.index.fp16.json"
    assert gf.layouts.load_feed_forward(index).get_parameter("up_proj.weight").max() == 2
    convert(index, tmp_path / "packed", to="phi3", verify=True)
    assert (tmp_path / "packed" / "config.original.json").exists()
    convert(tmp_path / "packed" / index.name, tmp_path / "back", to="llama", verify=True)
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path / "back", variant="fp16")
    assert number(again.model.layers[0].mlp.gate_proj.weight) == 2.0


def test_names_are_shown_as_a_terminal_can(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "\x1b[2J.safetensors"):
        add(folder, name, model(1.0))
    notes = convert(folder, tmp_path / "packed", to="phi3").notes
    assert "not copied: '\\x1b[2J.safetensors'" in notes
    assert all(note.isprintable() for note in notes)


def test_files_of_which_none_is_known_are_listed(tmp_path: Path) -> None:
    for name in "abcde":
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"5 files of weights, and none.*a\.safetensors, b.* and 2 more$"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("named", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_configuration_that_names_what_transformers_does_not_take(
    named: str, folder: Path
) -> None:
    from transformers import LlamaForCausalLM

    add(folder, named, model(1.0))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with pytest.raises(ValueError, match="neither a safetensors file"):
        LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"= '{named}', .* take the field out"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).chosen == named


@pytest.mark.parametrize("named", ["gone.safetensors", "../model.safetensors", 5, ["a"]])
def test_a_configuration_that_names_what_is_not_there(named: object, folder: Path) -> None:
    add(folder, "model.safetensors", model(1.0))
    (folder / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(CheckpointError, match=r"transformers_weights = .* which is no file"):
        open_checkpoint(folder)


def test_parts_of_tensors_are_refused(folder: Path) -> None:
    add(folder, "model.safetensors", model(1.0))
    add(folder, "shard-00001-model-00001-of-00002.safetensors", model(2.0))
    with pytest.raises(CheckpointError, match="a distributed checkpoint"):
        open_checkpoint(folder)


def twice(folder: Path, counts: str, *held: str) -> tuple[dict[str, str], float]:
    """Weights in a file each but for the gate, which an index has in one of several that hold it.

    The file that it names for each tensor, and the gate that transformers loads.
    """
    from transformers import LlamaForCausalLM

    files = {f"{letter}.safetensors": float(i) for i, letter in enumerate("abc", 1)}
    weights = dict.fromkeys(model(0.0), "a.safetensors") | {GATE: counts}
    weights |= {"lm_head.weight": "b.safetensors", "model.norm.weight": "c.safetensors"}
    for file, value in files.items():
        tensors = model(value).items()
        own = {n: t for n, t in tensors if weights[n] == file or (n == GATE and file in held)}
        written(folder / file, own)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    theirs: Any = LlamaForCausalLM.from_pretrained(folder)
    return weights, number(theirs.model.layers[0].mlp.gate_proj.weight)


@pytest.mark.parametrize(
    ("counts", "held", "loaded"),
    [
        ("b.safetensors", ("a.safetensors",), 2.0),
        ("c.safetensors", ("a.safetensors", "b.safetensors"), 3.0),
    ],
)
def test_of_several_files_with_a_tensor_the_last_counts(
    counts: str, held: tuple[str, ...], loaded: float, folder: Path, tmp_path: Path
) -> None:
    weights, theirs = twice(folder, counts, *held)
    layer = gf.layouts.load_feed_forward(folder)
    assert number(layer.get_parameter("gate_proj.weight")) == theirs == loaded
    done = convert(folder, tmp_path / "packed", to="phi3", verify=True)
    assert f"tensors that are in several files: {len(held)}; the last of them counts" in done.notes
    convert(tmp_path / "packed", tmp_path / "back", to="llama", verify=True)
    result = open_checkpoint(tmp_path / "back")
    assert result.superseded == 0
    for name, store in result.where.items():
        assert number(load_file(store.path)[name]) == " abc".index(weights[name][0])


@pytest.mark.parametrize(
    ("counts", "held", "loaded"),
    [
        ("a.safetensors", ("b.safetensors",), "b.safetensors"),
        ("b.safetensors", ("a.safetensors", "c.safetensors"), "c.safetensors"),
    ],
)
def test_an_index_that_transformers_does_not_follow_is_refused(
    counts: str, held: tuple[str, ...], loaded: str, folder: Path
) -> None:
    assert twice(folder, counts, *held)[1] == " abc".index(loaded[0])
    message = rf"'{GATE}' is in {counts}, .* and in {loaded}, .*: name {loaded} there"
    for path in (folder, folder / "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
