"""The part of a Llama-type decoder that one pipeline stage holds.

Legend: t tokens of the packed stream, h hidden size, d head size, v vocabulary rows of this rank,
k supervised positions.
"""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmlm.config.model import LanguageConfig
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.sequence_region import (
    enter_sequence_region,
    leave_sequence_region,
    outside_sequence_region,
)
from mmlm.layers.trimmed_shard import trimmed_factory
from mmlm.models.embedding_merge import merge_image_embeddings
from mmlm.models.layer_specs import block_spec, decoder_layer_spec
from mmlm.models.transformer_config import padded_vocab_size
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StageChunk


class LanguageModel(MegatronModule):
    """Embedding and merge, decoder layers, final norm and head, as far as the chunk has them.

    The vocabulary is padded so that TP divides it; padded logits are -inf, so they take no part in
    the softmax and padded rows never get a gradient.

    Args:
        config: megatron-core's, for the decoder.
        language: true sizes.
        chunk: which layers.
        backend: which implementations.
        pg_collection: groups.
        vp_stage: which chunk of its pipeline rank, None without virtual stages.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        chunk: StageChunk,
        backend: Backend,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.language = language
        self.groups = pg_collection
        self.tp_group = pg_collection.tp
        padded_vocab = padded_vocab_size(language.vocab_size, self.tp_group.size())
        self.vocab_rows = padded_vocab // self.tp_group.size()
        start = self.tp_group.rank() * self.vocab_rows
        self.true_vocab_rows = max(0, min(language.vocab_size - start, self.vocab_rows))
        self.embedding = self.decoder = self.output_layer = None
        if chunk.has_embedding:
            self.embedding = LanguageModelEmbedding(
                outside_sequence_region(config),
                padded_vocab,
                language.max_position_embeddings,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,
                tp_group=pg_collection.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=language.kv_channels,
            rotary_percent=1.0,
            rotary_base=language.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=pg_collection.cp,
        )
        if chunk.decoder_layers or chunk.has_output:
            self.decoder = TransformerBlock(
                config,
                block_spec(
                    decoder_layer_spec(backend, language), len(chunk.decoder_layers), backend
                ),
                post_process=chunk.has_output,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        if chunk.has_output:
            self.output_layer = ColumnParallelLinear(
                language.hidden_size,
                padded_vocab,
                config=outside_sequence_region(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=pg_collection.tp,
            )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        image_positions: Tensor,
        label_positions: Tensor,
        segments: PackedSequence,
    ) -> Tensor:
        """Run this stage's layers.

        Args:
            hidden_states: image embeddings [m, 1, h] where this chunk embeds the text, otherwise
                the previous stage's output [t, 1, h] ([t / TP, 1, h] with sequence parallelism).
            input_ids: int64 [t].
            position_ids: int64 [t], restarting in each sample.
            image_positions: int64, rows that image embeddings replace.
            label_positions: int64 [k], rows that logits are computed for.
            segments: the samples of the stream.

        Returns:
            The tensor for the next stage; with a head, fp32 logits of this rank's vocabulary rows
            [k, 1, v].
        """
        if self.embedding is not None:
            text = self.embedding(input_ids.unsqueeze(0), position_ids=None)
            hidden_states = merge_image_embeddings(text, hidden_states, image_positions)
            hidden_states = enter_sequence_region(hidden_states, self.config, self.groups)
        if self.decoder is not None:
            rotary = self.rotary_pos_emb(segments.max_seqlen_q)[position_ids]  # [t, 1, 1, d]
            hidden_states = self.decoder(
                hidden_states=hidden_states,
                attention_mask=None,
                rotary_pos_emb=rotary,
                packed_seq_params=segments,
            )
        if self.output_layer is None:
            return hidden_states
        hidden_states = leave_sequence_region(hidden_states, self.config, self.groups)
        logits, _ = self.output_layer(hidden_states[label_positions])
        return self._hide_padding(logits.float())

    def _hide_padding(self, logits: Tensor) -> Tensor:
        if self.true_vocab_rows == self.vocab_rows:
            return logits
        padding = torch.arange(self.vocab_rows, device=logits.device) >= self.true_vocab_rows
        return logits.masked_fill(padding, float("-inf"))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict:
        """The parameters, embedding and head with their true rows only."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if prefix + name in state:
                state[prefix + name] = trimmed_factory(
                    state[prefix + name],
                    0,
                    length=self.true_vocab_rows,
                    global_offset=self.tp_group.rank() * self.vocab_rows,
                    global_length=self.language.vocab_size,
                )
        return state
