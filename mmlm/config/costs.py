"""Multiply-adds of a forward pass, piece by piece: what packing and the pipeline cut level out.

Pure functions of the sizes. Weights count once a token; attention scores and values once a pair of
tokens each, half of them where attention is causal.
"""

from dataclasses import dataclass

from mmlm.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ForwardCosts:
    """Multiply-adds of the pieces of a model."""

    vision_layer_per_image: float
    """One vision layer on one image."""
    projection_per_image: float
    """Pixel shuffle's output through both linear layers."""
    decoder_layer_per_token: float
    """Weights of one decoder layer."""
    decoder_layer_per_squared_token: float
    """Causal attention of one decoder layer: times the square of a sample's tokens."""
    head_per_token: float
    """Output layer, where every position has a label."""


def forward_costs(model: ModelConfig) -> ForwardCosts:
    """Count the multiply-adds of ``model``."""
    vision, language = model.vision, model.language
    vision_weights = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.ffn_hidden_size)
    query = language.num_attention_heads * language.kv_channels
    key = language.num_query_groups * language.kv_channels
    projection = language.hidden_size * (model.projection_input_size + language.hidden_size)
    return ForwardCosts(
        vision_layer_per_image=float(
            vision.tokens_per_image * vision_weights
            + vision.tokens_per_image**2 * 2 * vision.hidden_size
        ),
        projection_per_image=float(vision.embeddings_per_image * projection),
        decoder_layer_per_token=float(
            language.hidden_size * (2 * query + 2 * key + 3 * language.ffn_hidden_size)
        ),
        decoder_layer_per_squared_token=float(query),
        head_per_token=float(language.hidden_size * language.vocab_size),
    )
