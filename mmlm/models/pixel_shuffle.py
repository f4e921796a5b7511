"""Pixel shuffle: 2 x 2 patches become one vector of four times the width. Pure functions.

Legend: n images, w and h the patch grid, c channels.
"""

from torch import Tensor


def pixel_shuffle(features: Tensor, version: str) -> Tensor:
    """Join 2 x 2 patches side by side.

    Args:
        features: [n, w, h, c], w and h even.
        version: "v1" leaves the output grid transposed, as the released V1-2 weights expect;
            "v2" swaps it back. Source: ``InternVLChatModel.pixel_shuffle``.

    Returns:
        [n, h / 2, w / 2, 4 c] for v1, [n, w / 2, h / 2, 4 c] for v2.
    """
    n, w, h, c = features.shape
    x = features.reshape(n, w, h // 2, 2 * c).permute(0, 2, 1, 3)  # [n, h/2, w, 2c]
    x = x.reshape(n, h // 2, w // 2, 4 * c)
    return x.permute(0, 2, 1, 3) if version == "v2" else x
