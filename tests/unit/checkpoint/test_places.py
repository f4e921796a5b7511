"""Rows are read from where they lie, however the tensor lies there."""

import os
from pathlib import Path

import pytest
import torch

from mmlm.checkpoint.places import Place, contiguous_stride, read_rows, read_whole

WHOLE = torch.arange(60.0).view(5, 3, 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """WHOLE after seven other bytes."""
    place = tmp_path / "file"
    place.write_bytes(b"seven.." + WHOLE.numpy().tobytes())
    return place


def read(file: Path, place: Place, start: int, stop: int) -> torch.Tensor:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return read_rows(descriptor, place, start, stop)
    finally:
        os.close(descriptor)


def test_what_is_read_once_need_not_be_kept(file: Path, monkeypatch: pytest.MonkeyPatch):
    given_back: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda descriptor, *advice: given_back.append(tuple(advice))
    )
    place = Place(offset=7, shape=(5, 3, 4), stride=(12, 4, 1), dtype=torch.float32)
    with open(file, "rb") as stream:
        assert torch.equal(read_rows(stream.fileno(), place, 1, 3), WHOLE[1:3])
        assert given_back == []
        assert torch.equal(read_rows(stream.fileno(), place, 1, 3, once=True), WHOLE[1:3])
        read_rows(stream.fileno(), place, 2, 2, once=True)  # a length of 0 would be the whole file
    assert given_back == [(7 + 48, 96, os.POSIX_FADV_DONTNEED)]


def test_rows_of_a_contiguous_tensor(file: Path):
    place = Place(offset=7, shape=(5, 3, 4), stride=(12, 4, 1), dtype=torch.float32)
    assert place.is_contiguous
    assert place.extent_bytes == 240
    for start, stop in ((0, 5), (1, 3), (4, 5), (2, 2)):
        assert torch.equal(read(file, place, start, stop), WHOLE[start:stop])
    short = Place(offset=7 + 48, shape=(5, 3, 4), stride=(12, 4, 1), dtype=torch.float32)
    assert torch.equal(read(file, short, 0, 4), WHOLE[1:])
    with pytest.raises(EOFError, match="the file ends 48 bytes early"):
        read(file, short, 0, 5)


def test_rows_of_a_tensor_that_lies_otherwise(file: Path):
    turned = WHOLE.permute(2, 0, 1)[:, 1:]
    place = Place(
        offset=7 + 4 * turned.storage_offset(),
        shape=tuple(turned.shape),
        stride=turned.stride(),
        dtype=torch.float32,
    )
    assert not place.is_contiguous
    assert place.extent_bytes == 192
    found = read(file, place, 1, 3)
    assert torch.equal(found, turned[1:3])
    assert found.is_contiguous()


def test_tensors_without_rows_or_dimensions(file: Path):
    scalar = Place(offset=7 + 4, shape=(), stride=(), dtype=torch.float32)
    empty = Place(offset=7, shape=(0, 3), stride=(3, 1), dtype=torch.float32)
    with open(file, "rb") as stream:
        assert read_whole(stream.fileno(), scalar).item() == 1.0
        assert read_whole(stream.fileno(), empty).shape == (0, 3)
    assert contiguous_stride(()) == ()
    assert contiguous_stride((2, 3, 4)) == (12, 4, 1)
