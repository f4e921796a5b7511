"""Position embeddings of the ViT for another grid of patches."""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

POSITIONS = "vision_model.position_embedding"
"""Global name of the position embedding."""


def resize_positions(weight: Tensor, num_positions: int) -> Tensor:
    """Resize the grid; the class token, which comes first, stays as it is.

    As InternVisionModel.resize_pos_embeddings does (OpenGVLab/InternVL, modeling_intern_vit.py):
    bicubic in fp32, corners not aligned, then the tensor's own dtype.

    Args:
        weight: [1, 1 + old grid², h].
        num_positions: 1 + new grid².

    Returns:
        [1, 1 + new grid², h] in the same dtype.
    """
    if weight.shape[1] == num_positions:
        return weight
    old, new = isqrt(weight.shape[1] - 1), isqrt(num_positions - 1)
    grid = weight[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, h, old, old]
    resized = interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    rows = resized.to(weight.dtype).flatten(2).transpose(1, 2)  # [1, new², h]
    return torch.cat((weight[:, :1], rows), dim=1)
