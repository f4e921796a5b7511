"""Checkpoints that one process writes row by row are those that megatron-core would write."""

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from mmlm.checkpoint import row_stream
from mmlm.checkpoint.metadata import TensorInfo, read_metadata, tensor_infos
from mmlm.checkpoint.storage import save_sharded
from mmlm.checkpoint.streamed import TENSOR_FILE, write_streamed
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.errors import CheckpointError
from tests.distributed.launch import group_of_one

TENSORS = {"a": torch.randn(5, 5), "b": torch.randn(3).bfloat16(), "c": torch.ones(1, 3, 9)}
INFOS = {key: TensorInfo(shape=tuple(t.shape), dtype=t.dtype) for key, t in TENSORS.items()}


def rows_of(key: str, start: int, stop: int) -> torch.Tensor:
    return TENSORS[key][start:stop]


def test_rows_are_fetched_when_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_stream, "BLOCK_BYTES", 40)
    fetched: list[tuple[str, int, int]] = []

    def source(key: str, start: int, stop: int) -> torch.Tensor:
        fetched.append((key, start, stop))
        return rows_of(key, start, stop)

    write_streamed(tmp_path, INFOS, source)
    assert fetched == [("a", 0, 2), ("a", 2, 4), ("a", 4, 5), ("b", 0, 3), ("c", 0, 1)]
    reader = TensorReader(tmp_path)
    with group_of_one():
        plain = dist_checkpointing.load_plain_tensors(str(tmp_path))  # megatron-core's own reading
    for key, tensor in TENSORS.items():
        for found in (plain[key], reader.read(key)):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_the_files_are_those_of_megatron_core(tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write_streamed(ours, INFOS, rows_of)
    with group_of_one():
        whole = {key: ShardedTensor.from_rank_offsets(key, t) for key, t in TENSORS.items()}
        save_sharded(whole, theirs)
    names = {file.name for file in theirs.iterdir()}
    assert {file.name for file in ours.iterdir()} == names
    assert (ours / TENSOR_FILE).stat().st_size == (theirs / TENSOR_FILE).stat().st_size
    for name in names - {".metadata", TENSOR_FILE}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    found, expected = (
        dataclasses.replace(read_metadata(folder), storage_meta=None) for folder in (ours, theirs)
    )
    assert found == expected
    assert repr(found) == repr(expected)  # with what == of torch's classes leaves out


def test_an_error_of_the_source_leaves_no_complete_checkpoint(tmp_path: Path):
    def source(key: str, start: int, stop: int) -> torch.Tensor:
        raise CheckpointError(f"FILE: {key} cannot be read")

    with pytest.raises(CheckpointError, match=r"^FILE: a cannot be read$"):
        write_streamed(tmp_path, INFOS, source)
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint, metadata\.json is miss"):
        tensor_infos(tmp_path)


def test_what_a_killed_run_has_left_is_kept_and_completed(tmp_path: Path):
    write_streamed(tmp_path, INFOS, rows_of)
    file = tmp_path / TENSOR_FILE
    complete = file.read_bytes()
    for length in (0, 100, len(complete) // 2, len(complete) + 50):
        file.write_bytes((complete + bytes(50))[:length])
        write_streamed(tmp_path, INFOS, rows_of)
        assert file.read_bytes() == complete
