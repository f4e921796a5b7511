"""One InternViT layer: pre-norm attention and MLP, LayerScale, drop path per image.

``x = x + drop_path(attention(norm1(x)) * ls1)``; ``x = x + drop_path(mlp(norm2(x)) * ls2)``.

Legend: t tokens of all images (and padding) in one stream, h hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.sequence_region import local_part


@dataclass
class PackedImages(PackedSequence):
    """The images of a microbatch as segments, and what drop path needs to know of them."""

    image_ids: tuple[int, ...] = ()
    """Global image ids; empty when the stream is inert."""
    tokens_per_image: int = 0
    """Tokens of one image; what follows the last image is padding."""
    drop_path_scales: Tensor | None = None
    """float32 [layers of the tower, 2, images], see `drop_path.py`; None: nothing is dropped."""


class InternVisionLayer(TransformerLayer):
    """megatron-core's ``TransformerLayer`` with LayerScale and drop path in its residual sums.

    Args:
        config: of the tower, see `mmlm.models.transformer_config`.
        submodules: norms, attention and MLP.
        layer_number: 1-based number inside the chunk; megatron-core adds the stage's offset.
        hidden_dropout: part of megatron-core's interface; unused.
        pg_collection: groups.
        vp_stage: virtual stage or None.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        for name in ("attention_scale", "mlp_scale"):
            scale = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
            scale.sequence_parallel = config.sequence_parallel
            self.register_parameter(name, scale)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, packed_seq_params: PackedImages, **unused: object
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: [t, 1, h]; with sequence parallelism this TP rank's [t / TP, 1, h].
            packed_seq_params: the images in the whole stream.
            **unused: what ``TransformerBlock`` passes to every layer and this one has no use for.

        Returns:
            The same shape, and None for megatron-core's cross-attention context.
        """
        attention, bias = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=None,
            packed_seq_params=packed_seq_params,
        )
        branch = (attention + bias) * self.attention_scale
        hidden_states = hidden_states + self._drop_path(branch, packed_seq_params, 0)
        mlp, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        branch = (mlp + bias) * self.mlp_scale
        return hidden_states + self._drop_path(branch, packed_seq_params, 1), None

    def _drop_path(self, branch: Tensor, images: PackedImages, index: int) -> Tensor:
        # TransformerLayer has made layer_number global (from 1); layer 0 is never dropped
        layer = self.layer_number - 1
        if layer == 0 or images.drop_path_scales is None or not images.image_ids:
            return branch
        per_image = images.drop_path_scales[layer, index].to(branch.dtype)
        per_token = per_image.repeat_interleave(
            images.tokens_per_image, output_size=len(images.image_ids) * images.tokens_per_image
        )
        padding = sum(images.segment_lengths) - per_token.shape[0]
        per_token = F.pad(per_token, (0, padding), value=1.0)
        return branch * local_part(per_token, self.config, self.pg_collection).view(-1, 1, 1)
