"""The reader of safetensors: what the format's own library writes, and what nobody should."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatedffn.errors import CheckpointError
from gatedffn.interop.checkpoints.opening import open_checkpoint
from gatedffn.interop.checkpoints.safetensors import DTYPES, LARGEST_HEADER, read_header, write_file

DTYPES_OF_TORCH = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def sample() -> dict[str, Tensor]:
    """A tensor of each dtype, odd shapes, none at all, one number, and a name that is no path."""
    found = {str(d): torch.arange(15).view(3, 5).to(d) for d in DTYPES_OF_TORCH}
    found["empty"] = torch.zeros(0, 4)
    found["one"] = torch.tensor(2.5)
    found["../é/"] = torch.ones(2)
    return found


def rewritten(source: Path, target: Path) -> None:
    checkpoint = open_checkpoint(source)
    entries = [
        (name, store.entries[name].dtype, store.entries[name].shape, checkpoint.parts(name))
        for name, store in checkpoint.where.items()
    ]
    write_file(target, entries, checkpoint.stores[0].metadata)


def test_a_file_is_written_as_the_format_s_own_library_writes_it(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(sample(), source, metadata={"format": "pt"})
    rewritten(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_the_format_s_own_library_reads_what_is_written(tmp_path: Path) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.safetensors"
    tensors = sample()
    tensors["turned"] = torch.arange(6.0).view(2, 3).T
    torch.save(tensors, source)
    rewritten(source, target)
    found = load_file(target)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].flatten().tolist() == tensor.flatten().tolist()


def test_our_dtypes_are_the_library_s(tmp_path: Path) -> None:
    import safetensors

    for dtype, bits in DTYPES.items():
        text = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}})
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"\0" * bits)
        assert read_header(path).entries["x"].size == bits
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.keys() == ["x"]


def entry(
    begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def file_of(header: object, size: int, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + bytes(size)


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HOSTILE = {
    "nothing": (b"", "it has 0 bytes"),
    "short": (b"\1\0\0", "it has 3 bytes"),
    "huge-length": (file_of({}, 0, length=2**64 - 1), "its header would be 18446744073709551615"),
    "long-length": (file_of({}, 0, length=3), "its header would be 3 bytes, of 2 that follow"),
    "no-json": (file_of(b"{]", 0), "no JSON"),
    "no-utf8": (file_of(b'{"\xff":1}', 0), "no JSON"),
    "deep": (file_of(DEEP, 0), "no JSON"),
    "a-list": (file_of([], 0), "no JSON object"),
    "nan": (file_of(b'{"a": NaN}', 0), "NaN"),
    "long-number": (file_of(b'{"a": ' + b"9" * 5000 + b"}", 0), "no JSON"),
    "twice": (file_of(b'{"a": 1, "a": 2}', 0), "'a' twice"),
    "twice-inside": (file_of(b'{"a": {"dtype": "U8", "dtype": "I8"}}', 0), "'dtype' twice"),
    "control": (file_of({"a\x1b[2J": entry(0, 1)}, 1), r"a name that is none: 'a\x1b[2J'"),
    "long-name": (file_of({"a" * 5000: entry(0, 1)}, 1), "a name that is none"),
    "metadata": (file_of({"__metadata__": {"a": 1}}, 0), "__metadata__ must be texts"),
    "no-entry": (file_of({"a": 1}, 0), "must have dtype, shape and data_offsets"),
    "more-in-it": (file_of({"a": {**entry(0, 1), "x": 1}}, 1), "and no more"),
    "dtype": (file_of({"a": entry(0, 1, "F7")}, 1), "has dtype 'F7'"),
    "dtype-kind": (file_of({"a": entry(0, 1, 3)}, 1), "has dtype '3'"),  # type: ignore[arg-type]
    "negative-shape": (file_of({"a": entry(0, 1, shape=[-1])}, 1), "no list of whole numbers"),
    "true-shape": (file_of({"a": entry(0, 1, shape=[True])}, 1), "no list of whole numbers"),
    "float-shape": (file_of({"a": entry(0, 1, shape=[1.0])}, 1), "no list of whole numbers"),
    "many-axes": (file_of({"a": entry(0, 1, shape=[1] * 99)}, 1), "no list of whole numbers"),
    "overflow": (file_of({"a": entry(0, 0, shape=[2**62, 4])}, 0), "its offsets span 0 bytes"),
    "offsets": (file_of({"a": {**entry(0, 1), "data_offsets": [0]}}, 1), "not two whole numbers"),
    "backwards": (file_of({"a": entry(1, 0, shape=[1])}, 1), "ends before it begins"),
    "size": (file_of({"a": entry(0, 4, "F32", [2])}, 4), "its offsets span 4 bytes"),
    "bits": (file_of({"a": entry(0, 1, "F4", [1])}, 1), "its offsets span 1 bytes"),
    "misaligned": (
        file_of({"a": entry(0, 1), "b": entry(1, 5, "F32", [1])}, 5),
        "begins at byte 1, which is no multiple",
    ),
    "outside": (file_of({"a": entry(0, 9)}, 8), "ends at byte 9, and the file has 8"),
    "overlap": (file_of({"a": entry(0, 4), "b": entry(2, 6)}, 6), "'b' overlaps 'a'"),
    "same": (file_of({"a": entry(0, 4), "b": entry(0, 4)}, 4), "'b' overlaps 'a'"),
    "gap": (file_of({"a": entry(0, 2), "b": entry(4, 6)}, 6), "a gap of 2 bytes before 'b'"),
    "rest": (file_of({"a": entry(0, 2)}, 6), "4 bytes at its end belong to no tensor"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_header_gets_one_clear_error(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 500


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(LARGEST_HEADER + 100)  # sparse: it takes no room
    with pytest.raises(CheckpointError, match="that are allowed"):
        read_header(path)


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="became shorter"):
        list(checkpoint.parts("x"))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(checkpoint.parts("x"))


# PyTorch files


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "does not load with weights_only=True"),
        ({"x": Evil()}, "does not load with weights_only=True"),
        ([torch.zeros(1)], "holds a list"),
        ({}, "not a state dict"),
        ({"model": {"x": torch.zeros(1)}}, "holds 'model' of type dict"),
        ({"x": torch.zeros(2).to_sparse()}, "torch.sparse_coo"),
        ({3: torch.zeros(1)}, "holds 3 of type Tensor"),
        ({"a\n": torch.zeros(1)}, "a name that is none"),
        ({"x": torch.zeros(1, device="meta")}, "on meta: it has no values"),
        ({"x": torch.zeros(1).expand(10**13)}, "more than is stored"),
    ],
)
def test_a_pytorch_file_holds_tensors_alone(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_pytorch_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r"no file of torch.save"):
        open_checkpoint(path)
    torch.save({"x": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1.6") as caught:
        open_checkpoint(path)
    assert "does not load" not in str(caught.value)


def test_a_damaged_pytorch_file_gets_one_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"x": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for pickled in (b"", b"0.", b"\x80\x02e.", b"\x80\x02)R.", b"\x80\x02h\xff."):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else content)
        with pytest.raises(CheckpointError, match="does not load with weights_only=True"):
            open_checkpoint(path)


def test_views_of_a_pytorch_file_are_stored_by_value(tmp_path: Path) -> None:
    whole = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (whole.conj(), whole.conj().imag):
        torch.save({"x": tensor}, tmp_path / "model.pt")
        parts = list(open_checkpoint(tmp_path / "model.pt").parts("x"))
        assert torch.equal(torch.cat(parts).view(tensor.dtype), tensor)


# Folders


def folder_with(tmp_path: Path, weight_map: object) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "a.safetensors")
    save_file({"secret": torch.zeros(1)}, tmp_path / "outside.safetensors")
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"secret": "../outside.safetensors"}, "no plain file name"),
        ({"secret": "/etc/passwd"}, "no plain file name"),
        ({"secret": "..\\outside.safetensors"}, "no plain file name"),
        ({"secret": ".."}, "no plain file name"),
        ({"secret": ""}, "no plain file name"),
        ({"secret": "C:outside.safetensors"}, "no plain file name"),
        ({"secret": "a\0.safetensors"}, "no plain file name"),
        ({"secret": "a\x1b[31m.safetensors"}, "no plain file name"),
        ({"x": "missing.safetensors"}, "there is no such file"),
        ({"x": "config.json"}, "there is no such file"),
        ({"y": "a.safetensors"}, "says that a.safetensors has 'y': it has not"),
        ({}, "weight_map of file names"),
        ({"x": 3}, "weight_map of file names"),
        ([], "weight_map of file names"),
    ],
)
def test_an_index_names_files_of_its_folder(
    weight_map: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder_with(tmp_path, weight_map))
    assert "\n" not in str(caught.value)


def test_an_index_leaves_no_tensor_out(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"x": "a.safetensors"})
    save_file({"x": torch.zeros(1), "y": torch.zeros(1)}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"has 'y', of which .* says nothing"):
        open_checkpoint(folder)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"secret": "b.safetensors"})
    (folder / "b.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        open_checkpoint(folder)
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to("b.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(folder)
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is no file"):
        open_checkpoint(folder)


def test_the_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, blobs / "0123")
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_checkpoint(folder).shapes == {"x": (1,)}


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="is no file"):
        open_checkpoint(tmp_path / "pipe.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"ends with .gguf: known are .safetensors"):
        open_checkpoint(tmp_path / "model.gguf")
    for name in ("a", "b"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 files of weights, and none is called"):
        open_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="no JSON"):
            open_checkpoint(tmp_path)
