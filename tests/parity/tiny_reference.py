"""A tiny reference model with random weights and an input for it, shared by the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.reference_model import ReferenceInternVL
from tests.tiny_weights import (
    llm_shapes,
    projector_shapes,
    random_tensors,
    tiny_llm_config,
    tiny_vision_config,
    vision_shapes,
)

VOCAB = 50
CONTEXT = 48  # the tiny <IMG_CONTEXT>


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Sizes as `ReferenceInternVL` takes them, some changed."""
    return {"vision_config": tiny_vision_config(), "llm_config": tiny_llm_config(VOCAB), **changes}


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> ReferenceInternVL:
    """The reference with the weights of seed 1."""
    config = tiny_config(**changes)
    vision, llm = config["vision_config"], config["llm_config"]
    weights = {
        prefix + name: tensor
        for prefix, shapes in {
            "vision_model.": vision_shapes(vision),
            "language_model.": llm_shapes(llm),
            "mlp1.": projector_shapes(vision, llm),
        }.items()
        for name, tensor in random_tensors(shapes, 1, dtype).items()
    }
    model = ReferenceInternVL(config).to(dtype)
    model.load_state_dict(weights, strict=True)
    return model


def tiny_input(images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids with `images` blocks of four <IMG_CONTEXT>, the pictures, their ids."""
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randint(0, 40, (3,), generator=generator)]
    for _ in range(images):
        pieces += [
            torch.full((4,), CONTEXT),
            torch.randint(0, 40, (2,), generator=generator),
        ]
    pixels = torch.randn(images, 3, 56, 56, generator=generator)
    return torch.cat(pieces), pixels, torch.arange(images) + 64
