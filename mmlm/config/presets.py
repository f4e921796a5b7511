"""Sizes of the published parts and of a tiny model, where there are no weights to read them from.

Source: the ``config.json`` files of InternViT-6B-448px-V1-2 and Nous-Hermes-2-Yi-34B.
"""

from mmlm.config.model import LanguageConfig, ModelConfig, VisionConfig


def internvit_6b_448px() -> VisionConfig:
    """InternViT-6B-448px-V1-2: 45 layers, 25 heads, 5.54 billion parameters."""
    return VisionConfig(
        hidden_size=3200,
        ffn_hidden_size=12800,
        num_layers=45,
        num_attention_heads=25,
        image_size=448,
        patch_size=14,
    )


def yi_34b() -> LanguageConfig:
    """Nous-Hermes-2-Yi-34B with the nine added tokens: 60 layers, 34.39 billion parameters."""
    return LanguageConfig(
        hidden_size=7168,
        ffn_hidden_size=20480,
        num_layers=60,
        num_attention_heads=56,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=64009,
    )


def internvl_chat_v1_2() -> ModelConfig:
    """InternVL-Chat-V1-2, 40 billion parameters."""
    return ModelConfig(vision=internvit_6b_448px(), language=yi_34b())


def tiny() -> ModelConfig:
    """A model for tests and laptops with the same awkward shape: 5 vision heads, GQA 2:1."""
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=40,
            ffn_hidden_size=80,
            num_layers=3,
            num_attention_heads=5,
            image_size=56,
            patch_size=14,
        ),
        language=LanguageConfig(
            hidden_size=48,
            ffn_hidden_size=72,
            num_layers=3,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=12,
            vocab_size=300,
        ),
    )
