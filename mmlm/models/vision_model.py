"""The part of an InternViT tower that one pipeline stage holds.

All images of a microbatch are one stream [t, 1, h] with t = images x (patches + 1): it can be
padded and cut anywhere, and every image is a segment of its own.

Legend: n images, g patches along a side, p patch size, t tokens in the stream, h hidden size.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmlm.config.model import VisionConfig
from mmlm.layers.sequence_region import enter_sequence_region, pad_stream, padding_tokens
from mmlm.layers.vision_layer import DropPathMode, PackedImages
from mmlm.models.layer_specs import block_spec, vision_layer_spec
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StageChunk

INERT_TOKENS = 2
"""Length of the stream of a microbatch without images: a class token and one blank patch."""


class InternVisionModel(MegatronModule):
    """Patch embedding (on the first stage) and the chunk's vision layers; there is no final norm.

    Args:
        config: megatron-core's, for the tower.
        vision: true sizes.
        chunk: which layers.
        backend: which implementations.
        pg_collection: groups.
        vp_stage: which chunk of its pipeline rank, None without virtual stages.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        chunk: StageChunk,
        backend: Backend,
        *,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.vision = vision
        self.groups = pg_collection
        self.pre_process = chunk.has_vision_embedding
        if self.pre_process:
            self.patch_embedding = torch.nn.Conv2d(
                3,
                vision.hidden_size,
                kernel_size=vision.patch_size,
                stride=vision.patch_size,
                dtype=config.params_dtype,
            )
            self.class_embedding = torch.nn.Parameter(
                torch.empty(1, 1, vision.hidden_size, dtype=config.params_dtype)
            )
            self.position_embedding = torch.nn.Parameter(
                torch.empty(
                    1, vision.tokens_per_image, vision.hidden_size, dtype=config.params_dtype
                )
            )
        layer = vision_layer_spec(backend, vision)
        self.decoder = TransformerBlock(
            config,
            block_spec(layer, len(chunk.vision_layers), backend),
            post_layer_norm=False,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    def forward(
        self, stream: Tensor | None, pixel_values: Tensor | None, images: PackedImages
    ) -> Tensor:
        """Run this stage's layers.

        Args:
            stream: [t, 1, h] from the previous stage; ignored on the first.
            pixel_values: [n, 3, S, S], needed on the first stage; n may be 0.
            images: the images of the microbatch.

        Returns:
            [t, 1, h].
        """
        if self.pre_process:
            assert pixel_values is not None, "the loader gives pixels to the first stage"
            stream = self._embed(pixel_values)
        return self.decoder(hidden_states=stream, attention_mask=None, packed_seq_params=images)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        inert = pixel_values.shape[0] == 0
        if inert:
            size = self.vision.patch_size
            pixel_values = pixel_values.new_zeros(1, 3, size, size)
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # [n, g * g, h], rows of the grid in order
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + self.position_embedding[:, : tokens.shape[1]]
        stream = tokens.reshape(-1, 1, tokens.shape[-1])
        stream = pad_stream(stream, padding_tokens(len(stream), self.config))
        return enter_sequence_region(stream, self.config, self.groups)


def pack_images(
    vision: VisionConfig,
    image_ids: tuple[int, ...],
    device: torch.device,
    drop_path_scales: Tensor | None = None,
    pad_to_multiple_of: int = 1,
    drop_path_mode: DropPathMode = "skip",
) -> PackedImages:
    """Describe the stream of ``image_ids``; an inert one of `INERT_TOKENS` when there are none.

    Args:
        vision: sizes.
        image_ids: global ids of the images, in order.
        device: where the stream is.
        drop_path_scales: float32 [layers, 2, images] on the CPU; None: nothing is dropped.
        pad_to_multiple_of: with sequence parallelism the TP size; padding is a segment of its own.
        drop_path_mode: whether dropped branches are skipped or masked.
    """
    lengths = (vision.tokens_per_image,) * len(image_ids) or (INERT_TOKENS,)
    padding = -sum(lengths) % pad_to_multiple_of
    if padding:
        lengths = (*lengths, padding)
    packed = PackedImages.from_lengths(
        lengths,
        device,
        image_ids=image_ids,
        tokens_per_image=vision.tokens_per_image,
        drop_path_scales=drop_path_scales,
        drop_path_mode=drop_path_mode,
    )
    assert isinstance(packed, PackedImages)
    return packed
