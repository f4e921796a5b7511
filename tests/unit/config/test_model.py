"""Every rule about sizes has a case that breaks it, and derived numbers are the published ones."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mmlm.config.presets import internvl_chat_v1_2, tiny
from mmlm.errors import ConfigError


def vision(**changes: Any) -> object:
    """The tiny tower with some fields changed."""
    return dataclasses.replace(tiny().vision, **changes)


def language(**changes: Any) -> object:
    """The tiny decoder with some fields changed."""
    return dataclasses.replace(tiny().language, **changes)


def model(**changes: Any) -> object:
    """The tiny model with some fields changed."""
    return dataclasses.replace(tiny(), **changes)


def test_derived_numbers_of_the_published_model() -> None:
    sizes = internvl_chat_v1_2()
    assert sizes.vision.kv_channels == 128
    assert sizes.vision.grid_size == 32
    assert sizes.vision.tokens_per_image == 1025
    assert sizes.vision.embeddings_per_image == 256
    assert sizes.projection_input_size == 12800


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            vision,
            {"num_attention_heads": 7},
            "vision: hidden_size 40 must be a multiple of num_attention_heads 7",
        ),
        (vision, {"image_size": 42}, "image_size // patch_size = 3 must be even and positive"),
        (vision, {"image_size": 13}, "image_size // patch_size = 0 must be even and positive"),
        (vision, {"num_layers": 0}, "vision: num_layers 0 must be at least 1"),
        (
            language,
            {"num_query_groups": 3},
            "language: num_attention_heads 4 must be a multiple of num_query_groups 3",
        ),
        (language, {"num_layers": 0}, "language: num_layers 0 must be at least 1"),
        (language, {"kv_channels": 11}, "kv_channels 11 must be even for RoPE"),
        (model, {"ps_version": "v3"}, "model: ps_version 'v3' must be v1 or v2"),
    ],
)
def test_each_rule(section: Callable[..., object], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**changes)
    assert message in str(caught.value)
