"""One InternViT layer: pre-norm attention and MLP, LayerScale, drop path per image.

``x = x + drop_path(attention(norm1(x)) * ls1)``; ``x = x + drop_path(mlp(norm2(x)) * ls2)``.
A branch is computed for the images that keep it, and not at all for the others.

Legend: t tokens of all images (and padding) in one stream, h hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from mmlm.layers.kept_rows import add_rows, kept_rows, take_rows
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.sequence_region import local_part

DropPathMode = Literal["skip", "mask"]


@dataclass
class PackedImages(PackedSequence):
    """The images of a microbatch as segments, and what drop path needs to know of them."""

    image_ids: tuple[int, ...] = ()
    """Global image ids; empty when the stream is inert."""
    tokens_per_image: int = 0
    """Tokens of one image; what follows the last image is padding."""
    drop_path_scales: Tensor | None = None
    """float32 [layers of the tower, 2, images] on the CPU, because it decides which rows are
    computed; see `drop_path.py`. None: nothing is dropped."""
    drop_path_mode: DropPathMode = "skip"
    """skip: dropped branches are not computed; mask: they are, and multiplied by 0 (the same
    result but for rounding, in shapes that never change)."""


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
        x = self._add_branch(hidden_states, packed_seq_params, 0, self._attention)
        return self._add_branch(x, packed_seq_params, 1, self._mlp), None

    def _attention(self, x: Tensor, segments: PackedSequence) -> Tensor:
        out, bias = self.self_attention(
            self.input_layernorm(x), attention_mask=None, packed_seq_params=segments
        )
        return (out + bias) * self.attention_scale

    def _mlp(self, x: Tensor, segments: PackedSequence) -> Tensor:
        out, bias = self.mlp(self.pre_mlp_layernorm(x))
        return (out + bias) * self.mlp_scale

    def _add_branch(
        self,
        x: Tensor,
        images: PackedImages,
        index: int,
        branch: Callable[[Tensor, PackedSequence], Tensor],
    ) -> Tensor:
        # TransformerLayer has made layer_number global (from 1); layer 0 is never dropped
        layer = self.layer_number - 1
        if layer == 0 or images.drop_path_scales is None or not images.image_ids:
            return x + branch(x, images)
        scales = images.drop_path_scales[layer, index].tolist()
        if images.drop_path_mode == "mask":
            scaled = branch(x, images).float() * self._per_token(images, scales, x.device)
            return x + scaled.to(x.dtype)
        if all(scales):
            return x + branch(x, images) * scales[0]
        shared = self.config.sequence_parallel
        group = self.pg_collection.tp
        rows = kept_rows(
            [scale > 0.0 for scale in scales],
            images.tokens_per_image,
            sum(images.segment_lengths),
            num_ranks=group.size() if shared else 1,
            rank=group.rank() if shared else 0,
        )
        kept = PackedSequence.from_lengths(rows.segment_lengths, x.device)
        return add_rows(x, branch(take_rows(x, rows, group), kept), max(scales), rows, group)

    def _per_token(self, images: PackedImages, scales: list[float], device: torch.device) -> Tensor:
        per_image = torch.tensor(scales).to(device, non_blocking=True)
        per_token = per_image.repeat_interleave(
            images.tokens_per_image, output_size=len(scales) * images.tokens_per_image
        )
        padding = sum(images.segment_lengths) - per_token.shape[0]
        per_token = F.pad(per_token, (0, padding), value=1.0)
        return local_part(per_token, self.config, self.pg_collection).view(-1, 1, 1)
