"""From the tower's stream to image embeddings: drop the class token, pixel shuffle, two layers.

Legend: n images, g patches along a side, t tokens in the stream, h tower width, H decoder width.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.layers.norm import LayerNorm
from mmlm.layers.sequence_region import leave_sequence_region, outside_sequence_region
from mmlm.models.pixel_shuffle import pixel_shuffle


class VisionProjection(MegatronModule):
    """Pixel shuffle, LayerNorm, Linear, GELU (erf), Linear; column- then row-parallel.

    Args:
        config: megatron-core's, for the decoder (its width is the output).
        model: true sizes.
        pg_collection: its ``tp`` group is used.
    """

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.model = model
        self.groups = pg_collection
        width = model.language.hidden_size
        outside = outside_sequence_region(config)
        shared = {
            "config": outside,
            "init_method": config.init_method,
            "bias": True,
            "tp_group": pg_collection.tp,
        }
        self.layernorm = LayerNorm(
            outside, model.projection_input_size, model.projection_layernorm_epsilon
        )
        self.linear_fc1 = ColumnParallelLinear(
            model.projection_input_size, width, gather_output=False, **shared
        )
        self.linear_fc2 = RowParallelLinear(
            width, width, input_is_parallel=True, skip_bias_add=False, **shared
        )

    def forward(self, stream: Tensor, num_images: int) -> Tensor:
        """Project the images.

        Args:
            stream: [t, 1, h], the tower's output; with sequence parallelism [t / TP, 1, h].
            num_images: n; 0 means that the stream is inert.

        Returns:
            [n * g * g / 4, 1, H]; one inert row when n is 0.
        """
        stream = leave_sequence_region(stream, self.config, self.groups)
        features = self._features(stream, num_images)
        hidden, _ = self.linear_fc1(self.layernorm(features))
        return self.linear_fc2(F.gelu(hidden))[0]

    def _features(self, stream: Tensor, num_images: int) -> Tensor:
        vision = self.model.vision
        if num_images == 0:
            return torch.cat([stream[:1]] * 4, dim=-1)
        grid = vision.grid_size
        tokens = stream[: num_images * vision.tokens_per_image]
        patches = tokens.view(num_images, vision.tokens_per_image, -1)[:, 1:]
        patches = patches.reshape(num_images, grid, grid, -1)
        return pixel_shuffle(patches, self.model.ps_version).reshape(
            -1, 1, self.model.projection_input_size
        )
