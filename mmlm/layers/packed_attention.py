"""Softmax attention inside the segments of a packed stream: the ``core_attention`` of our specs.

Legend: t tokens, n local query heads, g local key/value heads, d head size.

Backends: ``sdpa`` is torch's scaled_dot_product_attention over runs of equally long segments and
works everywhere; ``flash`` is flash-attn's varlen kernel; ``transformer_engine`` is its packed
(THD) attention. megatron-core's own local attention refuses packing.
"""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmlm.layers.packed_sequence import PackedSequence


class PackedAttention(MegatronModule):
    """Attention within segments, causal or full as ``attn_mask_type`` says.

    Args:
        config: sizes; ``attention_dropout`` must be 0.
        layer_number: 1-based number in the whole model, for transformer-engine's bookkeeping.
        attn_mask_type: ``causal`` or ``no_mask``.
        attention_type: "self"; part of megatron-core's interface.
        pg_collection: its ``tp`` group gives the local number of heads.
        backend: "sdpa", "flash" or "transformer_engine".
        softmax_scale: multiplies the scores; 1/sqrt(d) when None.
        cp_comm_type: part of megatron-core's interface; context parallelism is not supported.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        *,
        backend: str = "sdpa",
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0 and config.context_parallel_size == 1
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.backend = backend
        self.te_attention: Any = None
        if backend == "transformer_engine":
            import transformer_engine.pytorch as te

            tp_size = pg_collection.tp.size()
            self.te_attention = te.DotProductAttention(
                config.num_attention_heads // tp_size,
                config.kv_channels,
                num_gqa_groups=config.num_query_groups // tp_size,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal" if self.causal else "padding",
                softmax_scale=self.softmax_scale,
                layer_number=layer_number,
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> Tensor:
        """Attend within each segment.

        Args:
            query: [t, 1, n, d].
            key: [t, 1, g, d].
            value: [t, 1, g, d].
            attention_mask: must be None; the segments say it all.
            attn_mask_type: ignored, the constructor's counts.
            attention_bias: must be None.
            packed_seq_params: the segments; one segment when None.

        Returns:
            [t, 1, n * d].
        """
        assert attention_mask is None and attention_bias is None
        packed = packed_seq_params
        if packed is None:
            packed = PackedSequence.from_lengths((query.shape[0],), query.device)
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if self.backend == "flash":
            out = self._flash(query, key, value, packed)
        elif self.backend == "transformer_engine":
            out = self.te_attention(
                query,
                key,
                value,
                cu_seqlens_q=packed.cu_seqlens_q,
                cu_seqlens_kv=packed.cu_seqlens_kv,
                max_seqlen_q=packed.max_seqlen_q,
                max_seqlen_kv=packed.max_seqlen_kv,
            )
        else:
            out = self._sdpa(query, key, value, packed)
        return out.reshape(query.shape[0], 1, -1)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequence) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            deterministic=self.config.deterministic_mode,
        )

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequence) -> Tensor:
        dtype = query.dtype
        if query.device.type == "cpu" and dtype == torch.bfloat16:
            # torch's CPU backward in bf16 is eight times slower than this detour
            query, key, value = query.float(), key.float(), value.float()
        outputs, start = [], 0
        for length, run in groupby(packed.segment_lengths):
            count = len(list(run))
            rows = slice(start, start + count * length)
            # [count * length, heads, d] -> [count, heads, length, d]
            q, k, v = (
                x[rows].view(count, length, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            )
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(out.transpose(1, 2).reshape(count * length, *query.shape[1:]))
            start += count * length
        return torch.cat(outputs).to(dtype)
