"""What both towers of `reference_model` share: RMSNorm and eager attention.

Letters: n tokens of one sequence, a heads, d head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it is already wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistic in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        normed = wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Eager softmax attention of one sequence.

    Args:
        query, key, value: `[a, n, d]`.
        mask: bool `[n, n]`, true where a row may look at a column.

    Returns:
        `[n, a * d]`, heads side by side.
    """
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])  # [a, n, n]
    scores = at_least_float32(scores).masked_fill(~mask, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1).to(value.dtype)
    return (probabilities @ value).transpose(0, 1).flatten(1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[n, a * d]` -> `[a, n, d]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)
