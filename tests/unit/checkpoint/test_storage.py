"""Sharded tensors on disk: what several ranks write, any number of ranks reads."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from mmlm.checkpoint.metadata import tensor_infos
from mmlm.checkpoint.storage import (
    load_sharded,
    save_sharded,
)
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.errors import CheckpointError
from tests.distributed.launch import group_of_one, run_ranks

WHOLE = torch.arange(24.0).view(8, 3)


def state(replicated: torch.Tensor | None = None) -> dict[str, Any]:
    """Rows of WHOLE cut over the ranks, a replicated tensor, an object a rank, a plain number."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = WHOLE.chunk(world_size)[rank]
    if replicated is None:
        replicated = torch.arange(5).bfloat16()
    return {
        "rows": ShardedTensor.from_rank_offsets("model.rows", rows, (0, rank, world_size)),
        "same": ShardedTensor.from_rank_offsets("model.same", replicated, replica_id=rank),
        "object": ShardedObject("object", {"rank": rank}, (world_size,), (rank,)),
        "iteration": 7,
    }


def save_on_rank(directory: Path) -> None:
    save_sharded(state(), directory)
    assert multiprocessing.active_children() == []


def load_on_rank(directory: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    wanted = state(torch.zeros(5))
    del wanted["object"]
    wanted["rows"].data = torch.zeros_like(wanted["rows"].data)
    found = load_sharded(wanted, directory)
    return found["rows"], found["same"], found["iteration"]


@pytest.mark.distributed
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path):
    run_ranks(2, save_on_rank, tmp_path / "ckpt")
    for world_size in (1, 2, 4):
        results = run_ranks(world_size, load_on_rank, tmp_path / "ckpt")
        assert torch.equal(torch.cat([rows for rows, _, _ in results]), WHOLE)
        for _, same, iteration in results:
            assert torch.equal(same, torch.arange(5.0))
            assert iteration == 7
    infos = tensor_infos(tmp_path / "ckpt")
    assert infos.keys() == {"model.rows", "model.same"}
    assert infos["model.rows"].shape == (8, 3)
    assert infos["model.same"].dtype == torch.bfloat16
    reader = TensorReader(tmp_path / "ckpt")  # in this process, where there is no group
    assert torch.equal(reader.read("model.rows"), WHOLE)
    assert torch.equal(reader.read("model.same"), torch.arange(5).bfloat16())
    with pytest.raises(CheckpointError, match="there is no tensor 'other'"):
        reader.read("other")


def misfit_on_rank(directory: Path) -> str:
    wanted = state(torch.zeros(6))
    if dist.get_rank() == 1:
        wanted["extra"] = ShardedTensor.from_rank_offsets("model.extra", torch.zeros(2))
    with pytest.raises(CheckpointError) as caught:
        load_sharded(wanted, directory)
    return str(caught.value)


@pytest.mark.distributed
def test_a_misfit_on_one_rank_is_an_error_on_all(tmp_path: Path):
    run_ranks(2, save_on_rank, tmp_path)
    for message in run_ranks(2, misfit_on_rank, tmp_path, timeout_seconds=30):
        assert "does not fit the model, 2 tensors" in message
        assert "missing 'model.extra' [2]" in message
        assert "'model.same' is [5] in the checkpoint and [6] in the model" in message


def unwritable_on_rank(directory: Path) -> str:
    wanted = state()
    if dist.get_rank() == 1:
        directory.mkdir(exist_ok=True)
        (directory / "__1_0.distcp").mkdir()
    with pytest.raises(CheckpointError) as caught:
        save_sharded(wanted, directory)
    return str(caught.value)


@pytest.mark.distributed
def test_a_failed_write_on_one_rank_is_an_error_on_all(tmp_path: Path):
    for message in run_ranks(2, unwritable_on_rank, tmp_path / "ckpt", timeout_seconds=30):
        assert "ckpt: the checkpoint could not be written: rank 1: IsADirectoryError" in message


def test_views_are_saved_without_what_is_around_them(tmp_path: Path):
    big = torch.randn(1000, 1000)
    with group_of_one():
        save_sharded({"a": ShardedTensor.from_rank_offsets("a", big[3:5])}, tmp_path)
    assert (tmp_path / "__0_0.distcp").stat().st_size < 20_000
    assert torch.equal(TensorReader(tmp_path).read("a"), big[3:5])


def test_damage_is_named(tmp_path: Path):
    with group_of_one():
        save_sharded({"a": ShardedTensor.from_rank_offsets("a", torch.ones(50))}, tmp_path)
        file = tmp_path / "__0_0.distcp"
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(
            CheckpointError, match="tensor 'a' could not be read: ValueError: not a"
        ):
            TensorReader(tmp_path).read("a")
        wanted = {"a": ShardedTensor.from_rank_offsets("a", torch.zeros(50))}
        with pytest.raises(CheckpointError, match="the checkpoint could not be read: rank 0"):
            load_sharded(wanted, tmp_path)
        file.unlink()
        with pytest.raises(CheckpointError, match="FileNotFoundError"):
            TensorReader(tmp_path).read("a")
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        tensor_infos(tmp_path)
