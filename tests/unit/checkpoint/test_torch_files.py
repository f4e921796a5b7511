"""Places are where torch has put the elements, and frames are what torch reads."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from mmlm.checkpoint import torch_files
from mmlm.checkpoint.places import read_whole
from mmlm.checkpoint.torch_files import (
    PlaceFinder,
    frame_of,
    is_zip,
    named_places,
    refuse_other_content,
)

BIG = torch.randn(6, 8)
TENSORS = {
    "turned": BIG.T,
    "view": BIG[2:4, 1:5],
    "same": BIG,
    "narrow": torch.randn(5).bfloat16(),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "scalar": torch.tensor(2.5).half(),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(params=["meta", "fake"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of loading without elements; an older torch has the second alone."""
    if request.param == "fake":
        monkeypatch.setattr(torch_files, "_META_READS_NOTHING", False)
    elif not torch_files._META_READS_NOTHING:
        pytest.skip("this torch reads elements for the device meta")


def test_every_tensor_of_a_dict_is_found(tmp_path: Path):
    file = tmp_path / "x.bin"
    torch.save(TENSORS, file)
    assert is_zip(file)
    places = named_places(file)
    assert places.keys() == TENSORS.keys()
    with open(file, "rb") as stream:
        for name, place in places.items():
            found = read_whole(stream.fileno(), place)
            assert found.dtype == TENSORS[name].dtype
            assert torch.equal(found, TENSORS[name]), name


def test_old_files_are_known(tmp_path: Path):
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert not is_zip(tmp_path / "old.bin")


@pytest.mark.parametrize("content", [[1], {"a": 1}, {1: torch.ones(2)}])
def test_other_content_is_refused(content: object):
    with pytest.raises(ValueError, match="something else than a dict of named tensors"):
        refuse_other_content(content)


@pytest.mark.parametrize("name", ["turned", "view", "same", "narrow", "empty"])
def test_an_archive_inside_a_file_is_found(tmp_path: Path, name: str):
    archive = io.BytesIO()
    torch.save(TENSORS[name], archive)
    file = tmp_path / "many"
    file.write_bytes(b"before" + archive.getvalue() + b"after")
    finder = PlaceFinder()
    with open(file, "rb") as stream:
        for _ in range(2):  # read from the file, then known
            place = finder.find(stream, 6, len(archive.getvalue()))
            assert torch.equal(read_whole(stream.fileno(), place), TENSORS[name])
        with pytest.raises(ValueError, match=r"not a tensor of torch\.save"):
            finder.find(stream, 6, len(archive.getvalue()) - 30)


def test_an_archive_with_too_few_elements_is_refused(tmp_path: Path):
    torch.save(torch.ones(40), tmp_path / "whole")
    with (
        zipfile.ZipFile(tmp_path / "whole") as whole,
        zipfile.ZipFile(tmp_path / "less", "w") as less,
    ):
        for name in whole.namelist():
            record = whole.read(name)
            less.writestr(name, record[:80] if name.endswith("data/0") else record)
    with open(tmp_path / "less", "rb") as stream, pytest.raises(ValueError, match="80 bytes for"):
        PlaceFinder().find(stream, 0, (tmp_path / "less").stat().st_size)


@pytest.mark.parametrize("shape", [(500, 30), (7,), (1, 3, 5), (0, 4)])
def test_a_filled_frame_is_what_torch_reads(tmp_path: Path, shape: tuple[int, ...]):
    wanted = torch.randn(shape).bfloat16()
    frame = frame_of(torch.empty(shape, dtype=torch.bfloat16))
    file = tmp_path / "x"
    with open(file, "w+b") as stream:
        for at, piece in frame.pieces:
            os.pwrite(stream.fileno(), piece, at)
        raw = wanted.view(-1).view(torch.uint8).numpy() if wanted.numel() else b""
        os.pwrite(stream.fileno(), raw, frame.offsets[0])
    assert file.stat().st_size == frame.num_bytes
    assert torch.equal(torch.load(file, weights_only=True), wanted)
    with open(file, "rb") as stream:
        place = PlaceFinder().find(stream, 0, frame.num_bytes)
        assert torch.equal(read_whole(stream.fileno(), place), wanted)


def test_a_frame_of_a_dict_has_a_place_for_each(tmp_path: Path):
    wanted = {"0.weight": torch.randn(3, 4), "none": torch.zeros(0), "b": torch.randn(9).half()}
    frame = frame_of({name: torch.empty_like(tensor) for name, tensor in wanted.items()})
    file = tmp_path / "x"
    with open(file, "w+b") as stream:
        for at, piece in frame.pieces:
            os.pwrite(stream.fileno(), piece, at)
        for tensor, offset in zip(wanted.values(), frame.offsets, strict=True):
            os.pwrite(stream.fileno(), tensor.numpy().tobytes(), offset)
    found = torch.load(file, weights_only=True)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
