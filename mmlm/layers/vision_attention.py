"""Self-attention of an InternViT layer under TP: padded heads and a full-width q/k norm."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmlm.layers.head_partition import HeadPartition
from mmlm.layers.qk_norm import FullWidthQKNorm
from mmlm.layers.trimmed_shard import trimmed_factory


class PaddedHeadsSelfAttention(SelfAttention):
    """megatron-core's ``SelfAttention`` for a number of heads that TP does not divide.

    Args:
        config: ``num_attention_heads`` and ``num_query_groups`` are the padded slots of all ranks
            (`HeadPartition.num_slots`); ``kv_channels`` and ``hidden_size`` are the true ones.
        submodules: ``linear_qkv``, ``core_attention``, ``linear_proj``; no q/k layernorm.
        layer_number: 1-based number in the whole model.
        attn_mask_type: ``no_mask`` for a vision tower.
        cp_comm_type: part of megatron-core's interface.
        pg_collection: its ``tp`` group is used.
        num_heads: true heads; `FullWidthQKNorm` normalises over exactly these.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        num_heads: int,
    ) -> None:
        super().__init__(
            config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection
        )
        self.partition = HeadPartition(num_heads=num_heads, tp_size=self.tp_group.size())
        assert config.num_attention_heads == self.partition.num_slots
        self.qk_norm = FullWidthQKNorm(config, self.partition, self.pg_collection)
        self.zero_padding_()

    def zero_padding_(self) -> None:
        """Zero the rows and columns of the padding heads, once, after the weights are set."""
        tp_rank = self.tp_group.rank()
        self.partition.zero_padding_(self.linear_qkv.weight.data, 0, tp_rank)
        self.partition.zero_padding_(self.linear_proj.weight.data, 1, tp_rank)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (both normalised) and v, each [t, 1, local heads, d]."""
        query, key, value = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate, split_qkv
        )
        query, key = self.qk_norm(query, key)
        return query, key, value

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict:
        """The parameters of the true heads in their true shapes."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        heads = self.partition.heads(self.tp_group.rank())
        size = self.hidden_size_per_attention_head
        for name, dim, block in (
            ("linear_qkv.weight", 0, 3 * size),
            ("linear_proj.weight", 1, size),
        ):
            state[prefix + name] = trimmed_factory(
                state[prefix + name],
                dim,
                length=len(heads) * block,
                global_offset=heads.start * block,
                global_length=self.partition.num_heads * block,
            )
        return state

    @torch.no_grad()
    def padding_is_zero(self) -> bool:
        """Whether every parameter of the padding heads is bitwise zero, as it must stay."""
        real = len(self.partition.heads(self.tp_group.rank()))
        size = self.hidden_size_per_attention_head
        padding = (
            self.linear_qkv.weight[real * 3 * size :],
            self.linear_proj.weight[:, real * size :],
            self.qk_norm.q_weight[real * size :],
            self.qk_norm.k_weight[real * size :],
        )
        return not any(part.count_nonzero() for part in padding)
