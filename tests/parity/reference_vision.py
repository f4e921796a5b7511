"""InternViT and the pixel shuffle of one image in plain PyTorch.

Part of `reference_model`. Letters: S image side in pixels, g patches along one side of an image,
n tokens of an image (class token first), h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.parity.reference_layers import RMSNorm, at_least_float32, attend, split_heads

ATTENTION_BRANCH = 0
MLP_BRANCH = 1

DropPath = Callable[[int, int, int], float]
"""(image id, layer from 0, branch) -> multiplier of that branch: 0, or 1 / (1 - rate)."""


def drop_path_rate(layer: int, num_layers: int, last_rate: float) -> float:
    """Rate of one layer: linear over depth, 0 for the first layer, `last_rate` for the last."""
    return last_rate * layer / (num_layers - 1) if num_layers > 1 else 0.0


class VisionEmbeddings(nn.Module):
    """Patches, class token in front, learned positions added."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, patch = config["hidden_size"], config["patch_size"]
        self.grid = config["image_size"] // patch
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden))
        self.patch_embedding = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.grid**2 + 1, hidden))

    def forward(self, image: Tensor) -> Tensor:
        """`[3, S, S]` -> `[1 + g * g, h]`, patches row by row."""
        patches = self.patch_embedding(image.unsqueeze(0))[0]  # [h, g, g]
        rows, columns = patches.shape[1:]
        tokens = torch.cat([self.class_embedding[0], patches.flatten(1).t()])
        return tokens + self.positions(rows, columns)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The learned positions `[1 + rows * columns, h]`, resized where the grid differs."""
        learned = self.position_embedding[0]
        if (rows, columns) == (self.grid, self.grid):
            return learned
        picture = at_least_float32(learned[1:]).t().reshape(1, -1, self.grid, self.grid)
        resized = functional.interpolate(
            picture, size=(rows, columns), mode="bicubic", align_corners=False
        )
        return torch.cat([learned[:1], resized[0].flatten(1).t().to(learned.dtype)])


class VisionAttention(nn.Module):
    """Every patch sees every patch; q and k are normalised over all heads together."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.num_heads = config["num_attention_heads"]
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=config.get("qkv_bias", False))
        self.q_norm = RMSNorm(hidden, eps)
        self.k_norm = RMSNorm(hidden, eps)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key = self.q_norm(query), self.k_norm(key)  # over the full width h
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        everything = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)
        return self.proj(attend(query, key, value, mask=everything))


class VisionMLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="none"))


class VisionLayer(nn.Module):
    """x + drop(attn(norm1(x)) * ls1), then x + drop(mlp(norm2(x)) * ls2)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.norm1 = RMSNorm(hidden, eps)
        self.attn = VisionAttention(config)
        self.ls1 = nn.Parameter(torch.ones(hidden))
        self.norm2 = RMSNorm(hidden, eps)
        self.mlp = VisionMLP(config)
        self.ls2 = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, attention_multiplier: float, mlp_multiplier: float) -> Tensor:
        x = x + attention_multiplier * (self.attn(self.norm1(x)) * self.ls1)
        return x + mlp_multiplier * (self.mlp(self.norm2(x)) * self.ls2)


class VisionEncoder(nn.Module):
    """The layers, without a norm after the last one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: Tensor, image_id: int, drop_path: DropPath | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            multipliers = (
                (1.0, 1.0)
                if drop_path is None
                else tuple(drop_path(image_id, index, b) for b in (ATTENTION_BRANCH, MLP_BRANCH))
            )
            x = layer(x, *multipliers)
        return x


class ReferenceInternViT(nn.Module):
    """InternViT of one image: `[3, S, S]` -> `[1 + g * g, h]`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if not config.get("qk_normalization", True) or config.get("norm_type") == "layer_norm":
            raise ValueError("the reference knows InternViT-6B: RMSNorm and q/k normalisation")
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)

    def forward(self, image: Tensor, image_id: int, drop_path: DropPath | None = None) -> Tensor:
        return self.encoder(self.embeddings(image), image_id, drop_path)


def shuffled_patches(grid: int, factor: int, version: str) -> list[list[int]]:
    """Which patches (numbered row by row) make up each token after the pixel shuffle.

    A token is a `factor` x `factor` block of neighbouring patches, read row by row. v1 lists the
    blocks column of blocks by column of blocks, v2 row of blocks by row of blocks.

    Args:
        grid: patches along one side of the image.
        factor: patches along one side of a block, 1 / downsample_ratio.
        version: "v1" or "v2".

    Returns:
        One list of patch numbers a token, in the order of the tokens.
    """
    if version not in ("v1", "v2") or grid % factor:
        raise ValueError(f"no pixel shuffle '{version}' by {factor} of a {grid} x {grid} grid")
    blocks = range(grid // factor)
    if version == "v1":
        corners = [(row, column) for column in blocks for row in blocks]
    else:
        corners = [(row, column) for row in blocks for column in blocks]
    return [
        [
            (row * factor + down) * grid + column * factor + right
            for down in range(factor)
            for right in range(factor)
        ]
        for row, column in corners
    ]


def pixel_shuffle(patches: Tensor, factor: int, version: str) -> Tensor:
    """`[g * g, h]` -> `[g * g / factor^2, factor^2 * h]`, channels patch by patch."""
    grid = math.isqrt(len(patches))
    tokens = shuffled_patches(grid, factor, version)
    return torch.stack([torch.cat([patches[patch] for patch in token]) for token in tokens])
