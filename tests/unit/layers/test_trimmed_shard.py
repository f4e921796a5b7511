"""A padded parameter is described by its true block, and read back by any other TP size."""

import dataclasses

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import apply_factories, apply_factory_merges

from mmlm.layers.head_partition import HeadPartition
from mmlm.layers.trimmed_shard import trimmed_factory

BLOCK = 3  # rows of a head


def describe(local: torch.Tensor, dim: int, partition: HeadPartition, rank: int) -> dict:
    """The state of one rank, as a layer would describe it."""
    whole = ShardedTensor.from_rank_offsets("weight", local, (dim, rank, partition.tp_size))
    heads = partition.heads(rank)
    factory = trimmed_factory(
        whole,
        dim,
        length=len(heads) * BLOCK,
        global_offset=heads.start * BLOCK,
        global_length=partition.num_heads * BLOCK,
    )
    return {"weight": factory}


def blocks(state: dict) -> list[ShardedTensor]:
    """What megatron-core writes for a state."""
    state = dict(state)
    apply_factories(state)
    return [block for block in state["weight"] if isinstance(block, ShardedTensor)]


def shard(whole: torch.Tensor, dim: int, partition: HeadPartition, rank: int) -> torch.Tensor:
    """The padded local parameter of a rank, by hand."""
    shape = list(whole.shape)
    shape[dim] = partition.slots_per_rank * BLOCK
    local = torch.zeros(shape)
    heads = partition.heads(rank)
    real = len(heads) * BLOCK
    local.narrow(dim, 0, real).copy_(whole.narrow(dim, heads.start * BLOCK, real))
    return local


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("written_by", "read_by"), [(4, 2), (2, 8), (8, 1), (1, 4)])
def test_one_tp_size_reads_what_another_wrote(dim: int, written_by: int, read_by: int) -> None:
    """5 heads: TP 4 holds 2, 1, 1, 1 in two slots; TP 8 leaves three ranks without any."""
    true = torch.arange(5.0 * BLOCK * 4).reshape((5 * BLOCK, 4) if dim == 0 else (4, 5 * BLOCK))
    on_disk = torch.full(true.shape, float("nan"))
    writers = HeadPartition(num_heads=5, tp_size=written_by)
    for rank in range(written_by):
        local = shard(true, dim, writers, rank)
        for block in blocks(describe(local, dim, writers, rank)):
            assert block.global_shape == true.shape and block.key == "weight"
            assert on_disk[block.global_slice()].isnan().all(), "written twice"
            on_disk[block.global_slice()] = block.data
    assert torch.equal(on_disk, true)

    readers = HeadPartition(num_heads=5, tp_size=read_by)
    for rank in range(read_by):
        expected = shard(true, dim, readers, rank)
        state = describe(torch.full_like(expected, 7.0), dim, readers, rank)
        # of a rank without true heads, megatron-core keeps the None that stands for its block
        loaded = {"weight": [on_disk[block.global_slice()] for block in blocks(state)] or [None]}
        assert torch.equal(apply_factory_merges(loaded, state)["weight"], expected)


def test_optimizer_state_is_trimmed_like_its_parameter() -> None:
    """megatron-core describes Adam's moments with the parameter's factory and other data."""
    partition = HeadPartition(num_heads=5, tp_size=4)
    state = describe(torch.zeros(2 * BLOCK, 4, dtype=torch.bfloat16), 0, partition, 1)
    moment = torch.arange(8.0 * BLOCK).reshape(2 * BLOCK, 4)
    state["weight"] = dataclasses.replace(state["weight"], key="exp_avg", data=moment)
    (block,) = blocks(state)
    assert block.key == "exp_avg" and block.dtype == torch.float32
    assert torch.equal(block.data, moment[:BLOCK])
    assert block.global_offset == (2 * BLOCK, 0) and block.global_shape == (5 * BLOCK, 4)


def test_writing_and_filling_go_through_the_parameter_itself() -> None:
    """Nothing is copied: a loader that fills blocks in place fills the parameter."""
    partition = HeadPartition(num_heads=5, tp_size=4)
    local = torch.zeros(2 * BLOCK, 4)
    (block,) = blocks(describe(local, 0, partition, 0))
    block.data.fill_(1.0)
    assert local.min() == 1.0
