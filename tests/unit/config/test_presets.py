"""The presets have the published numbers of parameters, counted from the HuggingFace shapes."""

import dataclasses
from collections.abc import Mapping
from math import prod

from mmlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from mmlm.config.presets import internvit_6b_448px, internvl_chat_v1_2, tiny, yi_34b
from tests.tiny_weights import (
    TINY_LLM_CONFIG,
    TINY_VISION_CONFIG,
    llm_shapes,
    projector_shapes,
    vision_shapes,
)


def hf_vision(config: VisionConfig) -> dict[str, int]:
    """Sizes under HuggingFace's names."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def hf_language(config: LanguageConfig) -> dict[str, int]:
    """Sizes under HuggingFace's names."""
    assert config.kv_channels * config.num_attention_heads == config.hidden_size
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "vocab_size": config.vocab_size,
    }


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in all tensors."""
    return sum(prod(shape) for shape in shapes.values())


def test_internvit_6b_has_the_published_size() -> None:
    config = internvit_6b_448px()
    assert round(count(vision_shapes(hf_vision(config))) / 1e9, 2) == 5.54
    assert config.num_attention_heads == 25 and config.layernorm_epsilon == 1e-6


def test_yi_34b_has_the_published_size() -> None:
    config = yi_34b()
    assert round(count(llm_shapes(hf_language(config))) / 1e9, 2) == 34.39
    assert config.vocab_size == 64000 + 9
    assert config.rotary_base == 5e6 and config.layernorm_epsilon == 1e-5


def test_projection_has_the_published_size() -> None:
    model = internvl_chat_v1_2()
    shapes = projector_shapes(hf_vision(model.vision), hf_language(model.language))
    assert round(count(shapes) / 1e6) == 143
    assert model.ps_version == "v1" and model.projection_layernorm_epsilon == 1e-5


def test_tiny_is_the_model_of_the_tiny_weights() -> None:
    model: ModelConfig = tiny()
    assert hf_vision(model.vision).items() <= TINY_VISION_CONFIG.items()
    sizes = hf_language(dataclasses.replace(model.language, vocab_size=96))
    assert sizes.items() <= TINY_LLM_CONFIG.items()
