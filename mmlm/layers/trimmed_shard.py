"""Checkpoint shards in true shapes: padding that TP needs never reaches a file.

megatron-core describes a parameter in a checkpoint by a ``ShardedTensor`` (a block of a global
tensor). Padded heads and a padded vocabulary make the local parameter longer than its true block;
`trimmed_factory` describes the true block alone. Being a ``ShardedTensorFactory`` it applies to the
optimizer state of the parameter as well, so any TP size can read what any other wrote.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensorFactory,
)


def trimmed_factory(
    whole: ShardedTensor, dim: int, *, length: int, global_offset: int, global_length: int
) -> ShardedTensorFactory:
    """Describe the first ``length`` rows (along ``dim``) of a local parameter as its true block.

    Args:
        whole: megatron-core's description of the padded parameter; key, data and replica are used.
        dim: the padded dimension.
        length: true rows on this rank; 0 where the rank holds padding only.
        global_offset: where they begin in the true global tensor.
        global_length: true rows of the global tensor.

    Returns:
        A factory that writes the block, and on loading returns the padded shape with zeros behind.
    """
    padded_shape = tuple(whole.data.shape)

    def build(
        key: str, data: torch.Tensor, replica_id: Any, flattened_range: None
    ) -> list[ShardedTensor | LocalNonpersistentObject]:
        if length == 0:  # megatron-core forgets an empty list, and then has nothing to merge
            return [LocalNonpersistentObject(None)]
        block = data.narrow(dim, 0, length)
        shape, offset = list(block.shape), [0] * block.dim()
        shape[dim], offset[dim] = global_length, global_offset
        return [
            ShardedTensor(
                key=key,
                data=block,
                dtype=block.dtype,
                local_shape=tuple(block.shape),
                global_shape=tuple(shape),
                global_offset=tuple(offset),
                axis_fragmentations=None,
                replica_id=replica_id,
            )
        ]

    def merge(blocks: list[Any]) -> torch.Tensor:
        (block,) = blocks
        if block is None:
            return torch.zeros(padded_shape, dtype=whole.dtype)
        padded = torch.zeros(padded_shape, dtype=block.dtype, device=block.device)
        padded.narrow(dim, 0, length).copy_(block)
        return padded

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)
