"""Every way the files may lie, and every way they may be damaged."""

import json
import pickle
from pathlib import Path
from typing import Literal

import pytest
import torch

from mmlm.conversion.hf_reader import HFReader
from mmlm.errors import CheckpointError
from tests.tiny_weights import write_model_files

FileFormat = Literal["safetensors", "bin"]
TENSORS = {
    "a": torch.randn(5, 3),
    "b": torch.randn(4).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "d": torch.randn(7),
}


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 4])
def test_reads_every_tensor(tmp_path: Path, file_format: FileFormat, shards: int):
    write_model_files(tmp_path, TENSORS, file_format, shards)
    reader = HFReader(tmp_path)
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name in (*TENSORS, *reversed(TENSORS)):  # files are closed and opened again
        assert reader.dtype(name) == TENSORS[name].dtype
        assert torch.equal(reader.read(name), TENSORS[name])
        assert reader.files[name].parent == tmp_path


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_reads_blocks(tmp_path: Path, file_format: FileFormat):
    write_model_files(tmp_path, TENSORS, file_format, 2)
    reader = HFReader(tmp_path)
    for name, place in (
        ("a", (slice(1, 4), slice(2, 3))),
        ("c", (slice(0, 2), slice(1, 2), slice(0, 1))),
        ("d", (slice(0, 7),)),
    ):
        assert torch.equal(reader.read_block(name, place), TENSORS[name][place])


def test_reads_single_files_shards_without_index_and_the_old_pickle(tmp_path: Path):
    for name, zipped in (("new.pth", True), ("old.pth", False)):
        torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert torch.equal(HFReader(tmp_path / name).read("a"), TENSORS["a"])
    write_model_files(tmp_path, TENSORS, "safetensors", 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(HFReader(tmp_path).shapes) == set(TENSORS)


def test_tensors_that_are_not_contiguous_come_out_contiguous(tmp_path: Path):
    torch.save({"a": TENSORS["a"].T}, tmp_path / "x.pth")
    assert HFReader(tmp_path / "x.pth").read("a").is_contiguous()


def test_missing_places_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such file or folder"):
        HFReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no weights: neither \*\.safetensors nor pytorch"):
        HFReader(tmp_path)
    write_model_files(tmp_path, TENSORS, "safetensors", 1)
    with pytest.raises(CheckpointError, match="there is no tensor 'e'"):
        HFReader(tmp_path).read("e")


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_missing_shard_is_named(tmp_path: Path, file_format: FileFormat):
    files = write_model_files(tmp_path, TENSORS, file_format, 4)
    files[2].unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: names {files[2].name}, which is mis"):
        HFReader(tmp_path)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_truncated_file_is_named(tmp_path: Path, file_format: FileFormat):
    (file,) = write_model_files(tmp_path, TENSORS, file_format, 1)
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match=rf"{file.name}: the file cannot be read"):
        HFReader(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{file.name}: the file cannot be read"):
        HFReader(tmp_path)


def test_a_damaged_index_is_named(tmp_path: Path):
    files = write_model_files(tmp_path, TENSORS, "safetensors", 2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for content in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(CheckpointError, match="not an index with a weight_map"):
            HFReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "a": "../model.bin"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./model\.bin' is not the name of a file"):
        HFReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "e": files[0].name}}))
    with pytest.raises(CheckpointError, match=f"not where it says: 'e' in {files[0].name}"):
        HFReader(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path: Path):
    for part in ("1", "2"):
        (folder := tmp_path / part).mkdir()
        (file,) = write_model_files(folder, TENSORS, "safetensors", 1)
        file.rename(tmp_path / f"model-{part}.safetensors")
    with pytest.raises(CheckpointError, match=r"twice: 'a' in model-1.safetensors and model-2"):
        HFReader(tmp_path)


class Code:
    """Pickles as a call of print."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this must not run",)


def test_code_in_a_pickle_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.save({"a": Code()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: .* code, which is never run \(.*print\)"):
        HFReader(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(CheckpointError, match=r"y\.pth"):
        HFReader(tmp_path / "y.pth")
    assert capsys.readouterr().out == ""
    (tmp_path / "z.pth").write_bytes(b"\x80\x02no pickle")
    with pytest.raises(CheckpointError, match=r"z\.pth: .* damaged, or no file of torch\.save \("):
        HFReader(tmp_path / "z.pth")


def test_a_pickle_of_something_else_is_refused(tmp_path: Path):
    torch.save({"state_dict": TENSORS}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds something else than a dict of named tensors"):
        HFReader(tmp_path / "x.pth")
