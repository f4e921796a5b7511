"""RMSNorm of q and of k, each over the full width of all heads on all TP ranks together.

Legend: t tokens, b batch (1), n local head slots, d head size.
"""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from mmlm.layers.head_partition import HeadPartition
from mmlm.layers.trimmed_shard import trimmed_factory


class FullWidthQKNorm(MegatronModule):
    """``q / sqrt(mean over all heads of q^2 + eps) * q_weight``, and so for k with k's weight.

    The sum of squares is reduced over the TP ranks by an operation whose backward reduces as well:
    every rank's output depends on every rank's q, so the gradient of the statistic is a sum over
    the ranks. The mean divides by the true width, never by the padded one.

    Args:
        config: its ``layernorm_epsilon``, ``kv_channels`` and ``params_dtype`` are used.
        partition: which heads this rank holds.
        pg_collection: its ``tp`` group is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        partition: HeadPartition,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.partition = partition
        self.tp_group = pg_collection.tp
        self.eps = config.layernorm_epsilon
        self.head_size = config.kv_channels
        self.true_width = partition.num_heads * config.kv_channels
        local_width = partition.slots_per_rank * config.kv_channels
        for name in ("q_weight", "k_weight"):
            weight = torch.nn.Parameter(torch.ones(local_width, dtype=config.params_dtype))
            # sharded by head: the grad norm counts every rank's part
            weight.tensor_model_parallel = True
            weight.partition_dim = 0
            weight.partition_stride = 1
            partition.zero_padding_(weight.data, 0, self.tp_group.rank())
            self.register_parameter(name, weight)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise q and k of this rank's heads.

        Args:
            query: [t, b, n, d].
            key: [t, b, n, d].

        Returns:
            The normalised pair, same shapes and dtypes.
        """
        squares = torch.stack([x.float().square().sum(dim=(-2, -1)) for x in (query, key)])
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        scale = torch.rsqrt(squares / self.true_width + self.eps)[..., None, None]
        return (
            (query.float() * scale[0]).to(query.dtype) * self.q_weight.view(-1, self.head_size),
            (key.float() * scale[1]).to(key.dtype) * self.k_weight.view(-1, self.head_size),
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict:
        """The weights of the true heads, in their place among all heads."""
        whole: dict[str, ShardedTensor] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"q_weight": 0, "k_weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        heads = self.partition.heads(self.tp_group.rank())
        return {
            name: trimmed_factory(
                tensor,
                0,
                length=len(heads) * self.head_size,
                global_offset=heads.start * self.head_size,
                global_length=self.true_width,
            )
            for name, tensor in whole.items()
        }
