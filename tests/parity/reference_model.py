"""InternVL-Chat in plain PyTorch: one process, one unpacked sample at a time, nothing fused.

This is the yardstick of the parity tests, written from the published description of the model and
sharing no code with `mmlm` or megatron. It favours being obviously right over being fast: every
tensor of the decoder is `[n, h]` (tokens of one conversation), every tensor of the vision tower
`[s, h]` (class token and patches of one image). Parameter names are those of the combined
InternVL-Chat HuggingFace folder.

Letters: n tokens of a conversation, k images, S image side in pixels, h hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.reference_llama import ReferenceLlama
from tests.parity.reference_vision import DropPath, ReferenceInternViT, pixel_shuffle

__all__ = ["DropPath", "ReferenceInternVL"]


class ReferenceInternVL(nn.Module):
    """InternVL-Chat of one unpacked sample.

    Args:
        config: HuggingFace-style sizes: `vision_config`, `llm_config`, and optionally `ps_version`
            ("v1", the default, or "v2") and `downsample_ratio` (0.5).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vision, llm = config["vision_config"], config["llm_config"]
        self.ps_version = config.get("ps_version", "v1")
        self.factor = round(1 / config.get("downsample_ratio", 0.5))
        shuffled = vision["hidden_size"] * self.factor**2
        self.vision_model = ReferenceInternViT(vision)
        self.language_model = ReferenceLlama(llm)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled, eps=1e-5),
            nn.Linear(shuffled, llm["hidden_size"]),
            nn.GELU(approximate="none"),
            nn.Linear(llm["hidden_size"], llm["hidden_size"]),
        )

    def embed_image(
        self, image: Tensor, image_id: int, drop_path: DropPath | None = None
    ) -> Tensor:
        """`[3, S, S]` -> `[tokens per image, hidden size of the decoder]`."""
        patches = self.vision_model(image, image_id, drop_path)[1:]  # without the class token
        return self.mlp1(pixel_shuffle(patches, self.factor, self.ps_version))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_ids: Tensor | None,
        img_context_token_id: int,
        drop_path: DropPath | None = None,
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: int64 `[n]`.
            pixel_values: `[k, 3, S, S]`, or None for k = 0.
            image_ids: int64 `[k]`, given to `drop_path`; or None for k = 0.
            img_context_token_id: the token whose embeddings are replaced, in order.
            drop_path: see `DropPath`; None keeps every branch as it is.

        Returns:
            `[n, vocab]`.
        """
        embeddings = self.language_model.model.embed_tokens(input_ids)
        positions = (input_ids == img_context_token_id).nonzero()[:, 0]
        images = [] if pixel_values is None or image_ids is None else list(pixel_values)
        features = [
            self.embed_image(image, int(image_id), drop_path)
            for image, image_id in zip(images, [] if image_ids is None else image_ids, strict=True)
        ]
        if sum(map(len, features)) != len(positions):
            raise ValueError(
                f"{len(images)} images do not fill {len(positions)} <IMG_CONTEXT> positions"
            )
        if features:
            embeddings = embeddings.index_copy(0, positions, torch.cat(features))
        return self.language_model(embeddings)
