"""The gradients of an iteration as whole tensors under global names, whatever the layout."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from mmlm.models.model_provider import model_state
from mmlm.parallel.collect import bring_to_rank_zero
from mmlm.parallel.topology import Topology


def gather_gradients(
    model: Sequence[DistributedDataParallel], topology: Topology
) -> dict[str, Tensor]:
    """Assemble every trainable parameter's gradient on rank 0; collective.

    Call after the schedule has finalized the gradients and before the optimizer step.

    Args:
        model: the wrapped chunks.
        topology: this rank's place.

    Returns:
        On rank 0 global name -> fp32 tensor in its true shape; empty on the others.
    """
    return gather_tensors(gradient_shards(model, topology), topology.control_group)


def gradient_shards(
    model: Sequence[DistributedDataParallel], topology: Topology
) -> list[ShardedTensor]:
    """This rank's blocks of the final gradients; collective. See `gather_gradients`.

    Returns:
        Blocks of fp32 tensors under global names; together the ranks hold every element once.
    """
    for chunk in model:
        _gather_shards(chunk)
    state = model_state([chunk.module for chunk in model], topology.groups, prefix="")
    described = {
        name: replace(entry, data=entry.data.main_grad)
        if not isinstance(entry, ShardedTensor)
        else replace(entry, data=entry.data.main_grad, dtype=entry.data.main_grad.dtype)
        for name, entry in state.items()
        if entry.data.requires_grad
    }
    apply_factories(described)
    return [
        shard
        for shard in nested_values(described)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    ]


def gather_tensors(
    shards: Sequence[ShardedTensor], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Assemble blocks of global tensors on rank 0; collective.

    Args:
        shards: this rank's blocks; together the ranks hold every element once.
        group: all ranks, over gloo; the default group when None.

    Returns:
        On rank 0 key -> whole tensor on the CPU; empty on the others.
    """
    blocks = [
        ((shard.key, shard.global_shape, shard.global_slice()), shard.data) for shard in shards
    ]
    whole: dict[str, Tensor] = {}
    for (key, shape, place), block in bring_to_rank_zero(blocks, group):
        if key not in whole:
            whole[key] = torch.full(shape, float("nan"), dtype=block.dtype)
        whole[key][place] = block
    return whole


def _gather_shards(chunk: DistributedDataParallel) -> None:
    """Undo the reduce-scatter: every DP rank gets the whole summed gradient buffer."""
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
