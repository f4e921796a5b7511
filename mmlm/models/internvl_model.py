"""The chunk of InternVL that one pipeline stage holds, and what it is fed.

Legend: t tokens of the packed stream, n images, k supervised positions, h hidden size.
"""

from dataclasses import dataclass

from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.layers.packed_sequence import PackedSequence
from mmlm.layers.vision_layer import PackedImages
from mmlm.models.language_model import LanguageModel
from mmlm.models.transformer_config import TransformerConfigs
from mmlm.models.vision_model import InternVisionModel
from mmlm.models.vision_projection import VisionProjection
from mmlm.parallel.backend import Backend
from mmlm.parallel.stage_plan import StageChunk


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One microbatch on this rank's device; the same on every stage, but for the pixels."""

    input_ids: Tensor
    """int64 [t]."""
    position_ids: Tensor
    """int64 [t], restarting in each sample."""
    segments: PackedSequence
    """The samples of the stream."""
    pixel_values: Tensor | None
    """[n, 3, S, S] where images enter the model, else None."""
    images: PackedImages
    """The images of the stream."""
    image_positions: Tensor
    """int64 [n * embeddings per image], rows of the stream that image embeddings replace."""
    label_positions: Tensor
    """int64 [k], rows that logits are computed for; at least one."""


class InternVLModel(MegatronModule):
    """Vision layers, projection and decoder layers of one stage; an absent part is None.

    Args:
        configs: megatron-core's two configs.
        model: true sizes.
        chunk: what this stage holds.
        backend: which implementations.
        pg_collection: groups.
        vp_stage: which chunk of its pipeline rank, None without virtual stages.
    """

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        configs: TransformerConfigs,
        model: ModelConfig,
        chunk: StageChunk,
        backend: Backend,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        # the schedule reads its settings from this config
        super().__init__(config=configs.language)
        self.vp_stage = vp_stage
        self.input_tensor: Tensor | None = None
        self.pre_process = chunk.has_vision_embedding
        self.post_process = chunk.has_output
        self.vision_model = self.vision_projection = self.language_model = None
        if chunk.vision_layers:
            self.vision_model = InternVisionModel(
                configs.vision,
                model.vision,
                chunk,
                backend,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        if chunk.has_projection:
            self.vision_projection = VisionProjection(configs.language, model, pg_collection)
        if chunk.has_embedding or chunk.decoder_layers or chunk.has_output:
            self.language_model = LanguageModel(
                configs.language, model.language, chunk, backend, pg_collection, vp_stage
            )

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take what the previous stage sent; called by the schedule before `forward`."""
        self.input_tensor = input_tensor[0]

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Run the stage.

        Args:
            inputs: the microbatch.

        Returns:
            The tensor for the next stage, [rows, 1, h]; on the last stage fp32 logits
            [k, 1, vocabulary rows of this rank].
        """
        x = self.input_tensor
        if self.vision_model is not None:
            x = self.vision_model(x, inputs.pixel_values, inputs.images)
        if self.vision_projection is not None:
            x = self.vision_projection(x, len(inputs.images.image_ids))
        if self.language_model is not None:
            x = self.language_model(
                x,
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                image_positions=inputs.image_positions,
                label_positions=inputs.label_positions,
                segments=inputs.segments,
            )
        # the schedule frees the data of what a stage returns, so it must not be a view
        return make_viewless_tensor(x, requires_grad=True, keep_graph=True)
