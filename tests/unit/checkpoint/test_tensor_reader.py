"""Rows of tensors that several ranks have written, and pieces that do not add up."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from mmlm.checkpoint.storage import save_sharded
from mmlm.checkpoint.tensor_reader import TensorReader
from mmlm.errors import CheckpointError
from tests.distributed.launch import group_of_one, run_ranks

WHOLE = torch.arange(96.0).view(8, 4, 3)


def save_pieces(directory: Path) -> None:
    """WHOLE cut into two by two pieces, rows first."""
    row, column = divmod(dist.get_rank(), 2)
    piece = WHOLE.chunk(2)[row].chunk(2, dim=1)[column].contiguous()
    state = {
        "a": ShardedTensor.from_rank_offsets("a", piece, (0, row, 2), (1, column, 2)),
        "b": ShardedTensor.from_rank_offsets("b", torch.tensor(2.5), replica_id=dist.get_rank()),
    }
    save_sharded(state, directory)


@pytest.mark.distributed
def test_any_rows_of_pieces(tmp_path: Path):
    run_ranks(4, save_pieces, tmp_path)
    reader = TensorReader(tmp_path)
    assert torch.equal(reader.read("a"), WHOLE)
    assert reader.read("b").item() == 2.5
    for start in range(8):
        for stop in range(start, 9):
            assert torch.equal(reader.read_rows("a", start, stop), WHOLE[start:stop])
    with pytest.raises(CheckpointError, match="there is no tensor 'c'"):
        reader.read_rows("c", 0, 1)


def test_pieces_that_do_not_add_up_are_refused(tmp_path: Path):
    with group_of_one():
        save_sharded({"a": ShardedTensor.from_rank_offsets("a", WHOLE)}, tmp_path)
    reader = TensorReader(tmp_path)
    assert torch.equal(reader.read_rows("a", 2, 5), WHOLE[2:5])
    (piece,) = reader._pieces["a"]
    reader._pieces["a"] = []
    with pytest.raises(CheckpointError, match=r"tensor 'a' could not be read: .*96 elements are n"):
        reader.read("a")
    reader = TensorReader(tmp_path)
    object.__setattr__(piece, "sizes", (8, 4, 2))
    reader._pieces["a"] = [piece]
    with pytest.raises(CheckpointError, match=r"holds \(\(8, 4, 3\), torch.float32\), the metad"):
        reader.read("a")
